"""Spectra of waveforms: short-time Fourier magnitudes, the mel filterbank and log-mel frames.

Everything is float32 and differentiable; the filterbank is NumPy and becomes a constant of the compiled function.

Letters: B clips, N samples, S spectral frames (N // hop), K frequency bins (window // 2 + 1), M mel bands.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

MIN_LOG_HZ = 1000.0  # The Slaney mel scale is linear up to here and logarithmic above.
HZ_PER_MEL = 200.0 / 3.0
LOG_STEP = np.log(6.4) / 27.0


def hz_to_mel(hz: np.ndarray) -> np.ndarray:
    """Mels on Slaney's scale, float64, any shape."""
    hz = np.asarray(hz, np.float64)
    above = MIN_LOG_HZ / HZ_PER_MEL + np.log(np.maximum(hz, MIN_LOG_HZ) / MIN_LOG_HZ) / LOG_STEP
    return np.where(hz < MIN_LOG_HZ, hz / HZ_PER_MEL, above)


def mel_to_hz(mel: np.ndarray) -> np.ndarray:
    """The inverse of `hz_to_mel`, float64, any shape."""
    mel = np.asarray(mel, np.float64)
    knee = MIN_LOG_HZ / HZ_PER_MEL
    return np.where(
        mel < knee, mel * HZ_PER_MEL, MIN_LOG_HZ * np.exp(LOG_STEP * (np.maximum(mel, knee) - knee))
    )


@functools.lru_cache(maxsize=64)
def mel_filterbank(
    sample_rate_hz: int, n_fft: int, n_mels: int, fmin: float = 0.0, fmax: float | None = None
) -> np.ndarray:
    """Triangular filters of unit area in Hz (Slaney), [n_fft // 2 + 1, n_mels] float32: `magnitude @ filters`.

    Equal to `librosa.filters.mel(...).T`. A band that is narrower than a bin may be all zeros (64 bands on a
    window of 64 samples has many); it is left so. The array is shared between callers and read-only.
    """
    top = sample_rate_hz / 2 if fmax is None else fmax
    bins = np.fft.rfftfreq(n_fft, 1.0 / sample_rate_hz)  # [K]
    edges = mel_to_hz(np.linspace(hz_to_mel(fmin), hz_to_mel(top), n_mels + 2))  # [M + 2]
    rising = (bins[:, None] - edges[None, :-2]) / np.diff(edges)[None, :-1]
    falling = (edges[None, 2:] - bins[:, None]) / np.diff(edges)[None, 1:]
    triangles = np.maximum(0.0, np.minimum(rising, falling))  # [K, M]
    filters = (triangles * (2.0 / (edges[2:] - edges[:-2]))[None, :]).astype(np.float32)
    filters.setflags(write=False)
    return filters


def frames(wav: jax.Array, window: int, hop: int) -> jax.Array:
    """Overlapping windows of wav [..., N]: [..., N // hop, window], no taper applied.

    Frame s is centred on the middle of hop s, sample s * hop + hop / 2, so spectral frames line up with codec and
    semantic frames of the same rate; outside the clip there are zeros. Built from slices, not a gather: compiles
    fast, and its gradient is additions. Raises ValueError when a hop is longer than the window or the clip.
    """
    samples = wav.shape[-1]
    if not 1 <= hop <= window:
        raise ValueError(
            f"hop = {hop} samples must lie in 1..window = {window}: samples between frames would be lost"
        )
    if samples < hop:
        raise ValueError(
            f"clip of {samples} samples is shorter than one hop of {hop}: give a longer clip"
        )
    count, blocks = samples // hop, -(-window // hop)
    left = (window - hop) // 2
    total = (count + blocks - 1) * hop
    edge = [(0, 0)] * (wav.ndim - 1)
    padded = jnp.pad(wav, [*edge, (left, max(0, total - left - samples))])[..., :total]
    hops = padded.reshape(*wav.shape[:-1], count + blocks - 1, hop)
    return jnp.concatenate([hops[..., b : b + count, :] for b in range(blocks)], axis=-1)[
        ..., :window
    ]


def stft_magnitude(wav: jax.Array, window: int, hop: int) -> jax.Array:
    """Hann-windowed Fourier magnitudes of wav [..., N]: [..., N // hop, window // 2 + 1] float32.

    Not normalised (a full-scale sine peaks at window / 4). The frames are those of `frames`. At silence the
    gradient is 0, not NaN. A NaN in a frame makes the frame NaN.
    """
    hann = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(window) / window)
    framed = frames(wav.astype(jnp.float32), window, hop)
    taper = jnp.broadcast_to(jnp.asarray(hann, jnp.float32), framed.shape)
    spectrum = jnp.fft.rfft(framed * taper, axis=-1)  # [..., S, K]
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    silent = power == 0.0  # not a NaN: that must not pass for silence
    return jnp.where(silent, 0.0, jnp.sqrt(jnp.where(silent, 1.0, power)))


def mel_magnitude(
    wav: jax.Array, sample_rate_hz: int, n_mels: int, window: int, hop: int
) -> jax.Array:
    """Mel-band magnitudes (not powers) of wav [..., N]: [..., N // hop, n_mels] float32."""
    filters = jnp.asarray(mel_filterbank(sample_rate_hz, window, n_mels))
    return jnp.matmul(
        stft_magnitude(wav, window, hop), filters, precision=jax.lax.Precision.HIGHEST
    )


def log_mel(
    wav: jax.Array, sample_rate_hz: int, n_mels: int, window: int, hop: int, floor: float = 1e-5
) -> jax.Array:
    """Natural log of mel magnitudes (not powers), floored: log(max(mel, floor)), [..., N // hop, n_mels] float32.

    20 / ln 10 = 8.686 times this is decibels. Bands under the floor pass no gradient.
    """
    return jnp.log(jnp.maximum(mel_magnitude(wav, sample_rate_hz, n_mels, window, hop), floor))
