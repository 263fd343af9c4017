"""Prints the compiler's schedule of the fused attention kernels for a TPU, in Markdown.

    JAX_PLATFORMS=cpu python tests/benchmarks/attention.py v5e:1x1

It needs libtpu (the extra `plan`), but no TPU. A bundle is what a core issues in one cycle. The
compiler writes the bundles of a kernel; this counts how often each runs, on one core. Waits for
memory and the start of each step are not included; nothing is measured.
"""

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path

ROWS, HEADS, WIDTH, BUCKETS, DISTANCE = 2, 16, 64, 32, 128  # of the base size, in a microbatch
# A row of a listing: an address, a label at the start of a region, `>` for each loop around it.
BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(LH|LB|LE|PB|PF)?\s*:?\s*(>*)")


def regions(listing: str) -> list[list[str]]:
    """Splits the bundles of a kernel at branches and at their targets."""
    split, current = [], []
    for line in listing.splitlines():
        match = BUNDLE.match(line)
        if match is None or "{" not in line:
            continue
        if match[1] and current:
            split.append(current)
            current = []
        current.append(line)
        if "sbr.rel" in line:
            split.append(current)
            current = []
    return [*split, current]


def cycles(listing: str, blocks: int, near: int, is_gradient: bool) -> int:
    """Returns the bundles that a kernel issues for ROWS and HEADS.

    The two loops inside a step are over near and far blocks. Regions that rotate lanes make or sum
    Toeplitz tiles, once a head. All others count once a step.
    """
    pairs = blocks * (blocks + 1) // 2
    far = (blocks - near) * (blocks - near + 1) // 2
    in_near = pairs - far
    loops, per_head, per_step = [], 0, 0
    for region in regions(listing):
        if BUNDLE.match(region[0])[2] == ">>":
            if BUNDLE.match(region[0])[1] == "LB":
                loops.append(0)
            loops[-1] += len(region)
        elif any("vrot.lane" in line for line in region):
            per_head += len(region)
        else:
            per_step += len(region)
    # Forward, the diagonal block comes before the loop over near ones.
    near_rounds = in_near if is_gradient else in_near - blocks
    a_row = per_step * blocks + loops[0] * near_rounds + loops[1] * far
    return HEADS * (per_head + ROWS * a_row)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("topology", nargs="?", default="v5e:1x1")
    parser.add_argument("--length", type=int, default=762, help="positions")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # libtpu reads its flags when JAX loads it. A cached program would write no listing.
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"
        sys.path.insert(0, str(Path(__file__).parents[2]))
        report(options.topology, options.length, Path(folder))


def report(topology: str, length: int, folder: Path) -> None:
    """Compiles both kernels, and prints a row for each."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from musicrl_jax.core.sharding import replicated
    from musicrl_jax.models.fused_attention import bias_diagonals, fused_attention
    from musicrl_jax.models.transformer import relative_bucket
    from musicrl_jax.planning import slices

    mesh_of, chip = slices.describe(topology, 1)
    buckets = relative_bucket(np.arange(DISTANCE + 1), BUCKETS, DISTANCE)

    def attend(query, key, value, table):
        return fused_attention(query, key, value, bias_diagonals(table, buckets, length))

    def run(query, key, value, table, gradient):
        output, pull = jax.vjp(attend, query, key, value, table)
        return output, pull(gradient)

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(mesh_of(1, 1)))

    inputs = [array(ROWS, HEADS, length, WIDTH)] * 3
    table = array(HEADS, BUCKETS, dtype=jnp.float32)
    jax.jit(run).lower(*inputs, table, array(ROWS, length, HEADS, WIDTH)).compile()

    _, near, twice = bias_diagonals(jnp.zeros((HEADS, BUCKETS)), buckets, length).shape
    block = twice // 2
    blocks = -(-length // block)
    scores = ROWS * HEADS * blocks * (blocks + 1) // 2 * block**2
    print("| kernel | bundles | microseconds | operations a cycle | share of the chip's |")
    print("|---|---|---|---|---|")
    for path in sorted(folder.glob("*attention*-final_bundles.txt")):
        if "schedule-analysis" in path.name:
            continue
        is_gradient = "gradient" in path.name
        count = cycles(path.read_text(), blocks, near, is_gradient)
        seconds, flops = count / chip.clock, 2 * (5 if is_gradient else 2) * scores * WIDTH
        name = "gradient" if is_gradient else "forward"
        share = flops / seconds / chip.flops
        print(
            f"| {name} | {count} | {1e6 * seconds:.0f} | {flops / count:.0f} | {share:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
