"""Limits of TPU chips, by generation, from which times are estimated.

Sources: Google's pages (docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e), and the tables of
"How to Scale Your Model", part 2 (jax-ml.github.io/scaling-book/tpus), here "the book".
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
      flops: multiplications and additions a second of its matrix units, from bfloat16 to float32.
      memory: bytes of HBM that a program can use; one that needs more does not compile.
      memory_bandwidth: HBM bytes a second.
      link_bandwidth: bytes a second of one link to one neighbour, one way.
      links: neighbours in the torus. A ring over one axis uses two links if the axis wraps
        around (16 chips of v5e and v6e, a multiple of 4 of v4 and v5p). One link is assumed.
      slices_bandwidth: bytes a second between slices through the data centre's network, one way: a
        chip's share of its host's cards.
      clock: cycles a second of the cores; turns the compiler's `estimated_cycles` into seconds.
    """

    flops: float
    memory: int
    memory_bandwidth: float
    link_bandwidth: float
    links: int
    slices_bandwidth: float
    clock: float


# flops, memory_bandwidth: Google's pages.
# memory: what libtpu 0.0.42.1 has available when it refuses a program, of Google's 32, 16, 95 and
#   32 GB. That of v4 is for both cores as one device, as on Google's hosts:
#   get_topology_desc(..., chip_config_name="megacore").
# link_bandwidth: the book's later tables. They subtract the protocol from the 50 GB/s (v4, v5e) or
#   100 GB/s (v5p, v6e) of a link that follow from Google's figures for all links of a chip, both
#   ways: 400 GB/s (v5e), 800 GB/s (v6e), 4800 Gb/s (v5p).
# slices_bandwidth: the book's 6.25 GB/s a chip, 12.5 for v6e and 3.125 for v5e. The last follows
#   from Google's 6.4 Tb/s for a pod of 256: two cards of 100 Gb/s for a host of 8 chips. All chips
#   of a host are assumed to send at once.
# clock: neither a device's attributes nor the compiled text have it. It is flops divided by the
#   operations of a cycle, 2 x 128 x 128 for each matrix unit: 4 units on v5e (the book has 1.5 GHz
#   too), 8 in two cores on v4 and v5p. By libtpu's estimates a bfloat16 matmul of 4096 cubed does
#   127e3 operations a cycle on v5e, of 131e3 possible, and 252e3 of 262e3 on v5p. On v6e, with 2
#   units of 256 x 256, it does 456e3, more than 262e3; 524e3, of which that is 87 %, is assumed.
CHIPS = {
    "v4": Chip(275e12, int(30.75 * 2**30), 1.2e12, 4.5e10, 6, 6.25e9, 275e12 / 2**18),
    "v5e": Chip(197e12, int(15.75 * 2**30), 8.19e11, 4.5e10, 4, 3.125e9, 197e12 / 2**17),
    "v5p": Chip(459e12, int(95.74 * 2**30), 2.765e12, 9e10, 6, 6.25e9, 459e12 / 2**18),
    "v6e": Chip(918e12, int(31.25 * 2**30), 1.638e12, 9e10, 4, 12.5e9, 918e12 / 2**19),
}
