"""What the TPUs can do, by generation, a chip: the limits that a compiled program's time is measured against.

Sources: Google's pages of each generation (docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e) and the tables of
"How to Scale Your Model", part 2 (jax-ml.github.io/scaling-book/tpus), here "the book".
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
      flops: multiplications and additions a second of its matrix units, bfloat16 in, float32 out.
      memory: bytes of HBM that a program can have; one that needs more does not compile.
      memory_bandwidth: HBM bytes a second.
      link_bandwidth: bytes a second of one link to one neighbour, one way.
      links: neighbours in the torus. A ring over one axis uses two of them where the axis wraps around (16 chips of v5e
        and v6e, a multiple of 4 of v4 and v5p), and one where it does not.
      slices_bandwidth: bytes a second between slices through the data centre's network, one way, a chip's share of its
        host's cards.
      clock: cycles a second of the cores, to turn the compiler's `estimated_cycles` into seconds.
    """

    flops: float
    memory: int
    memory_bandwidth: float
    link_bandwidth: float
    links: int
    slices_bandwidth: float
    clock: float


# flops, memory_bandwidth: Google's pages.
# memory: what libtpu 0.0.42.1 says is available when it refuses a program, of Google's 32, 16, 95 and 32 GB; v4's is
# with both cores as one device, as on Google's hosts: get_topology_desc(..., chip_config_name="megacore").
# link_bandwidth: the book's later tables, what its protocol leaves of a link's 50 GB/s (v4, v5e) or 100 (v5p, v6e)
# that Google gives: 400 GB/s for a chip of v5e and 800 of v6e, over 4 links and both ways, 4800 Gb/s for one of v5p.
# slices_bandwidth: the book, 6.25 GB/s a chip, 12.5 of v6e and 3.125 of v5e, whose is Google's 6.4 Tb/s for a pod of
# 256: two cards of 100 Gb/s for a host of 8 chips. It assumes that all chips of a host send at once.
# clock: no device attribute nor compiled text has it. It is flops over what the matrix units do in a cycle, 128 x 128
# multiply-adds each: 4 of them on v5e, for which the book has 1.5 GHz too, and 8 in two cores on v4 and v5p. By
# libtpu's estimates a bfloat16 matmul of 4096 cubed does 127e3 operations a cycle on v5e, of 131e3 then possible,
# and 252e3 of 262e3 on v5p. Of v6e, 2 units of 256 x 256, it has 456e3 a cycle, which is more than their size says and
# 87 % of 524e3; that is what its cycle is taken for.
CHIPS = {
    "v4": Chip(275e12, int(30.75 * 2**30), 1.2e12, 4.5e10, 6, 6.25e9, 275e12 / 2**18),
    "v5e": Chip(197e12, int(15.75 * 2**30), 8.19e11, 4.5e10, 4, 3.125e9, 197e12 / 2**17),
    "v5p": Chip(459e12, int(95.74 * 2**30), 2.765e12, 9e10, 6, 6.25e9, 459e12 / 2**18),
    "v6e": Chip(918e12, int(31.25 * 2**30), 1.638e12, 9e10, 4, 12.5e9, 918e12 / 2**19),
}
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
}  # jax.Device.device_kind
