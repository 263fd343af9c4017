"""Random keys that depend only on (seed, step, global row).

So a row gets the same samples on any number of devices and in any batch, and a resumed run samples
what the uninterrupted one would have sampled. All keys are threefry, JAX's counter-based default.
"""

import enum

import jax
import jax.numpy as jnp


class Stream(enum.IntEnum):
    """Random streams of a run, one per use. A number is never reused.

    Attributes:
      GENERATION: clips generated from a user's seed.
      TRAINING: supervised training steps.
      VALIDATION: validation batches.
      ROLLOUT: clips that RL trains on.
      EVALUATION: clips on which policies are compared.
      VOTES: clips that listeners vote on.
      MONITOR: clips for the held-out judge.
      UNITS: clips of the base model that normalise rewards.
    """

    GENERATION = 0
    TRAINING = 1
    VALIDATION = 2
    ROLLOUT = 3
    EVALUATION = 4
    VOTES = 5
    MONITOR = 6
    UNITS = 7


def step_key(seed: int | jax.Array, step: int | jax.Array, stream: Stream | jax.Array) -> jax.Array:
    """Returns the key of one step in one stream."""
    number = stream if isinstance(stream, jax.Array) else int(stream)
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), step)


def row_keys(key: jax.Array, rows: int, first_row: int | jax.Array = 0) -> jax.Array:
    """Returns keys [rows], one for each global row first_row, first_row + 1, ... of a batch."""
    indices = first_row + jnp.arange(rows, dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, indices)
