"""Discriminators: networks that tell decoded clips from real ones, only while a codec is trained.

SoundStream's (2107.03312, section III-E): a MelGAN discriminator at several sample rates, and one
on the complex STFT. DAC's (2306.06546, section 3.3): one for each of several periods, and one for
each STFT window that processes five bands separately. All convolutions have weight normalisation.
Each discriminator returns the outputs of its layers. The last ones are scores, one for each place
of the clip: high for real.

Legend: B clips, N samples, S spectral frames, K frequency bins, D width.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from musicrl_jax.core import spectral

# MelGAN's strides.
WAVE_STRIDES = (4, 4, 4, 4)
WAVE_KERNEL = 41
# Stride in time, stride in frequency and factor of the width, of each residual unit.
STFT_BLOCKS = ((1, 2, 2), (2, 2, 2), (1, 2, 1), (2, 2, 2), (1, 2, 1), (2, 2, 2))
# Ends of DAC's bands, as shares of the bins.
BANDS = ((0.0, 0.1), (0.1, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))
# Slope of leaky rectifiers below 0.
SLOPE = 0.1

Layers = list[jax.Array]


@dataclasses.dataclass(frozen=True)
class DiscriminatorsConfig:
    """The set of discriminators; SoundStream's by default.

    DAC's have periods (2, 3, 5, 7, 11) and band windows (2048, 1024, 512).

    Attributes:
      wave_scales: number of MelGAN discriminators, each at half the sample rate of the one before.
      stft_windows: in samples; a hop is a quarter.
      periods: in samples.
      band_windows: in samples; a hop is a quarter.
      channels: width of the first layer.
    """

    wave_scales: int = 3
    stft_windows: tuple[int, ...] = (1024,)
    periods: tuple[int, ...] = ()
    band_windows: tuple[int, ...] = ()
    channels: int = 32

    def __post_init__(self) -> None:
        for field in ("stft_windows", "periods", "band_windows"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if not (self.wave_scales or self.stft_windows or self.periods or self.band_windows):
            raise ValueError(
                "DiscriminatorsConfig has no discriminator: add one, or give CodecObjective none"
            )
        if self.channels < 4 or self.channels % 4:
            raise ValueError(
                f"DiscriminatorsConfig.channels = {self.channels} must be a multiple of 4"
            )


def _conv(features: int, kernel: tuple[int, ...], name: str, **options: Any) -> nn.Module:
    return nn.WeightNorm(nn.Conv(features, kernel, **options), name=name)


def _rectified(x: jax.Array) -> jax.Array:
    return nn.leaky_relu(x, SLOPE)


def spectrum(wav: jax.Array, window: int) -> jax.Array:
    """Computes the complex STFT as two channels: [B, N] -> [B, S, K, 2]; a hop is a quarter.

    The window is Hann's, divided by its norm.
    """
    hann = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(window) / window)
    taper = jnp.asarray(hann / np.sqrt(np.sum(np.square(hann))), jnp.float32)
    frames = spectral.frames(wav, window, window // 4)  # [B, S, window]
    bins = jnp.fft.rfft(frames * taper[None, None], axis=-1)
    return jnp.stack([bins.real, bins.imag], axis=-1)


class Wave(nn.Module):
    """MelGAN's: a wide convolution, four strided ones in groups of four inputs, two narrow ones."""

    channels: int

    @nn.compact
    def __call__(self, wav: jax.Array) -> Layers:
        """Returns the outputs of all layers for wav [B, N]; the last are the scores."""
        layers = [_rectified(_conv(self.channels, (15,), "first")(wav[:, :, None]))]
        for index, stride in enumerate(WAVE_STRIDES):
            inputs = layers[-1].shape[-1]
            width, options = min(4 * inputs, 64 * self.channels), {"strides": (stride,)}
            options["feature_group_count"] = max(1, inputs // 4)
            conv = _conv(width, (WAVE_KERNEL,), f"down_{index}", **options)
            layers.append(_rectified(conv(layers[-1])))
        x = _rectified(_conv(layers[-1].shape[-1], (5,), "middle")(layers[-1]))
        return [*layers, x, _conv(1, (3,), "scores")(x)]


class STFT(nn.Module):
    """SoundStream's STFT discriminator: gives one score per time step.

    Its residual units halve time, frequency or both.
    """

    channels: int
    window: int

    @nn.compact
    def __call__(self, wav: jax.Array) -> Layers:
        """Returns the outputs of all layers for wav [B, N]; the last are the scores."""
        bins = spectrum(wav, self.window)[:, :, :-1]
        x, layers = _conv(self.channels, (7, 7), "first")(bins), []  # [B, S, window / 2, D]
        for index, (time, frequency, widening) in enumerate(STFT_BLOCKS):
            strides, width = (time, frequency), x.shape[-1] * widening
            h = nn.elu(_conv(x.shape[-1], (3, 3), f"same_{index}")(nn.elu(x)))
            h = _conv(width, (time + 2, frequency + 2), f"down_{index}", strides=strides)(h)
            x = h + _conv(width, (1, 1), f"around_{index}", strides=strides)(x)
            layers.append(x)
        return [*layers, _conv(1, (1, x.shape[2]), "scores", padding="VALID")(nn.elu(x))]


class Period(nn.Module):
    """DAC's and HiFi-GAN's: every p-th sample in a column, convolutions along the columns."""

    channels: int
    period: int

    @nn.compact
    def __call__(self, wav: jax.Array) -> Layers:
        """Returns the outputs of all layers for wav [B, N]; the last are the scores."""
        padded = jnp.pad(wav, ((0, 0), (0, -wav.shape[1] % self.period)), mode="reflect")
        x, layers = padded.reshape(wav.shape[0], -1, self.period, 1), []
        for index, widening in enumerate((1, 4, 16, 32)):
            conv = _conv(widening * self.channels, (5, 1), f"down_{index}", strides=(3, 1))
            x = _rectified(conv(x))
            layers.append(x)
        x = _rectified(_conv(x.shape[-1], (5, 1), "middle")(x))
        return [*layers, x, _conv(1, (3, 1), "scores")(x)]


class Bands(nn.Module):
    """DAC's: the complex STFT in five bands with separate convolutions, joined for the scores."""

    channels: int
    window: int

    @nn.compact
    def __call__(self, wav: jax.Array) -> Layers:
        """Returns the outputs of all layers for wav [B, N]; the last are the scores."""
        bins = spectrum(wav, self.window)
        count, layers, ends = bins.shape[2], [], []
        for band, (low, high) in enumerate(BANDS):
            x = bins[:, :, int(low * count) : int(high * count)]
            for index, stride in enumerate((1, 2, 2, 2)):
                conv = _conv(self.channels, (3, 9), f"down_{band}_{index}", strides=(1, stride))
                x = _rectified(conv(x))
                layers.append(x)
            x = _rectified(_conv(self.channels, (3, 3), f"last_{band}")(x))
            layers.append(x)
            ends.append(x)
        return [*layers, _conv(1, (3, 3), "scores")(jnp.concatenate(ends, axis=2))]


class Discriminators(nn.Module):
    """All discriminators of a config."""

    config: DiscriminatorsConfig

    @nn.compact
    def __call__(self, wav: jax.Array) -> list[Layers]:
        """Returns the layers of each discriminator for wav [B, N]."""
        c, outputs, slower = self.config, [], wav[:, :, None]
        # MelGAN's, each at half the sample rate of the one before.
        for scale in range(c.wave_scales):
            outputs.append(Wave(c.channels // 2, name=f"wave_{scale}")(slower[:, :, 0]))
            slower = nn.avg_pool(slower, (4,), (2,), "SAME", count_include_pad=False)
        # The other kinds, all at the full sample rate.
        kinds = (
            (STFT, "stft", c.stft_windows),
            (Period, "period", c.periods),
            (Bands, "bands", c.band_windows),
        )
        for kind, name, samples in kinds:
            outputs += [kind(c.channels, count, name=f"{name}_{count}")(wav) for count in samples]
        return outputs
