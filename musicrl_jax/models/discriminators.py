"""Discriminators: networks that tell decoded clips from real ones while a codec is trained, and serve nothing after.

SoundStream's (2107.03312, section III-E): a MelGAN discriminator at several sample rates, and one on the complex STFT.
DAC's (2306.06546, section 3.3): one for each of several periods, and for each STFT window one that looks at five bands
apart. All convolutions have weight normalisation. Every discriminator returns the outputs of its layers, the last of
which are scores, one for each place in the clip: high for real.

Letters: B clips, N samples, S spectral frames, K frequency bins, D width.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from musicrl_jax.core import spectral

WAVE_STRIDES = (4, 4, 4, 4)  # MelGAN's
WAVE_KERNEL = 41
# Strides in time and in frequency, and widening, of each residual unit.
STFT_BLOCKS = ((1, 2, 2), (2, 2, 2), (1, 2, 1), (2, 2, 2), (1, 2, 1), (2, 2, 2))
BANDS = ((0.0, 0.1), (0.1, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))  # of the bins
SLOPE = 0.1  # of leaky rectifiers below 0

Layers = list[jax.Array]


@dataclasses.dataclass(frozen=True)
class DiscriminatorsConfig:
    """Which discriminators there are. SoundStream's by default; DAC's are periods (2, 3, 5, 7, 11) and band windows
    (2048, 1024, 512).
    """

    wave_scales: int = 3  # MelGAN discriminators, each at half the sample rate of the one before
    stft_windows: tuple[int, ...] = (1024,)  # samples; a hop is a quarter
    periods: tuple[int, ...] = ()  # samples
    band_windows: tuple[int, ...] = ()  # samples; a hop is a quarter
    channels: int = 32  # width of the first layer

    def __post_init__(self) -> None:
        for field in ("stft_windows", "periods", "band_windows"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if not (self.wave_scales or self.stft_windows or self.periods or self.band_windows):
            raise ValueError(
                "DiscriminatorsConfig names no discriminator: give one, or none to CodecObjective"
            )
        if self.channels < 4 or self.channels % 4:
            raise ValueError(
                f"DiscriminatorsConfig.channels = {self.channels} must be a multiple of 4"
            )


def _conv(features: int, kernel: tuple[int, ...], name: str, **options: Any) -> nn.Module:
    return nn.WeightNorm(nn.Conv(features, kernel, **options), name=name)


def spectrum(wav: jax.Array, window: int) -> jax.Array:
    """Complex STFT as two channels: [B, N] -> [B, S, K, 2]; Hann window, divided by its norm; hop a quarter."""
    hann = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(window) / window)
    frames = spectral.frames(wav, window, window // 4)  # [B, S, window]
    taper = jnp.broadcast_to(
        jnp.asarray(hann / np.sqrt(np.sum(np.square(hann))), jnp.float32), frames.shape
    )
    bins = jnp.fft.rfft(frames * taper, axis=-1)
    return jnp.stack([bins.real, bins.imag], axis=-1)


class Wave(nn.Module):
    """MelGAN's: a wide convolution, four strided ones in groups of four inputs, two narrow ones."""

    channels: int

    @nn.compact
    def __call__(self, wav: jax.Array) -> Layers:
        x = nn.leaky_relu(_conv(self.channels, (15,), "first")(wav[:, :, None]), SLOPE)
        layers = [x]
        for index, stride in enumerate(WAVE_STRIDES):
            width = min(4 * x.shape[-1], 64 * self.channels)
            groups = max(1, x.shape[-1] // 4)
            x = _conv(
                width,
                (WAVE_KERNEL,),
                f"down_{index}",
                strides=(stride,),
                feature_group_count=groups,
            )(x)
            x = nn.leaky_relu(x, SLOPE)
            layers.append(x)
        x = nn.leaky_relu(_conv(x.shape[-1], (5,), "middle")(x), SLOPE)
        return [*layers, x, _conv(1, (3,), "scores")(x)]


class STFT(nn.Module):
    """SoundStream's: residual units over time and frequency that halve one or both, then one score a time step."""

    channels: int
    window: int

    @nn.compact
    def __call__(self, wav: jax.Array) -> Layers:
        x = _conv(self.channels, (7, 7), "first")(
            spectrum(wav, self.window)[:, :, :-1]
        )  # [B, S, window / 2, D]
        layers = []
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
        padded = jnp.pad(wav, ((0, 0), (0, -wav.shape[1] % self.period)), mode="reflect")
        x = padded.reshape(wav.shape[0], -1, self.period, 1)
        layers = []
        for index, widening in enumerate((1, 4, 16, 32)):
            x = _conv(widening * self.channels, (5, 1), f"down_{index}", strides=(3, 1))(x)
            x = nn.leaky_relu(x, SLOPE)
            layers.append(x)
        x = nn.leaky_relu(_conv(x.shape[-1], (5, 1), "middle")(x), SLOPE)
        return [*layers, x, _conv(1, (3, 1), "scores")(x)]


class Bands(nn.Module):
    """DAC's: the complex STFT in five bands, each with convolutions of its own, joined for the scores."""

    channels: int
    window: int

    @nn.compact
    def __call__(self, wav: jax.Array) -> Layers:
        bins = spectrum(wav, self.window)
        count, layers, ends = bins.shape[2], [], []
        for band, (low, high) in enumerate(BANDS):
            x = bins[:, :, int(low * count) : int(high * count)]
            for index, stride in enumerate((1, 2, 2, 2)):
                x = nn.leaky_relu(
                    _conv(self.channels, (3, 9), f"down_{band}_{index}", strides=(1, stride))(x),
                    SLOPE,
                )
                layers.append(x)
            x = nn.leaky_relu(_conv(self.channels, (3, 3), f"last_{band}")(x), SLOPE)
            layers.append(x)
            ends.append(x)
        return [*layers, _conv(1, (3, 3), "scores")(jnp.concatenate(ends, axis=2))]


class Discriminators(nn.Module):
    """All that a config names: wav [B, N] -> the layers of each."""

    config: DiscriminatorsConfig

    @nn.compact
    def __call__(self, wav: jax.Array) -> list[Layers]:
        c = self.config
        found, slower = [], wav
        for scale in range(c.wave_scales):
            found.append(Wave(c.channels // 2, name=f"wave_{scale}")(slower))
            slower = nn.avg_pool(slower[:, :, None], (4,), (2,), "SAME", count_include_pad=False)[
                :, :, 0
            ]
        found += [STFT(c.channels, window, name=f"stft_{window}")(wav) for window in c.stft_windows]
        found += [Period(c.channels, period, name=f"period_{period}")(wav) for period in c.periods]
        found += [
            Bands(c.channels, window, name=f"bands_{window}")(wav) for window in c.band_windows
        ]
        return found
