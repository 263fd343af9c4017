"""What a training objective is. `musicrl_jax/train.py` drives any of these; each is a short file beside this one."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Protocol

import jax
import numpy as np

from musicrl_jax.core import checkpoint
from musicrl_jax.inputs.tokens import ClipShapes, Shapes

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class Data(Protocol):
    """A data set as objectives see it: `inputs.Clips`, `inputs.Tokens`, `inputs.Ratings`."""

    def batches(
        self,
        split: str,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        epochs: int | None = None,
        rows: np.ndarray | None = None,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Batches in an order that is a pure function of (seed, step); of each its `rows` alone, or all."""

    def count(self, split: str) -> int:
        """The number of examples in a split."""

    def splits(self) -> list[str]:
        """The splits that have examples."""

    def shapes(self, batch_size: int, clip_seconds: float, tokens: ClipShapes) -> Shapes:
        """Returns the shapes of a batch, by settings alone: for a planner, whose data is not built yet.

        Args:
          batch_size: B.
          clip_seconds: length of the clips.
          tokens: tells the shape of each array of a clip in a folder of tokens.
        """


@dataclasses.dataclass(frozen=True)
class Objective:
    """A model's config, its data and its loss.

    Attributes:
      model: the frozen config of the module that is trained.
      data: where batches come from.
    """

    model: Any
    data: Data

    # Of some validation metrics, the least number of examples in a batch: of fewer they say nothing and are left out.
    LEAST_EXAMPLES: ClassVar[Mapping[str, int]] = {}

    def check(self, batch: Batch) -> None:
        """Raises ValueError, by the field's name, if the data or a batch of it does not fit the model."""

    def init(self, key: jax.Array, batch: Batch) -> dict[str, Any]:
        """The module's variables: 'params' and whatever other collections it keeps. Traced under jit."""
        raise NotImplementedError(f"{type(self).__name__} must define init")

    def start(self, params: Any) -> Any:
        """The weights before the first step, from those that `init` drew: where a model starts from another one."""
        return params

    def loss(
        self, params: Any, state: Any, frozen: Any, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        """(loss f32 [], (new state, metrics f32 [] each)) in training mode. Pure; jitted by train."""
        raise NotImplementedError(f"{type(self).__name__} must define loss")

    def evaluate(
        self, params: Any, state: Any, frozen: Any, batch: Batch, key: jax.Array
    ) -> Metrics:
        """Metrics of one validation batch; by default those of the loss."""
        return self.loss(params, state, frozen, batch, key)[1][1]

    def frozen(self, read: checkpoint.Reader = checkpoint.load_model) -> Any:
        """Returns weights of other models that the loss needs, loaded once and passed as an argument."""
        return {}

    def finish(
        self,
        variables: dict[str, Any],
        frozen: Any,
        batches: Callable[[], Iterator[dict[str, np.ndarray]]],
    ) -> dict[str, Any]:
        """The variables after what follows the last step, such as k-means; `batches()` is an epoch of training data."""
        return variables

    def assets(self) -> dict[str, bytes]:
        """Files that travel inside the checkpoint, such as a vocabulary."""
        return {}
