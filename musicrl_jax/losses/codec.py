"""Losses and distances of a codec's reconstruction, and the balance between several losses.

Legend: B clips, N samples, S spectral frames, M mel bands.
"""

import math

import jax
import jax.numpy as jnp

from musicrl_jax.core import spectral

MELS = 64
# Least mel magnitude per sample of the window: 1e-5 at 1024 samples, as in DAC.
FLOOR = 1e-8
# Added under a root, which has no gradient at 0.
EPSILON = 1e-6
STFT_WINDOWS = (2048, 512)
BALANCE_DECAY = 0.99

# The outputs of each discriminator's layers. The last ones are its scores, high for real clips.
Features = list[list[jax.Array]]


# --- distances ---


def reconstruction(
    wav: jax.Array, decoded: jax.Array, sample_rate_hz: int, windows: tuple[int, ...]
) -> jax.Array:
    """Computes SoundStream's multi-scale spectral loss (2107.03312, equations 4 and 5).

    For each window s, with hop s / 4 and 64 mel bands: the L1 norm of the difference of mel
    magnitudes, plus sqrt(s / 2) times the L2 norm of the difference of their logs. Norms are over
    the bands of a frame. Frames, clips and windows are averaged; the paper sums them.

    Args:
      wav: [B, N], the original.
      decoded: [B, N], the reconstruction.
      sample_rate_hz: of both.
      windows: in samples.

    Returns:
      float32 [].
    """
    terms = []
    for window in windows:
        # The distance of magnitudes.
        target, output = (
            spectral.mel_magnitude(x, sample_rate_hz, MELS, window, window // 4)  # [B, S, M]
            for x in (wav, decoded)
        )
        l1 = jnp.mean(jnp.sum(jnp.abs(target - output), -1))
        # The distance of logs.
        floor = FLOOR * window
        difference = jnp.log(jnp.maximum(target, floor)) - jnp.log(jnp.maximum(output, floor))
        log_l2 = jnp.mean(jnp.sqrt(jnp.sum(jnp.square(difference), -1) + EPSILON))
        terms.append(l1 + math.sqrt(window / 2) * log_l2)
    return sum(terms) / len(terms)


def mel_distance(wav: jax.Array, decoded: jax.Array, sample_rate_hz: int) -> jax.Array:
    """Averages absolute differences of natural log-mels (80 bands, window 1024, hop 256).

    Takes wav and decoded [B, N]; returns float32 []. Multiplied by 8.686 it is in dB.
    """
    target, output = (spectral.log_mel(x, sample_rate_hz, 80, 1024, 256) for x in (wav, decoded))
    return jnp.mean(jnp.abs(target - output))


def stft_distance(wav: jax.Array, decoded: jax.Array) -> jax.Array:
    """Computes the multi-scale STFT distance of wav and decoded [B, N]: float32 [].

    Averages over windows of 2048 and 512 samples, with a hop of a quarter. Each term is the mean
    absolute difference of magnitudes, plus that of base-10 logs of powers (magnitudes >= 1e-5).

    DAC's validation metric (2306.06546, section 4) sums the windows, so it is twice as large, and
    reflects a clip's ends where this pads with zeros.
    """
    total = jnp.zeros(())
    for window in STFT_WINDOWS:
        target, output = (spectral.stft_magnitude(x, window, window // 4) for x in (wav, decoded))
        logs = 2.0 * (jnp.log10(jnp.maximum(target, 1e-5)) - jnp.log10(jnp.maximum(output, 1e-5)))
        total += jnp.mean(jnp.abs(target - output)) + jnp.mean(jnp.abs(logs))
    return total / len(STFT_WINDOWS)


def si_sdr(wav: jax.Array, decoded: jax.Array) -> jax.Array:
    """Computes the scale-invariant signal-to-distortion ratio (1811.02508), without mean removal.

    Takes wav and decoded [B, N]; returns dB [B], higher is better.
    """
    scale = jnp.sum(wav * decoded, -1) / (jnp.sum(jnp.square(wav), -1) + 1e-8)
    target = scale[:, None] * wav
    signal = jnp.sum(jnp.square(target), -1) + 1e-8
    distortion = jnp.sum(jnp.square(decoded - target), -1) + 1e-8
    return 10.0 * jnp.log10(signal / distortion)


# --- adversarial losses (2107.03312) ---


def discriminator_hinge(real: Features, decoded: Features) -> jax.Array:
    """Computes the discriminators' loss (equation 1), []: real scores below 1, decoded above -1.

    Averages the excess over each discriminator's scores, then over discriminators.
    """
    terms = []
    for real_layers, decoded_layers in zip(real, decoded, strict=True):
        on_real = jnp.mean(jax.nn.relu(1.0 - real_layers[-1]))
        terms.append(on_real + jnp.mean(jax.nn.relu(1.0 + decoded_layers[-1])))
    return sum(terms) / len(terms)


def generator_hinge(decoded: Features) -> jax.Array:
    """Computes the generator's hinge loss (equation 2), []: mean of max(0, 1 - score)."""
    return sum(jnp.mean(jax.nn.relu(1.0 - layers[-1])) for layers in decoded) / len(decoded)


def feature_distance(real: Features, decoded: Features) -> jax.Array:
    """Averages absolute differences of the discriminators' inner layers (equation 3), []."""
    terms = []
    for real_layers, decoded_layers in zip(real, decoded, strict=True):
        for ours, theirs in zip(real_layers[:-1], decoded_layers[:-1], strict=True):
            terms.append(jnp.mean(jnp.abs(ours - theirs)))
    return sum(terms) / len(terms)


# --- balance ---


def balanced(
    gradients: dict[str, jax.Array], weights: dict[str, float], norms: dict[str, jax.Array]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Combines the gradients of several losses by EnCodec's balancer (2210.13438, equation 4).

    Each gradient is divided by a moving average of its norm, so a weight is a loss's share of the
    total, whatever its units. The averages are ten times as long as EnCodec's. A first gradient
    that is not zero sets its average. Zero gradients change no average; a loss that has had no
    other gradient yet has no share.

    Args:
      gradients: of each loss by the decoded wav, [B, N].
      weights: of each loss.
      norms: moving averages of the mean norm of a clip's gradient, float32 []; 0 at first.

    Returns:
      The combined gradient [B, N] of a mean over clips, and the new norms.
    """
    # Each loss's gradient, scaled by its average norm.
    averages, parts = {}, []
    for name, gradient in gradients.items():
        norm = jnp.mean(jnp.linalg.norm(gradient, axis=-1))
        decay = jnp.where(norms[name] > 0.0, BALANCE_DECAY, 0.0)
        average = decay * norms[name] + (1.0 - decay) * norm
        averages[name] = jnp.where(norm > 0.0, average, norms[name])
        scale = weights[name] / gradient.shape[0] / jnp.maximum(averages[name], 1e-20)
        parts.append(gradient * scale)
    # Losses without a gradient yet do not count.
    total = sum(jnp.where(norm > 0.0, weights[name], 0.0) for name, norm in averages.items())
    return sum(parts) / jnp.maximum(total, 1e-20), averages
