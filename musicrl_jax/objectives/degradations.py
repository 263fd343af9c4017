"""Known damage to clips, and a pseudo-MOS from the distance to the clean clip.

The quality regressor learns from this without any rated audio. A clip is damaged in one of six
ways, or not at all, by a strength in [0, 1]. Its label is

    pseudo-MOS = 1 + 4 * exp(-d / d0),    d0 = 12 dB,

with d the mean absolute difference of clean and damaged log-mels in decibels, over two resolutions.
It is no opinion of people: it measures how far a clip is from the clean one, not how annoying that
is.

Everything runs on the device and depends on its key alone. `degrade` returns clips of strength 0
unchanged.

Legend: B clips, N samples, Q codec levels, S spectral frames, M mel bands, W windows of a dropout.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from musicrl_jax.core import spectral

# --- constants ---

KINDS = ("clean", "codec", "noise", "band_limit", "clipping", "dropouts", "wow")

# d0: a codec of few levels, at about 11 dB, is in the middle of the scale.
DISTANCE_SCALE_DB = 12.0
DISTANCE_WINDOWS = (512, 2048)
DISTANCE_MELS = 64
DISTANCE_RANGE = 1e-3  # bands 60 dB below the clean clip's loudest band count as silent

WEAKEST_NOISE_DB = 40.0  # signal-to-noise ratio; the strongest noise has 0 dB
LOWEST_CUTOFF_HZ = 500.0
BAND_LIMIT_ORDER = 8
DEEPEST_CLIPPING_DB = 30.0  # below the clip's peak
DROPOUT_MS = 50
WIDEST_WOW = 0.06  # of the speed: one semitone up and down
WOW_HZ = 4.0

Codec = Callable[[jax.Array, jax.Array], jax.Array]


# --- kinds of damage ---


def noise(key: jax.Array, wav: jax.Array, strength: jax.Array) -> jax.Array:
    """Adds white noise, at a signal-to-noise ratio of 40 dB (strength 0) to 0 dB (strength 1)."""
    hiss = jax.random.normal(key, wav.shape)
    ratio_db = WEAKEST_NOISE_DB * (1.0 - strength)  # [B]
    gain = _rms(wav) / _rms(hiss) * 10.0 ** (-ratio_db / 20.0)
    return wav + gain[:, None] * hiss


def band_limit(wav: jax.Array, strength: jax.Array, sample_rate_hz: int) -> jax.Array:
    """Filters out all above a cutoff (-3 dB), which falls geometrically from Nyquist to 500 Hz.

    The slope is 48 dB an octave, the phase zero.
    """
    # A Butterworth filter's magnitude, applied to the spectrum.
    nyquist = sample_rate_hz / 2
    cutoff = nyquist * (LOWEST_CUTOFF_HZ / nyquist) ** strength  # [B]
    hz = jnp.fft.rfftfreq(wav.shape[1], 1 / sample_rate_hz)
    power = 1.0 / (1.0 + (hz[None, :] / cutoff[:, None]) ** (2 * BAND_LIMIT_ORDER))
    return jnp.fft.irfft(jnp.fft.rfft(wav) * jnp.sqrt(power).astype(jnp.complex64), n=wav.shape[1])


def clipping(wav: jax.Array, strength: jax.Array) -> jax.Array:
    """Cuts peaks off at 0 to 30 dB below the highest, and restores the RMS of the original.

    The peak never rises.
    """
    # The gain is at least 1, since clipping lowers the RMS.
    limit = jnp.max(jnp.abs(wav), axis=1) * 10.0 ** (-DEEPEST_CLIPPING_DB * strength / 20.0)  # [B]
    cut = jnp.clip(wav, -limit[:, None], limit[:, None])
    return cut * (_rms(wav) / jnp.maximum(_rms(cut), 1e-9))[:, None]


def dropouts(key: jax.Array, wav: jax.Array, strength: jax.Array, sample_rate_hz: int) -> jax.Array:
    """Silences windows of 50 ms, each with probability `strength`."""
    length = sample_rate_hz * DROPOUT_MS // 1000
    draws = jax.random.uniform(key, (wav.shape[0], -(-wav.shape[1] // length)))  # [B, W]
    audible = jnp.repeat(draws >= strength[:, None], length, axis=1)[:, : wav.shape[1]]
    return jnp.where(audible, wav, 0.0)


def wow(key: jax.Array, wav: jax.Array, strength: jax.Array, sample_rate_hz: int) -> jax.Array:
    """Varies the speed by up to 6 %, four times a second, from a random phase.

    Resamples linearly at n + a sin(...).
    """
    # Where each output sample is read, f32 [B, N].
    sway = 2.0 * jnp.pi * WOW_HZ / sample_rate_hz  # radians a sample
    phase = jax.random.uniform(key, (wav.shape[0], 1), maxval=2.0 * jnp.pi)
    place = jnp.arange(wav.shape[1], dtype=jnp.float32)[None, :]  # [1, N]
    shift = WIDEST_WOW * strength[:, None] / sway * jnp.sin(sway * place + phase)  # [B, N] samples
    place = jnp.clip(place + shift, 0.0, wav.shape[1] - 1.0)
    # Linear interpolation between two samples.
    index = jnp.minimum(place.astype(jnp.int32), wav.shape[1] - 2)
    fraction = place - index.astype(jnp.float32)
    before = jnp.take_along_axis(wav, index, axis=1)
    after = jnp.take_along_axis(wav, index + 1, axis=1)
    return before + fraction * (after - before)


def remaining_levels(strength: jax.Array, levels: int) -> jax.Array:
    """Returns the number of codec levels to decode, int32 [B]: Q below strength 1/Q, 1 at 1."""
    return jnp.clip(levels - jnp.floor(strength * levels).astype(jnp.int32), 1, levels)


# --- damage and label ---


def degrade(
    key: jax.Array, wav: jax.Array, strength: jax.Array, sample_rate_hz: int, codec: Codec
) -> jax.Array:
    """Returns damaged clips [B, N] of wav [B, N], for strengths [B] in [0, 1].

    Row i gets kind i mod 7 of KINDS. Since batches have a random order, this is as good as a random
    choice. It is balanced, and computes each kind of damage for its own rows only.
    `codec(wav, strength)` encodes and decodes clips.
    """
    # Each kind has its own key.
    keys = dict(zip(KINDS, jax.random.split(key, len(KINDS)), strict=True))
    damage = {
        "clean": lambda wav, strength: wav,
        "codec": codec,
        "noise": lambda wav, strength: noise(keys["noise"], wav, strength),
        "band_limit": lambda wav, strength: band_limit(wav, strength, sample_rate_hz),
        "clipping": clipping,
        "dropouts": lambda wav, strength: dropouts(keys["dropouts"], wav, strength, sample_rate_hz),
        "wow": lambda wav, strength: wow(keys["wow"], wav, strength, sample_rate_hz),
    }
    # Rows of one kind are damaged together.
    damaged = wav
    for index, name in enumerate(KINDS[: wav.shape[0]]):
        rows = slice(index, None, len(KINDS))
        damaged = damaged.at[rows].set(damage[name](wav[rows], strength[rows]))
    return jnp.where(strength[:, None] > 0, damaged, wav)


def distance(clean: jax.Array, degraded: jax.Array, sample_rate_hz: int) -> jax.Array:
    """Returns the mean absolute difference of log-mels in decibels, f32 [B].

    It is averaged over windows of 512 and 2048 samples. Levels more than 60 dB below the clean
    clip's loudest band are first raised to that floor, so that inaudible damage does not count.
    """
    total = 0.0
    for window in DISTANCE_WINDOWS:
        first, second = (
            spectral.mel_magnitude(wav, sample_rate_hz, DISTANCE_MELS, window, window // 4)
            for wav in (clean, degraded)
        )  # [B, S, M]
        # The same floor for both clips, at least 1e-5 for silent ones.
        floor = jnp.maximum(DISTANCE_RANGE * jnp.max(first, axis=(1, 2), keepdims=True), 1e-5)
        first, second = (jnp.log10(jnp.maximum(mels, floor)) for mels in (first, second))
        gap = 20.0 * jnp.abs(first - second)
        total = total + jnp.mean(gap, axis=(1, 2)) / len(DISTANCE_WINDOWS)
    return total


def pseudo_mos(clean: jax.Array, degraded: jax.Array, sample_rate_hz: int) -> jax.Array:
    """Returns 1 + 4 exp(-distance / 12 dB), f32 [B] in (1, 5]; 5 for equal clips."""
    return 1.0 + 4.0 * jnp.exp(-distance(clean, degraded, sample_rate_hz) / DISTANCE_SCALE_DB)


def _rms(wav: jax.Array) -> jax.Array:
    """Returns the root mean square of each clip, [B]."""
    return jnp.sqrt(jnp.mean(jnp.square(wav), axis=1))
