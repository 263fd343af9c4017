"""What a codec's reconstruction is judged by.

Letters: B clips, N samples, S spectral frames, M mel bands.
"""

import math

import jax
import jax.numpy as jnp

from musicrl_jax.core import spectral

MELS = 64
FLOOR = 1e-5  # of mel magnitudes, times the window; about 55 dB under a full-scale tone at every window
EPSILON = 1e-6


def reconstruction(
    wav: jax.Array, decoded: jax.Array, sample_rate_hz: int, windows: tuple[int, ...]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Multi-scale spectral distance of decoded [B, N] to wav [B, N] (SoundStream, 2107.03312, equations 4 and 5).

    For each window s, with hop s / 4 and 64 mel bands: the L1 norm of the difference of mel magnitudes plus
    sqrt(s / 2) times the L2 norm of the difference of their logs. Norms run over the bands of a frame; frames, clips
    and windows are averaged (the paper sums), so the size does not grow with clip or list.
    Metrics: `spectral_l1`, `spectral_log` (before its weight).
    """
    l1_terms, log_terms, weighted = [], [], []
    for window in windows:
        floor = FLOOR * window  # much lower, and bands that nobody hears give most of the gradient
        target = spectral.mel_magnitude(wav, sample_rate_hz, MELS, window, window // 4)  # [B, S, M]
        output = spectral.mel_magnitude(decoded, sample_rate_hz, MELS, window, window // 4)
        l1 = jnp.mean(jnp.sum(jnp.abs(target - output), -1))
        difference = jnp.log(jnp.maximum(target, floor)) - jnp.log(jnp.maximum(output, floor))
        log_l2 = jnp.mean(jnp.sqrt(jnp.sum(jnp.square(difference), -1) + EPSILON))  # the root of 0 has no gradient
        l1_terms.append(l1)
        log_terms.append(log_l2)
        weighted.append(l1 + math.sqrt(window / 2) * log_l2)
    count = len(windows)
    return sum(weighted) / count, {"spectral_l1": sum(l1_terms) / count, "spectral_log": sum(log_terms) / count}


def mel_distance(wav: jax.Array, decoded: jax.Array, sample_rate_hz: int) -> jax.Array:
    """Mean absolute difference of natural log-mels (80 bands, window 1024, hop 256), float32 []; x 8.686 is dB."""
    target, output = (spectral.log_mel(x, sample_rate_hz, 80, 1024, 256) for x in (wav, decoded))
    return jnp.mean(jnp.abs(target - output))


def si_sdr(wav: jax.Array, decoded: jax.Array) -> jax.Array:
    """Scale-invariant signal-to-distortion ratio of each clip in dB, [B]; higher is better (1811.02508)."""
    scale = jnp.sum(wav * decoded, -1) / (jnp.sum(jnp.square(wav), -1) + 1e-8)
    target = scale[:, None] * wav
    noise = decoded - target
    return 10.0 * jnp.log10((jnp.sum(jnp.square(target), -1) + 1e-8) / (jnp.sum(jnp.square(noise), -1) + 1e-8))
