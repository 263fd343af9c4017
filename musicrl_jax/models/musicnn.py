"""musicnn (Pons et al. 2018, 1711.02520; Pons and Serra 2019, 1909.06654): a music tagger's ear as MuLan's audio tower.

Filters as tall as a timbre and as wide as a rhythm look at a log-mel spectrogram, three layers with shortcuts look at
what they found, and the largest and the mean activation over time are what comes out. Convolutions are followed by
ReLU and then by batch normalisation, which is taken at its inference statistics: a scale and a shift a channel, weights
like others. The names of the packaged weights (`tensors`) are TensorFlow's, with the batch normalisations unfolded.

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

SAMPLE_RATE_HZ = 16_000
MELS = 96
HOP = 256
WINDOW = 2 * HOP
TIMBRAL_BANDS = (38, 67)  # 0.4 and 0.7 of all
TIMBRAL_FRAMES = 7
TEMPORAL_FRAMES = (128, 64, 32)
MIDDLE_FRAMES = 7
MIDDLE_LAYERS = 3
TF_EPSILON = 1e-3  # of TensorFlow's batch normalisation
CROSSINGS = 10  # zero crossings of the resampling filter's sinc on each side


@dataclasses.dataclass(frozen=True)
class MusicnnConfig:
    """Size of the network; the defaults are those of the packaged MSD_musicnn.

    Attributes:
        timbral: channels of each of the two timbral filters.
        temporal: channels of each of the three temporal filters.
        middle: channels of each of the three layers after them.
    """

    timbral: int = 204
    temporal: int = 51
    middle: int = 64

    def __post_init__(self):
        if min(self.timbral, self.temporal, self.middle) < 1:
            raise ValueError(
                f"timbral = {self.timbral}, temporal = {self.temporal} and middle = {self.middle} must be at least 1"
            )


def at_16_khz(wav: jax.Array, sample_rate_hz: int) -> jax.Array:
    """[B, N] at any rate -> [B, ceil(16000 N / rate)] at 16 kHz, which is all that the network knows.

    The same filter as `scipy.signal.resample_poly`: a sinc under a Kaiser window that cuts at the lower Nyquist rate.
    """
    if sample_rate_hz == SAMPLE_RATE_HZ:
        return wav
    import scipy.signal  # takes as long to import as JAX, and many a system has no use for it

    divisor = math.gcd(sample_rate_hz, SAMPLE_RATE_HZ)
    up, down = SAMPLE_RATE_HZ // divisor, sample_rate_hz // divisor
    half = CROSSINGS * max(up, down)
    kernel = up * scipy.signal.firwin(2 * half + 1, 1 / max(up, down), window=("kaiser", 5.0))
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
    """[B, N] at 16 kHz in [-1, 1] -> log10(1 + 10000 P) of the mel powers P, [B, N // 256 + 1, 96] float32.

    Frame s is centred on sample 256 s and the clip is mirrored at its ends, as librosa did when the weights were
    trained; the original rounds P to float16, this does not. ValueError where the clip has no 257 samples to mirror.
    """
    samples = wav.shape[-1]
    if samples <= HOP:
        raise ValueError(
            f"a clip of {samples} samples is too short for musicnn: give at least {HOP + 1}"
        )
    count = samples // HOP + 1
    padded = jnp.pad(wav.astype(jnp.float32), ((0, 0), (HOP, HOP)), mode="reflect")
    hops = padded[:, : (count + 1) * HOP].reshape(wav.shape[0], count + 1, HOP)
    framed = jnp.concatenate([hops[:, :-1], hops[:, 1:]], axis=-1)  # [B, S, 512]
    hann = jnp.asarray(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW), jnp.float32)
    spectrum = jnp.fft.rfft(framed * hann[None, None, :], axis=-1)
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    filters = jnp.asarray(spectral.mel_filterbank(SAMPLE_RATE_HZ, WINDOW, MELS))
    return jnp.log10(1 + 10_000 * jnp.matmul(power, filters, precision=jax.lax.Precision.HIGHEST))


class Affine(nn.Module):
    """x * scale + shift, one of each a channel: batch normalisation that no longer looks at the batch."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, width)
        shift = self.param("shift", nn.initializers.zeros, width)
        return x * jnp.expand_dims(scale, range(x.ndim - 1)) + jnp.expand_dims(
            shift, range(x.ndim - 1)
        )


class Filter(nn.Module):
    """Convolution over `kernel` (frames, or frames and bands), zeros around in time, then ReLU and `Affine`."""

    width: int
    kernel: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        before = (self.kernel[0] - 1) // 2
        padding = [(before, self.kernel[0] - 1 - before), *[(0, 0)] * (len(self.kernel) - 1)]
        x = nn.Conv(self.width, self.kernel, padding=padding, name="conv")(x)
        return Affine(name="norm")(nn.relu(x))


class Musicnn(nn.Module):
    """Log-mels [B, S, 96] -> [B, 2 W]: each feature's maximum and mean over time, normalised.

    W = 2 timbral + 3 temporal + 3 middle, and maximum and mean of a feature stand side by side. Any number of frames
    will do; the packaged weights were trained on 187, which are 3 s.
    """

    config: MusicnnConfig

    @nn.compact
    def __call__(self, mels: jax.Array) -> jax.Array:
        c = self.config
        x = Affine(name="input_norm")(mels[..., None])  # [B, S, M, 1]
        found = [
            Filter(c.timbral, (TIMBRAL_FRAMES, bands), name=f"timbral_{bands}")(x)
            for bands in TIMBRAL_BANDS
        ]
        found += [
            Filter(c.temporal, (frames, 1), name=f"temporal_{frames}")(x)
            for frames in TEMPORAL_FRAMES
        ]
        layers = [
            jnp.concatenate([part.max(axis=2) for part in found], axis=-1)
        ]  # [B, S, 2 timbral + 3 temporal]
        for layer in range(MIDDLE_LAYERS):
            x = Filter(c.middle, (MIDDLE_FRAMES,), name=f"middle_{layer}")(layers[-1])
            layers.append(x if layer == 0 else layers[-1] + x)
        features = jnp.concatenate(layers, axis=-1)  # [B, S, W]
        pooled = jnp.stack([features.max(axis=1), features.mean(axis=1)], axis=-1)  # [B, W, 2]
        return Affine(name="output_norm")(pooled.reshape(mels.shape[0], -1))


def params(config: MusicnnConfig, tensors: Mapping[str, np.ndarray], where: str) -> dict[str, Any]:
    """`Musicnn`'s 'params', float32, from the original's variables; ValueError that names one missing or misshapen."""

    def take(name: str, *shape: int) -> np.ndarray:
        if name not in tensors:
            raise ValueError(f"{where} is no musicnn: it has no tensor {name}")
        if tensors[name].shape != shape:
            raise ValueError(
                f"{where}: {name} has the shape {tensors[name].shape}, {config} needs {shape}"
            )
        return np.asarray(tensors[name], np.float32)

    def norm(number: int, width: int) -> dict[str, np.ndarray]:
        name = f"batch_normalization_{number}" if number else "batch_normalization"
        gamma, beta, mean, variance = (
            take(f"{name}/{part}", width)
            for part in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        scale = gamma / np.sqrt(variance + np.float32(TF_EPSILON))
        return {"scale": scale, "shift": beta - mean * scale}

    def layer(number: int, frames: int, bands: int, width: int) -> dict[str, Any]:
        name = f"conv2d_{number}" if number else "conv2d"
        conv = {
            "kernel": take(f"{name}/kernel", frames, bands, 1, width),
            "bias": take(f"{name}/bias", width),
        }
        return {"conv": conv, "norm": norm(number + 1, width)}

    tree = {"input_norm": norm(0, 1)}
    for number, bands in enumerate(TIMBRAL_BANDS):
        tree[f"timbral_{bands}"] = layer(number, TIMBRAL_FRAMES, bands, config.timbral)
    for number, frames in enumerate(TEMPORAL_FRAMES, start=len(TIMBRAL_BANDS)):
        tree[f"temporal_{frames}"] = layer(number, frames, 1, config.temporal)
    bands = len(TIMBRAL_BANDS) * config.timbral + len(TEMPORAL_FRAMES) * config.temporal
    for number in range(MIDDLE_LAYERS):
        first = number + len(TIMBRAL_BANDS) + len(TEMPORAL_FRAMES)
        middle = layer(first, MIDDLE_FRAMES, bands if number == 0 else config.middle, config.middle)
        middle["conv"]["kernel"] = middle["conv"]["kernel"][:, :, 0]
        tree[f"middle_{number}"] = middle
    tree["output_norm"] = norm(9, 2 * (bands + MIDDLE_LAYERS * config.middle))
    return tree
