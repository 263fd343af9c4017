"""The limits of this machine on the rows of this checkout, as seconds.

A stage takes no less than its matrix products, counted by `musicrl_jax.planning.flops`, take at the
rate of large float32 products; a draw no less than reading the weights takes, those of the temporal
model once a frame and those of the depth model once a code, at the rate of copying or of a product
with one row, whichever is higher. Weights that fit into a processor's cache may be read faster.
"""

import jax
import jax.numpy as jnp
from contestants.by_systems import PIPELINES
from contestants.pipeline import with_step
from contestants.rows import Row
from step import fastest, machine_limits

from musicrl_jax.planning.flops import flops

SIDE = 1024  # of the matrices whose product is timed


def read_rate() -> float:
    """Returns bytes/s of a product of one row with a float32 matrix."""
    row, matrix = jnp.ones((1, 4 * SIDE)), jnp.ones((4 * SIDE, 4 * SIDE))
    return matrix.nbytes / fastest(jax.jit(lambda matrix: row @ matrix), matrix)


class Limit:
    """A row at the limits of the machine, measured anew in every call."""

    compile_seconds = None

    def __init__(self, row: Row):
        """Counts the operations of the row's stages."""
        pipeline = PIPELINES[row.kind](row)
        self.weights, self.stages = pipeline.weights, pipeline.stages
        self.products = [flops(traced.jaxpr).matmul for traced in pipeline.traced()]

    def run(self) -> dict[str, float]:
        """Measures the machine; returns the least seconds of each figure."""
        product_rate, copy_rate = machine_limits(SIDE, jnp.float32)
        memory_rate = max(copy_rate, read_rate())
        seconds: dict[str, float] = {}
        for stage, products in zip(self.stages, self.products, strict=True):
            least = max(products / product_rate, stage.reads / memory_rate)
            seconds[stage.figure] = seconds.get(stage.figure, 0.0) + least
        return with_step(seconds)


def work(row: Row) -> Limit:
    """Traces the row."""
    return Limit(row)
