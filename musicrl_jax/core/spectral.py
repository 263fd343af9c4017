"""Spectra of waveforms: short-time Fourier magnitudes, the mel filterbank and log-mel frames.

All functions of waveforms are float32 and differentiable. The filterbank is a NumPy constant.

Legend: N samples, S spectral frames (N // hop), K frequency bins (window // 2 + 1), M mel bands.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

# The Slaney mel scale is linear up to MIN_LOG_HZ and logarithmic above.
MIN_LOG_HZ = 1000.0
HZ_PER_MEL = 200.0 / 3.0
LOG_STEP = np.log(6.4) / 27.0


# --- The mel scale. ---


def hz_to_mel(hz: np.ndarray) -> np.ndarray:
    """Converts Hz to mels on Slaney's scale, float64, any shape."""
    hz = np.asarray(hz, np.float64)
    above = MIN_LOG_HZ / HZ_PER_MEL + np.log(np.maximum(hz, MIN_LOG_HZ) / MIN_LOG_HZ) / LOG_STEP
    return np.where(hz < MIN_LOG_HZ, hz / HZ_PER_MEL, above)


def mel_to_hz(mel: np.ndarray) -> np.ndarray:
    """Converts mels on Slaney's scale to Hz, float64, any shape."""
    mel = np.asarray(mel, np.float64)
    knee = MIN_LOG_HZ / HZ_PER_MEL
    above = MIN_LOG_HZ * np.exp(LOG_STEP * (np.maximum(mel, knee) - knee))
    return np.where(mel < knee, mel * HZ_PER_MEL, above)


@functools.lru_cache(maxsize=64)
def mel_filterbank(sample_rate_hz: int, n_fft: int, n_mels: int) -> np.ndarray:
    """Returns triangular filters of unit area in Hz (Slaney), f32 [K, M]: `magnitude @ filters`.

    Equal to `librosa.filters.mel(...).T`. The filter of a band narrower than a bin may be all
    zeros, as for 64 bands and a window of 64 samples. The array is cached and read-only.
    """
    # Triangles between neighbouring edges, which are equidistant in mels.
    bins = np.fft.rfftfreq(n_fft, 1.0 / sample_rate_hz)  # [K]
    edges = mel_to_hz(np.linspace(0.0, hz_to_mel(sample_rate_hz / 2), n_mels + 2))  # [M + 2]
    rising = (bins[:, None] - edges[None, :-2]) / np.diff(edges)[None, :-1]
    falling = (edges[None, 2:] - bins[:, None]) / np.diff(edges)[None, 1:]
    triangles = np.maximum(0.0, np.minimum(rising, falling))  # [K, M]
    filters = (triangles * (2.0 / (edges[2:] - edges[:-2]))[None, :]).astype(np.float32)
    filters.setflags(write=False)
    return filters


# --- Spectra. ---


def frames(wav: jax.Array, window: int, hop: int) -> jax.Array:
    """Cuts wav [..., N] into overlapping windows [..., S, window], without a taper.

    Frame s is centred on the middle of hop s, sample s * hop + hop / 2, so spectral frames align
    with codec and semantic frames of the same rate. The clip is padded with zeros. Slices, unlike a
    gather, compile fast, and their gradient is additions.

    Raises ValueError if a hop is longer than the window or the clip.
    """
    samples = wav.shape[-1]
    if not 1 <= hop <= window:
        raise ValueError(
            f"hop = {hop} samples must be in 1..window = {window}: samples between frames would be "
            "lost"
        )
    if samples < hop:
        raise ValueError(
            f"clip of {samples} samples is shorter than one hop of {hop}: give a longer clip"
        )
    count, blocks = samples // hop, -(-window // hop)
    # Zeros on both sides, so that the hops fill all frames.
    before, total = (window - hop) // 2, (count + blocks - 1) * hop
    edge = [(0, 0)] * (wav.ndim - 1)
    padded = jnp.pad(wav, [*edge, (before, max(0, total - before - samples))])[..., :total]
    # Slice b of the hops is block b of every frame.
    hops = padded.reshape(*wav.shape[:-1], count + blocks - 1, hop)
    slices = [hops[..., block : block + count, :] for block in range(blocks)]
    return jnp.concatenate(slices, axis=-1)[..., :window]


def stft_magnitude(wav: jax.Array, window: int, hop: int) -> jax.Array:
    """Returns Hann-windowed Fourier magnitudes f32 [..., S, K] of wav [..., N], over `frames`.

    Not normalised: a full-scale sine peaks at window / 4. At silence the gradient is 0, not NaN. A
    NaN in a frame makes the frame NaN.
    """
    # The periodic window, as in librosa and SciPy.
    hann = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(window) / window)
    framed = frames(wav.astype(jnp.float32), window, hop)
    taper = jnp.broadcast_to(jnp.asarray(hann, jnp.float32), framed.shape)
    spectrum = jnp.fft.rfft(framed * taper, axis=-1)  # [..., S, K]
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    silent = power == 0.0  # False for a NaN, which must not pass for silence
    return jnp.where(silent, 0.0, jnp.sqrt(jnp.where(silent, 1.0, power)))


def mel_magnitude(
    wav: jax.Array, sample_rate_hz: int, n_mels: int, window: int, hop: int
) -> jax.Array:
    """Returns mel-band magnitudes (not powers) f32 [..., S, M] of wav [..., N]."""
    filters = jnp.asarray(mel_filterbank(sample_rate_hz, window, n_mels))
    magnitude = stft_magnitude(wav, window, hop)
    return jnp.matmul(magnitude, filters, precision=jax.lax.Precision.HIGHEST)


def log_mel(
    wav: jax.Array, sample_rate_hz: int, n_mels: int, window: int, hop: int, floor: float = 1e-5
) -> jax.Array:
    """Returns log(max(mel, floor)) of mel magnitudes (not powers), natural log, f32 [..., S, M].

    Times 20 / ln 10 = 8.686 it is in decibels. Bands below the floor have no gradient.
    """
    return jnp.log(jnp.maximum(mel_magnitude(wav, sample_rate_hz, n_mels, window, hop), floor))
