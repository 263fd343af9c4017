"""What a compiled program takes of a TPU chip: its memory, its operations, its traffic and the time that these need.

Everything is the compiler's word, or arithmetic on what it compiled. Nothing is measured.
"""

import dataclasses
import re
from typing import Any

import jax
import numpy as np

from musicrl_jax.planning import hlo
from musicrl_jax.planning.chips import Chip
from musicrl_jax.planning.flops import Flops

# How XLA says that a program does not fit.
REFUSED = re.compile(r"(?:Used |HLO temporaries \()([\d.]+)([KMG])\)? (?:of|exceeds available HBM)")
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One function on one chip, for one call.

    Attributes:
      arguments, outputs, temporaries, code: bytes of HBM; of outputs those that are no argument's memory.
      beside: bytes of what is alive and no argument.
      memory: bytes of HBM that there are.
      matmul, other: floating-point operations, a chip's share.
      moved: bytes read from HBM or written to it.
      wire: bytes sent within the slice, by collective.
      between_slices: bytes sent from slice to slice.
      unknown_loops: loops whose rounds nobody could tell; they count once in all that follows.
      matrix_seconds, memory_seconds, network_seconds: at the limit of each.
      compiler_seconds: of the cycles that the compiler scheduled, which leave out all communication.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int
    beside: int
    memory: int
    matmul: float = 0.0
    other: float = 0.0
    moved: int = 0
    wire: dict[str, int] = dataclasses.field(default_factory=dict)
    between_slices: int = 0
    unknown_loops: tuple[str, ...] = ()
    matrix_seconds: float = 0.0
    memory_seconds: float = 0.0
    network_seconds: float = 0.0
    compiler_seconds: float = 0.0

    @property
    def needed(self) -> int:
        """Bytes of HBM, all together."""
        return self.arguments + self.outputs + self.temporaries + self.code + self.beside

    @property
    def fits(self) -> bool:
        """Whether a chip has them."""
        return self.needed <= self.memory

    @property
    def seconds(self) -> float:
        """What a call takes where nothing overlaps: the compiler's time, no less than any limit, and the network's."""
        return (
            max(self.compiler_seconds, self.matrix_seconds, self.memory_seconds)
            + self.network_seconds
        )

    @property
    def limit(self) -> str:
        """Which limit is the highest."""
        limits = {
            "matrix unit": self.matrix_seconds,
            "memory": self.memory_seconds,
            "network": self.network_seconds,
        }
        return max(limits, key=limits.get)

    def told(self) -> dict[str, Any]:
        """All of it as plain JSON."""
        derived = {name: getattr(self, name) for name in ("needed", "fits", "seconds", "limit")}
        return {**dataclasses.asdict(self), **derived}


def bytes_a_chip(tree: Any) -> int:
    """What arrays, or their shapes, with shardings take on each device."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * _itemsize(leaf.dtype)
        for leaf in jax.tree.leaves(tree)
    )


def _itemsize(dtype: Any) -> int:
    return 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize


def estimate(compiled: Any, operations: Flops, chips: int, chip: Chip, beside: int) -> Estimate:
    """Of a `jax.stages.Compiled`, whose operations over all chips are known."""
    memory = compiled.memory_analysis()
    return Estimate(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        beside=beside,
        memory=chip.memory,
        matmul=operations.matmul / chips,
        other=operations.other / chips,
        matrix_seconds=operations.matmul / chips / chip.flops,
        **_run(hlo.read(compiled.as_text()), chip),
    )


def refused(error: Exception, chip: Chip, beside: int) -> Estimate:
    """Of a program that the compiler refused for its memory; other errors are raised again."""
    match = REFUSED.search(str(error))
    if match is None:
        raise error
    return Estimate(0, 0, int(float(match[1]) * UNITS[match[2]]), 0, beside, chip.memory)


def _run(program: hlo.Program, chip: Chip) -> dict[str, Any]:
    """What running takes, but for operations."""
    sent = hlo.collectives(program)
    wire: dict[str, int] = {}
    for part in sent:
        if not part.crosses:
            wire[part.kind] = wire.get(part.kind, 0) + part.bytes
    across = sum(part.bytes for part in sent if part.crosses)
    moved = hlo.memory_bytes(program)
    return {
        "moved": moved,
        "wire": wire,
        "between_slices": across,
        "unknown_loops": program.unknown_loops,
        "memory_seconds": moved / chip.memory_bandwidth,
        "network_seconds": sum(wire.values()) / chip.link_bandwidth
        + across / chip.slices_bandwidth,
        "compiler_seconds": hlo.scheduled_cycles(program) / chip.clock,
    }
