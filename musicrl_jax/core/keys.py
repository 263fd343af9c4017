"""Random keys that depend on (seed, step, global row) alone.

A row's samples are then the same on any number of devices and under any batching, and a resumed run draws what the
uninterrupted one would have drawn. All keys are threefry, JAX's counter-based default.
"""

import jax
import jax.numpy as jnp


def step_key(seed: int, step: int | jax.Array, stream: int = 0) -> jax.Array:
    """The key of one step. `stream` keeps apart the uses that a step has for randomness (0, 1, ...)."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), step)


def row_keys(key: jax.Array, rows: int, first_row: int = 0) -> jax.Array:
    """Keys [rows], one for each global row first_row, first_row + 1, ... of a batch."""
    indices = first_row + jnp.arange(rows, dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, indices)
