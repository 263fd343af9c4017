"""Cross-entropy of token models."""

import jax
import jax.numpy as jnp
import optax


def cross_entropy(
    logits: jax.Array, tokens: jax.Array, weights: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Averages nats per token over the tokens of weight 1.

    Args:
      logits: f32 [..., V].
      tokens: int32 [...].
      weights: f32 [...], 0 or 1; None for all ones.

    Returns:
      The loss f32 [], and metrics: accuracy of the most likely code.
    """
    weights = jnp.ones(tokens.shape, jnp.float32) if weights is None else weights
    total = jnp.maximum(weights.sum(), 1.0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
    hits = (logits.argmax(axis=-1) == tokens).astype(jnp.float32)
    return (losses * weights).sum() / total, {"accuracy": (hits * weights).sum() / total}
