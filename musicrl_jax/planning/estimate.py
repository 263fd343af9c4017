"""Estimates memory, operations, traffic and time of a compiled program on one TPU chip.

All figures are the compiler's estimates, or arithmetic on the program that it compiled. None is
measured.
"""

import dataclasses
import math
import re
from typing import Any

import jax

from musicrl_jax.planning import hlo
from musicrl_jax.planning.chips import Chip
from musicrl_jax.planning.flops import Flops

# Operations of a Pallas kernel in a cycle of a core. The compiler estimates no cycles for kernels.
# Its instructions for our attention do 33,000 to 40,000 on v5e, v5p and v6e, and 66,000 in v6e's
# gradient, by tests/benchmarks/attention.py. The second core of a v4 or v5p is left out.
KERNEL_FLOPS_A_CYCLE = 35_000
# How XLA says that a program does not fit.
REFUSED = re.compile(r"(?:Used |HLO temporaries \()([\d.]+)([KMG])\)? (?:of|exceeds available HBM)")
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One call of one function on one chip.

    Attributes:
      arguments, outputs, temporaries, code: bytes of HBM. Outputs that reuse an argument's memory
        do not count.
      beside: bytes of arrays that stay in HBM and are no argument.
      memory: bytes of HBM that a chip has.
      matmul, other: floating-point operations.
      moved: bytes read from HBM or written to it.
      wire: bytes sent within the slice, by collective.
      between_slices: bytes sent to other slices.
      unknown_loops: loops whose number of rounds is unknown. They count once in all figures below.
      matrix_seconds, memory_seconds, network_seconds: time at the limit of each.
      compiler_seconds: time of the cycles that the compiler scheduled, without communication, and
        of Pallas kernels at KERNEL_FLOPS_A_CYCLE.
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
        """Bytes of HBM in all."""
        return self.arguments + self.outputs + self.temporaries + self.code + self.beside

    @property
    def fits(self) -> bool:
        """Whether a chip has that much HBM."""
        return self.needed <= self.memory

    @property
    def seconds(self) -> float:
        """Time of a call if nothing overlaps: the longest of compute and memory, plus network."""
        compute = max(self.compiler_seconds, self.matrix_seconds, self.memory_seconds)
        return compute + self.network_seconds

    @property
    def limit(self) -> str:
        """The limit that takes longest."""
        limits = {
            "matrix unit": self.matrix_seconds,
            "memory": self.memory_seconds,
            "network": self.network_seconds,
        }
        return max(limits, key=limits.get)

    def as_json(self) -> dict[str, Any]:
        """Returns all fields and properties as plain JSON."""
        derived = {name: getattr(self, name) for name in ("needed", "fits", "seconds", "limit")}
        return {**dataclasses.asdict(self), **derived}


def bytes_a_chip(tree: Any) -> int:
    """Returns the bytes on each device of arrays, or of their shapes, with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        item_bytes = 8 if is_key else leaf.dtype.itemsize
        total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * item_bytes
    return total


def estimate(
    compiled: jax.stages.Compiled, operations: Flops, chips: int, chip: Chip, beside: int
) -> Estimate:
    """Estimates a compiled function whose operations on all chips together are known."""
    memory, program = compiled.memory_analysis(), hlo.read(compiled.as_text())
    wire, between_slices = hlo.sent_bytes(program)
    moved = hlo.memory_bytes(program)
    cycles = hlo.scheduled_cycles(program) + hlo.kernel_flops(program) / KERNEL_FLOPS_A_CYCLE
    return Estimate(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        beside=beside,
        memory=chip.memory,
        matmul=operations.matmul / chips,
        other=operations.other / chips,
        moved=moved,
        wire=wire,
        between_slices=between_slices,
        unknown_loops=program.unknown_loops,
        matrix_seconds=operations.matmul / chips / chip.flops,
        memory_seconds=moved / chip.memory_bandwidth,
        network_seconds=sum(wire.values()) / chip.link_bandwidth
        + between_slices / chip.slices_bandwidth,
        compiler_seconds=cycles / chip.clock,
    )


def refused(error: Exception, chip: Chip, beside: int) -> Estimate:
    """Estimates a program that the compiler refused for its memory; raises any other error."""
    match = REFUSED.search(str(error))
    if match is None:
        raise error
    return Estimate(0, 0, int(float(match[1]) * UNITS[match[2]]), 0, beside, chip.memory)
