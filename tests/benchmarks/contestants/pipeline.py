"""The work of a row in JAX: functions that are compiled one by one, then called in their order."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Stage:
    """One jitted function of a row.

    Attributes:
      figure: name of the figure that its seconds count for.
      function: pure function.
      inputs: names of its arguments.
      outputs: names of its results; one name stands for the whole result.
      donates: whether the first argument's memory may be used for the results.
      reads: bytes of weights that a call reads at least, if it samples.
    """

    figure: str
    function: Callable[..., Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    donates: bool = False
    reads: int = 0

    def trace(self, values: Mapping[str, Any]) -> Any:
        """Traces the function for the arguments' shapes."""
        jitted = jax.jit(self.function, donate_argnums=(0,) if self.donates else ())
        return jitted.trace(*(values[name] for name in self.inputs))

    def store(self, results: Any, values: dict[str, Any]) -> None:
        """Stores the results by their names."""
        named = [results] if len(self.outputs) == 1 else results
        values.update(zip(self.outputs, named, strict=True))


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The stages of a row, and what they start from.

    Attributes:
      stages: in the order of a call.
      values: the first stages' arguments, by name.
      weights: number of weights of the row's model.
    """

    stages: Sequence[Stage]
    values: Mapping[str, Any]
    weights: int

    def traced(self) -> list[Any]:
        """Traces all stages, each for the shapes that those before it return."""
        shapes, traces = dict(self.values), []
        for stage in self.stages:
            traces.append(stage.trace(shapes))
            stage.store(jax.tree.unflatten(*structure_and_shapes(traces[-1])), shapes)
        return traces


def structure_and_shapes(traced: Any) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
    """Returns structure and leaves of a traced function's result."""
    leaves, structure = jax.tree.flatten(traced.out_info)
    return structure, [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]


class Compiled:
    """A pipeline that runs; see `contestants.worker.Work`."""

    def __init__(self, pipeline: Pipeline):
        """Traces and compiles all stages."""
        self.weights, self.stages = pipeline.weights, pipeline.stages
        start = time.perf_counter()
        self.programs = [traced.lower().compile() for traced in pipeline.traced()]
        self.compile_seconds = time.perf_counter() - start
        self.values = jax.tree.map(jax.numpy.asarray, dict(pipeline.values))
        self.first = set(self.values)

    def _call(self, figures: Sequence[str]) -> dict[str, float]:
        """Calls the stages of some figures in their order; returns their seconds."""
        seconds = dict.fromkeys(figures, 0.0)
        for stage, program in zip(self.stages, self.programs, strict=True):
            if stage.figure not in figures:
                continue
            start = time.perf_counter()
            results = program(*(self.values[name] for name in stage.inputs))
            jax.block_until_ready(results)
            seconds[stage.figure] += time.perf_counter() - start
            stage.store(results, self.values)
        return seconds

    def run(self) -> dict[str, float]:
        """Calls all stages; a draw and an update are a step too."""
        return with_step(self._call(tuple(dict.fromkeys(stage.figure for stage in self.stages))))

    def prepare(self) -> None:
        """Frees results of the last update that it does not start from."""
        for stage in self.stages:
            if stage.figure == "update":
                for name in set(stage.outputs) - self.first:
                    del self.values[name]

    def measured(self) -> None:
        """Calls the update."""
        self._call(("update",))


def with_step(seconds: dict[str, float]) -> dict[str, float]:
    """Adds a step's seconds to those of its draw and its update."""
    if "update" in seconds:
        seconds["step"] = seconds["draw"] + seconds["update"]
    return seconds


def random_weights(shapes: Any) -> Any:
    """Returns random arrays of these shapes, for speed does not depend on the weights."""
    rng = np.random.default_rng(0)

    def draw(shape: jax.ShapeDtypeStruct) -> np.ndarray:
        return (0.02 * rng.standard_normal(shape.shape, np.float32)).astype(shape.dtype)

    return jax.tree.map(draw, shapes)


def size_of(tree: Any) -> int:
    """Returns the number of elements of all arrays."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def bytes_of(tree: Any) -> int:
    """Returns the bytes of all arrays."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
