"""musicnn (Pons et al. 2018, 1711.02520; Pons and Serra 2019, 1909.06654), a music tagger.

MuLan can use it as its audio tower. Tall (timbral) and wide (temporal) filters run over a log-mel
spectrogram, three residual layers follow, and the maximum and the mean over time are the output.
Batch normalisation follows each convolution and ReLU. It uses its inference statistics, so it is
a trainable scale and shift per channel. The packaged weights have TensorFlow's names, with the
four tensors of each batch normalisation.

Legend: B clips, N samples, S spectral frames (62.5 Hz), M mel bands, W channels.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from musicrl_jax.core import spectral
from musicrl_jax.models.layers import read_tensor

SAMPLE_RATE_HZ = 16_000
MELS = 96
HOP = 256
WINDOW = 2 * HOP
# Heights of the timbral filters: 0.4 and 0.7 of all bands.
TIMBRAL_BANDS = (38, 67)
TIMBRAL_FRAMES = 7
TEMPORAL_FRAMES = (128, 64, 32)
MIDDLE_FRAMES = 7
MIDDLE_LAYERS = 3
# Epsilon of TensorFlow's batch normalisation.
TF_EPSILON = 1e-3
# Zero crossings of the resampling filter's sinc on each side.
CROSSINGS = 10


@dataclasses.dataclass(frozen=True)
class MusicnnConfig:
    """Size of the network; the defaults are those of the packaged MSD_musicnn.

    Attributes:
      timbral: channels of each of the two timbral filters.
      temporal: channels of each of the three temporal filters.
      middle: channels of each of the three residual layers.
    """

    timbral: int = 204
    temporal: int = 51
    middle: int = 64

    def __post_init__(self):
        if min(self.timbral, self.temporal, self.middle) < 1:
            raise ValueError(
                f"timbral = {self.timbral}, temporal = {self.temporal} and middle = {self.middle} "
                "must be at least 1"
            )


def resample_to_16_khz(wav: jax.Array, sample_rate_hz: int) -> jax.Array:
    """Resamples wav from any rate to the network's: [B, N] -> [B, ceil(16000 N / rate)].

    The filter is that of `scipy.signal.resample_poly`: a sinc under a Kaiser window that cuts at
    the lower Nyquist rate.
    """
    if sample_rate_hz == SAMPLE_RATE_HZ:
        return wav
    import scipy.signal  # imports as slowly as JAX, and few systems need it

    # The filter, at `up` times the input's rate.
    divisor = math.gcd(sample_rate_hz, SAMPLE_RATE_HZ)
    up, down = SAMPLE_RATE_HZ // divisor, sample_rate_hz // divisor
    half = CROSSINGS * max(up, down)
    kernel = up * scipy.signal.firwin(2 * half + 1, 1 / max(up, down), window=("kaiser", 5.0))

    # Insert up - 1 zeros between samples, filter, keep every down-th.
    resampled = jax.lax.conv_general_dilated(
        wav.astype(jnp.float32)[:, None, :],
        jnp.asarray(kernel, jnp.float32)[None, None, :],
        window_strides=(down,),
        padding=((half, half + up - 1),),
        lhs_dilation=(up,),
        precision=jax.lax.Precision.HIGHEST,
    )
    return resampled[:, 0, : -(-wav.shape[-1] * up // down)]


def log_mels(wav: jax.Array) -> jax.Array:
    """Computes log10(1 + 10000 P) of mel powers P: [B, N] in [-1, 1] -> [B, N // 256 + 1, 96].

    Frame s is centred on sample 256 s and the clip is reflected at its ends, as in librosa when the
    weights were trained. The original rounds P to float16; this does not. Raises ValueError if the
    clip is shorter than 257 samples.
    """
    samples = wav.shape[-1]
    if samples <= HOP:
        raise ValueError(
            f"a clip of {samples} samples is too short for musicnn: use at least {HOP + 1}"
        )
    # Windows of two hops.
    count = samples // HOP + 1
    padded = jnp.pad(wav.astype(jnp.float32), ((0, 0), (HOP, HOP)), mode="reflect")
    hops = padded[:, : (count + 1) * HOP].reshape(wav.shape[0], count + 1, HOP)
    framed = jnp.concatenate([hops[:, :-1], hops[:, 1:]], axis=-1)  # [B, S, 512]

    # Powers of mel bands.
    hann = jnp.asarray(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW), jnp.float32)
    spectrum = jnp.fft.rfft(framed * hann[None, None, :], axis=-1)
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    filters = jnp.asarray(spectral.mel_filterbank(SAMPLE_RATE_HZ, WINDOW, MELS))
    return jnp.log10(1 + 10_000 * jnp.matmul(power, filters, precision=jax.lax.Precision.HIGHEST))


class Affine(nn.Module):
    """Batch normalisation at inference: a scale and a shift per channel."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x [..., W] * scale + shift."""
        width, others = x.shape[-1:], range(x.ndim - 1)
        scale = jnp.expand_dims(self.param("scale", nn.initializers.ones, width), others)
        shift = jnp.expand_dims(self.param("shift", nn.initializers.zeros, width), others)
        return x * scale + shift


class Filter(nn.Module):
    """A convolution over frames (and bands), padded with zeros in time, then ReLU and `Affine`."""

    width: int
    kernel: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Transforms x [B, S, W], or [B, S, M, 1] if the kernel has two axes."""
        before = (self.kernel[0] - 1) // 2
        padding = [(before, self.kernel[0] - 1 - before), *[(0, 0)] * (len(self.kernel) - 1)]
        x = nn.Conv(self.width, self.kernel, padding=padding, name="conv")(x)
        return Affine(name="norm")(nn.relu(x))


class Musicnn(nn.Module):
    """The network. The packaged weights were trained on 187 frames (3 s); any number works."""

    config: MusicnnConfig

    @nn.compact
    def __call__(self, mels: jax.Array) -> jax.Array:
        """Computes features of log-mels: [B, S, 96] -> [B, 2 W].

        Each feature's maximum and mean over time are next to each other, normalised; W is
        2 timbral + 3 temporal + 3 middle.
        """
        c = self.config
        x = Affine(name="input_norm")(mels[..., None])  # [B, S, M, 1]

        # Timbral and temporal filters, with the maximum over bands.
        front = []
        for bands in TIMBRAL_BANDS:
            front.append(Filter(c.timbral, (TIMBRAL_FRAMES, bands), name=f"timbral_{bands}")(x))
        for frames in TEMPORAL_FRAMES:
            front.append(Filter(c.temporal, (frames, 1), name=f"temporal_{frames}")(x))
        layers = [jnp.concatenate([part.max(axis=2) for part in front], axis=-1)]

        # Residual layers; all of them are features.
        for layer in range(MIDDLE_LAYERS):
            x = Filter(c.middle, (MIDDLE_FRAMES,), name=f"middle_{layer}")(layers[-1])
            layers.append(x if layer == 0 else layers[-1] + x)
        features = jnp.concatenate(layers, axis=-1)  # [B, S, W]
        pooled = jnp.stack([features.max(axis=1), features.mean(axis=1)], axis=-1)  # [B, W, 2]
        return Affine(name="output_norm")(pooled.reshape(mels.shape[0], -1))


def params(config: MusicnnConfig, tensors: Mapping[str, np.ndarray], where: str) -> dict[str, Any]:
    """Returns `Musicnn`'s 'params', float32, from the original's variables.

    Raises ValueError if a tensor is missing or has another shape; `where` names the file.
    """

    def read(name: str, number: int, part: str, *shape: int) -> np.ndarray:
        name = f"{name}_{number}" if number else name
        return read_tensor(tensors, f"{name}/{part}", shape, where, str(config))

    def norm(number: int, width: int) -> dict[str, np.ndarray]:
        gamma, beta, mean, variance = (
            read("batch_normalization", number, part, width)
            for part in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        scale = gamma / np.sqrt(variance + np.float32(TF_EPSILON))
        return {"scale": scale, "shift": beta - mean * scale}

    def layer(number: int, frames: int, bands: int, width: int) -> dict[str, Any]:
        kernel = read("conv2d", number, "kernel", frames, bands, 1, width)
        conv = {"kernel": kernel, "bias": read("conv2d", number, "bias", width)}
        return {"conv": conv, "norm": norm(number + 1, width)}

    # Layers are numbered in the order of the original's code.
    tree = {"input_norm": norm(0, 1)}
    for number, bands in enumerate(TIMBRAL_BANDS):
        tree[f"timbral_{bands}"] = layer(number, TIMBRAL_FRAMES, bands, config.timbral)
    for number, frames in enumerate(TEMPORAL_FRAMES, start=len(TIMBRAL_BANDS)):
        tree[f"temporal_{frames}"] = layer(number, frames, 1, config.temporal)
    first = len(TIMBRAL_BANDS) + len(TEMPORAL_FRAMES)
    front = len(TIMBRAL_BANDS) * config.timbral + len(TEMPORAL_FRAMES) * config.temporal
    for number in range(MIDDLE_LAYERS):
        width = config.middle if number else front
        middle = layer(first + number, MIDDLE_FRAMES, width, config.middle)
        middle["conv"]["kernel"] = middle["conv"]["kernel"][:, :, 0]
        tree[f"middle_{number}"] = middle
    tree["output_norm"] = norm(9, 2 * (front + MIDDLE_LAYERS * config.middle))
    return tree
