"""What a codec's reconstruction is judged by, and how several such judgements are weighed against each other.

Letters: B clips, N samples, S spectral frames, M mel bands.
"""

import math

import jax
import jax.numpy as jnp

from musicrl_jax.core import spectral

MELS = 64
FLOOR = 1e-8  # of mel magnitudes, times the window: 1e-5 at 1024 samples, as in DAC
EPSILON = 1e-6
STFT_WINDOWS = (2048, 512)


def reconstruction(
    wav: jax.Array, decoded: jax.Array, sample_rate_hz: int, windows: tuple[int, ...]
) -> jax.Array:
    """Multi-scale spectral distance of decoded [B, N] to wav [B, N], [] (SoundStream, 2107.03312, equations 4 and 5).

    For each window s, with hop s / 4 and 64 mel bands: the L1 norm of the difference of mel magnitudes plus
    sqrt(s / 2) times the L2 norm of the difference of their logs. Norms run over the bands of a frame; frames, clips
    and windows are averaged (the paper sums), so the size does not grow with clip or list.
    """
    terms = []
    for window in windows:
        floor = FLOOR * window
        target = spectral.mel_magnitude(wav, sample_rate_hz, MELS, window, window // 4)  # [B, S, M]
        output = spectral.mel_magnitude(decoded, sample_rate_hz, MELS, window, window // 4)
        l1 = jnp.mean(jnp.sum(jnp.abs(target - output), -1))
        difference = jnp.log(jnp.maximum(target, floor)) - jnp.log(jnp.maximum(output, floor))
        log_l2 = jnp.mean(
            jnp.sqrt(jnp.sum(jnp.square(difference), -1) + EPSILON)
        )  # the root of 0 has no gradient
        terms.append(l1 + math.sqrt(window / 2) * log_l2)
    return sum(terms) / len(terms)


def mel_distance(wav: jax.Array, decoded: jax.Array, sample_rate_hz: int) -> jax.Array:
    """Mean absolute difference of natural log-mels (80 bands, window 1024, hop 256), float32 []; x 8.686 is dB."""
    target, output = (spectral.log_mel(x, sample_rate_hz, 80, 1024, 256) for x in (wav, decoded))
    return jnp.mean(jnp.abs(target - output))


def stft_distance(wav: jax.Array, decoded: jax.Array) -> jax.Array:
    """Multi-scale STFT distance, float32 []: the mean over windows of 2048 and 512 samples, hop a quarter, of the mean
    absolute difference of magnitudes plus that of the base-10 logs of powers, floored at 1e-5 (magnitude).

    DAC's validation metric (2306.06546, section 4) is the sum over the windows, twice this, of frames with reflected
    ends where ours have zeros.
    """
    total = jnp.zeros(())
    for window in STFT_WINDOWS:
        target, output = (spectral.stft_magnitude(x, window, window // 4) for x in (wav, decoded))
        logs = 2.0 * (jnp.log10(jnp.maximum(target, 1e-5)) - jnp.log10(jnp.maximum(output, 1e-5)))
        total += jnp.mean(jnp.abs(target - output)) + jnp.mean(jnp.abs(logs))
    return total / len(STFT_WINDOWS)


def si_sdr(wav: jax.Array, decoded: jax.Array) -> jax.Array:
    """Scale-invariant signal-to-distortion ratio of each clip in dB, [B]; higher is better (1811.02508). No mean is
    subtracted.
    """
    scale = jnp.sum(wav * decoded, -1) / (jnp.sum(jnp.square(wav), -1) + 1e-8)
    target = scale[:, None] * wav
    noise = decoded - target
    return 10.0 * jnp.log10(
        (jnp.sum(jnp.square(target), -1) + 1e-8) / (jnp.sum(jnp.square(noise), -1) + 1e-8)
    )


Features = list[
    list[jax.Array]
]  # of each discriminator, what its layers give; the last are its scores, high for real


def discriminator_hinge(real: Features, decoded: Features) -> jax.Array:
    """What discriminators minimise (2107.03312, equation 1), []: the mean over them of how far their scores are from
    1 or more for real and -1 or less for decoded clips.
    """
    terms = [
        jnp.mean(jax.nn.relu(1.0 - ours[-1])) + jnp.mean(jax.nn.relu(1.0 + theirs[-1]))
        for ours, theirs in zip(real, decoded, strict=True)
    ]
    return sum(terms) / len(terms)


def generator_hinge(decoded: Features) -> jax.Array:
    """What the codec minimises against them (equation 2), []: the mean of how far scores are from 1 or more."""
    return sum(jnp.mean(jax.nn.relu(1.0 - layers[-1])) for layers in decoded) / len(decoded)


def feature_distance(real: Features, decoded: Features) -> jax.Array:
    """Mean absolute difference of the discriminators' inner layers, averaged over layers and discriminators
    (equation 3), [].
    """
    terms = [
        jnp.mean(jnp.abs(ours - theirs))
        for real_layers, decoded_layers in zip(real, decoded, strict=True)
        for ours, theirs in zip(real_layers[:-1], decoded_layers[:-1], strict=True)
    ]
    return sum(terms) / len(terms)


BALANCE_DECAY = 0.99


def balanced(
    gradients: dict[str, jax.Array], weights: dict[str, float], norms: dict[str, jax.Array]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One gradient by the decoded wav [B, N] from those of several losses, and the moved norms: EnCodec's balancer
    (2210.13438, equation 4), whose averages are ten times as long.

    Each loss's gradient [B, N] is divided by the moving average of its norm (the mean over clips of a clip's
    Euclidean norm) and multiplied by the loss's share of the weights: a weight says how much of the pull a loss has,
    whatever its units. The result is that of a mean over clips: divided by B. `norms` are float32 [], 0 before a
    loss's first gradient that is not zero, which is taken whole; gradients of zero move no average, and losses that
    have had no other have no share yet.
    """
    moved, parts = {}, []
    for name, gradient in gradients.items():
        fresh = jnp.mean(jnp.linalg.norm(gradient, axis=-1))
        keep = jnp.where(norms[name] > 0.0, BALANCE_DECAY, 0.0)
        moved[name] = jnp.where(fresh > 0.0, keep * norms[name] + (1.0 - keep) * fresh, norms[name])
        parts.append(
            gradient * (weights[name] / gradient.shape[0] / jnp.maximum(moved[name], 1e-20))
        )
    total = sum(jnp.where(norm > 0.0, weights[name], 0.0) for name, norm in moved.items())
    return sum(parts) / jnp.maximum(total, 1e-20), moved
