"""The state of a training run: a plain pytree, and the optimiser that moves it."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

LOOKED_UP = "table", "place", "relative"  # the ends of names of weights that are indexed and not multiplied
LAYERS = "layers"  # the name over weights that hold those of all layers, one behind the other along a first axis
MOST_SKIPPED = 10  # updates in a row without a finite gradient, before a run gives up


@flax.struct.dataclass
class TrainState:
    """Everything a step reads and writes.

    Attributes:
      step: int32 [], the batches seen.
      skipped: int32 [], those whose update was left out because a loss or gradient was not finite.
      in_a_row: int32 [], how many of these came last.
      params: the trained weights.
      state: the other collections of a module (codebooks under moving averages, statistics); {} for most.
      opt_state: the optimiser's moments.
    """

    step: jax.Array
    skipped: jax.Array
    in_a_row: jax.Array
    params: Any
    state: Any
    opt_state: Any


def create_state(variables: Any, optimiser: optax.GradientTransformation) -> TrainState:
    """The state before the first step, from a module's variables."""
    state = dict(variables)
    params = state.pop("params")
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, zero, zero, params, state, optimiser.init(params))


def in_dtype(weights: Any, dtype: str) -> Any:
    """The weights as a forward pass takes them: what is multiplied in `dtype`, 'float32' or 'bfloat16'.

    What has fewer than two axes in a layer (scales, biases) and what is LOOKED_UP stays as it is: gradients of a row
    that is looked up often add up in float32. Gradients through it come back in the weights' own dtype.

    ValueError where it is another.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={dtype!r} must be 'float32' or 'bfloat16'")
    if dtype == "float32":
        return weights

    def cast(path: Any, array: Any) -> Any:
        stays = _axes(path, array) < 2 or any(name.endswith(LOOKED_UP) for name in _names(path))
        return array if stays else array.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, weights)


def moved(optimiser: optax.GradientTransformation, gradients: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
    """(params, opt_state) after one step."""
    with jax.numpy_dtype_promotion("standard"):  # optax raises Python floats to integer powers
        updates, opt_state = optimiser.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


@dataclasses.dataclass(frozen=True)
class Optimiser:
    """Adam with decoupled weight decay, a linear warm-up, then a cosine to `final_fraction` of the rate.

    Attributes:
      learning_rate: the peak.
      warmup_steps: steps of linear rise to the peak; 0 starts there.
      final_fraction: the rate after the last step as a fraction of the peak; 1 keeps it constant.
      b1, b2: Adam's decays.
      weight_decay: decoupled, on matrices: not on biases, scales and temperatures.
      clip_norm: global gradient norm above which gradients are scaled down.
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 10
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.98
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def schedule(self, steps: int) -> optax.Schedule:
        """Learning rate as a function of the step, for a run of `steps`."""
        return optax.warmup_cosine_decay_schedule(
            self.learning_rate / (self.warmup_steps + 1),
            self.learning_rate,
            self.warmup_steps,
            max(steps, self.warmup_steps + 1),
            self.final_fraction * self.learning_rate,
        )

    def build(self, steps: int) -> optax.GradientTransformation:
        """The optax chain for a run of `steps`."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.adamw(self.schedule(steps), self.b1, self.b2, weight_decay=self.weight_decay, mask=_matrices),
        )


def _matrices(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _axes(path, leaf) > 1, params)


def _names(path: tuple[Any, ...]) -> list[str]:
    """Of the dictionaries' keys on a path."""
    return [str(getattr(key, "key", "")) for key in path]


def _axes(path: tuple[Any, ...], array: Any) -> int:
    """How many the array has, or those of one layer where it holds many."""
    return array.ndim - (LAYERS in _names(path))
