"""Sampling from categorical distributions with two random numbers each.

`jax.random.categorical` needs a random number for every code. On a CPU these take longer than the
products of a small policy.

Legend: V codes, in R runs of N each.
"""

import math

import jax
import jax.numpy as jnp


def sample_codes(log_probs: jax.Array, uniforms: jax.Array) -> jax.Array:
    """Samples codes by inverting cumulative distributions.

    The first number picks a run of about sqrt(V) codes, the second a code within the run. Each has
    2^23 values, so frequencies of runs, and of codes within a run, are exact to some 1e-7. A code
    of probability 0 is never sampled.

    Args:
      log_probs: f32 [..., V]; -inf for codes that must not be sampled.
      uniforms: f32 [..., 2] in [0, 1), as from `jax.random.uniform`.

    Returns:
      int32 [...]. Code 0 if all probabilities are NaN.
    """
    codes = log_probs.shape[-1]
    size = math.isqrt(codes - 1) + 1
    padding = [(0, 0)] * (log_probs.ndim - 1) + [(0, -codes % size)]
    runs = jnp.pad(jnp.exp(log_probs), padding).reshape(*log_probs.shape[:-1], -1, size)
    run = _pick(runs.sum(axis=-1), uniforms[..., 0])
    inside = jnp.take_along_axis(runs, run[..., None, None], axis=-2)[..., 0, :]  # [..., N]
    return run * size + _pick(inside, uniforms[..., 1])


def _pick(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Returns indices with probabilities in proportion to weights: [..., N], [...] -> int32 [...].

    It is the last positive weight that starts at or below the share `uniform` of the sum. The first
    one starts at exactly 0, so rounding never leads to a weight of 0.
    """
    index = jnp.arange(weights.shape[-1], dtype=jnp.int32)
    before = (index[:, None] < index[None, :]).astype(weights.dtype)
    starts = jnp.matmul(weights, before, precision=jax.lax.Precision.HIGHEST)
    reached = starts <= (uniform * weights.sum(axis=-1))[..., None]
    index = jnp.broadcast_to(index, weights.shape)
    return jnp.where(reached & (weights > 0), index, 0).max(axis=-1)
