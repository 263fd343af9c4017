"""The state of a training run, a plain pytree, and its optimiser."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from musicrl_jax.core.precision import layer_axes

# Updates in a row without a finite gradient before a run stops.
MOST_SKIPPED = 10


@flax.struct.dataclass
class TrainState:
    """Everything that a step reads and writes.

    Attributes:
      step: int32 [], number of batches so far.
      skipped: int32 [], updates skipped because a loss or gradient was not finite.
      in_a_row: int32 [], updates skipped since the last one applied.
      params: the trained weights.
      state: a module's other collections (moving-average codebooks, statistics); {} for most.
      opt_state: the optimiser's moments.
    """

    step: jax.Array
    skipped: jax.Array
    in_a_row: jax.Array
    params: Any
    state: Any
    opt_state: Any


def create_state(variables: Any, optimiser: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step, from a module's variables."""
    state = dict(variables)
    params = state.pop("params")
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, zero, zero, params, state, optimiser.init(params))


def apply_gradients(
    optimiser: optax.GradientTransformation, gradients: Any, opt_state: Any, params: Any
) -> tuple[Any, Any]:
    """Takes one step of the optimiser; returns params and opt_state."""
    # optax raises Python floats to integer powers, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimiser.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


@dataclasses.dataclass(frozen=True)
class Optimiser:
    """Adam with decoupled weight decay, a linear warm-up and a cosine decay.

    Attributes:
      learning_rate: at the peak.
      warmup_steps: steps of the linear rise to the peak; 0 starts at the peak.
      final_fraction: rate after the last step, as a fraction of the peak; 1 keeps it constant.
      b1, b2: Adam's decays.
      weight_decay: decoupled, on matrices only (not on biases, scales and temperatures).
      clip_norm: gradients are scaled down to this global norm.
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 10
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.98
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def schedule(self, steps: int) -> optax.Schedule:
        """Returns the learning rate as a function of the step, for a run of `steps`."""
        return optax.warmup_cosine_decay_schedule(
            self.learning_rate / (self.warmup_steps + 1),
            self.learning_rate,
            self.warmup_steps,
            max(steps, self.warmup_steps + 1),
            self.final_fraction * self.learning_rate,
        )

    def build(self, steps: int) -> optax.GradientTransformation:
        """Builds the optax chain for a run of `steps`."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.adamw(
                self.schedule(steps),
                self.b1,
                self.b2,
                weight_decay=self.weight_decay,
                mask=_matrices,
            ),
        )


def _matrices(params: Any) -> Any:
    """Returns a tree of True for matrices, False for other weights."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: layer_axes(path, leaf) > 1, params)
