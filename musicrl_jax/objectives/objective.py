"""The interface of a training objective; `musicrl_jax/train.py` trains with any of them.

Legend: D width of a point, P points.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Protocol

import jax
import numpy as np

from musicrl_jax.core import checkpoint, sharding
from musicrl_jax.inputs.tokens import ClipShapes, Shapes

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]  # f32 [] each
Loss = tuple[jax.Array, tuple[Any, Metrics]]  # (loss f32 [], (new state, metrics))
Variables = dict[str, Any]  # a module's collections: 'params' and others
Epoch = Callable[[], Iterator[dict[str, np.ndarray]]]  # yields the batches of an epoch


class Data(Protocol):
    """A data set of an objective: `inputs.Clips`, `inputs.Tokens`, `inputs.Ratings`."""

    def batches(
        self,
        split: str,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        epochs: int | None = None,
        rows: np.ndarray | None = None,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields batches, whose order is a pure function of (seed, step).

        With `rows`, only these rows of each batch.
        """

    def count(self, split: str) -> int:
        """Returns the number of examples in a split."""

    def splits(self) -> list[str]:
        """Returns the splits that have examples."""

    def shapes(self, batch_size: int, clip_seconds: float, tokens: ClipShapes) -> Shapes:
        """Returns the shapes of a batch by settings alone, for a planner without the data.

        Args:
          batch_size: B.
          clip_seconds: length of the clips.
          tokens: returns the shape of each array of a clip in a folder of tokens.
        """


@dataclasses.dataclass(frozen=True)
class Objective:
    """A model's config, its data and its loss.

    Attributes:
      model: the frozen config of the trained module.
      data: the data set.
    """

    model: Any
    data: Data

    # Least number of examples for some validation metrics; with fewer they are not reported.
    LEAST_EXAMPLES: ClassVar[Mapping[str, int]] = {}

    def check(self, batch: Batch) -> None:
        """Raises ValueError, by the field's name, if the data or a batch do not fit the model."""

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """Returns random variables of the module: 'params' and its other collections; jitted."""
        raise NotImplementedError(f"{type(self).__name__} must define init")

    def start(self, params: Any) -> Any:
        """Returns the weights before the first step, from the random ones of `init`."""
        return params

    def loss(self, params: Any, state: Any, frozen: Any, batch: Batch, key: jax.Array) -> Loss:
        """Returns (loss f32 [], (new state, metrics f32 [] each)) in training mode; jitted."""
        raise NotImplementedError(f"{type(self).__name__} must define loss")

    def evaluate(
        self, params: Any, state: Any, frozen: Any, batch: Batch, key: jax.Array
    ) -> Metrics:
        """Returns metrics of a validation batch; by default those of the loss."""
        return self.loss(params, state, frozen, batch, key)[1][1]

    def clips(self, variables: Variables, batch: Batch) -> dict[str, jax.Array]:
        """Returns clips f32 [B, N] to listen to, by name; {} if the model makes no sound."""
        return {}

    def frozen(self, read: checkpoint.Reader = checkpoint.load_model) -> Any:
        """Loads the weights of other models that the loss needs; they become an argument."""
        return {}

    def finish(self, variables: Variables, frozen: Any, batches: Epoch) -> Variables:
        """Returns the final variables, after work such as k-means on an epoch of training data."""
        return variables

    def assets(self) -> dict[str, bytes]:
        """Returns files to store in the checkpoint, such as a vocabulary."""
        return {}


def collect_points(arrays: Iterable[jax.Array], count: int) -> np.ndarray:
    """Flattens arrays [..., D] to points f32 [P, D] until there are `count` or more."""
    parts, total = [], 0
    for array in arrays:
        parts.append(sharding.fetch(array).reshape(-1, array.shape[-1]))
        total += len(parts[-1])
        if total >= count:
            break
    return np.concatenate(parts)
