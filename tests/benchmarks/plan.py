"""Prints the compiler's estimate of a step of RL at the paper's size on TPU slices, in Markdown.

    JAX_PLATFORMS=cpu python tests/benchmarks/plan.py v5e:4x4 v5e:8x8 v5e:16x16 2xv5e:16x16

The batch grows with the chips (weak scaling). `musicrl plan` compiles every function, which takes
minutes for each topology on two CPU cores; nothing is measured. Efficiency is clips per chip and
second, relative to the first topology.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def planned(topology: str, slices: int, chips: int, options: argparse.Namespace) -> dict[str, dict]:
    """Returns the rows of a plan, by name of the function."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "plan.json")
        command = [
            sys.executable,
            "-m",
            "musicrl_jax.cli",
            "plan",
            f"--topology={topology}",
            f"--slices={slices}",
        ]
        command += [
            "--gin_file=gin/experiments/musicrl_ru.gin",
            "--gin_file=gin/sizes/base.gin",
            f"--only={options.stage}",
        ]
        command += [
            f"--gin.RLConfig.batch_size={options.rows_a_chip * chips}",
            f"--json_file={file}",
            *options.flags,
        ]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False
        )
        if not file.exists():
            raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
        return {row["name"]: row for row in json.loads(file.read_text())["functions"]}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "topologies", nargs="+", help="such as v5e:4x4, or 2xv5e:16x16 for two slices"
    )
    parser.add_argument("--rows_a_chip", type=int, default=8, help="clips")
    parser.add_argument("--stage", default="r")
    parser.add_argument("--flags", nargs="*", default=[], help="more flags for musicrl plan")
    options = parser.parse_args()
    print(
        "| slice | chips, clips | function | GiB a chip "
        "| seconds: matrix / memory / network / compiler | limit |"
    )
    print("|---|---|---|---|---|---|", flush=True)
    # Plan one topology after the other.
    first = None
    for each in options.topologies:
        slices, topology = each.split("x", 1) if each.split("x", 1)[0].isdigit() else ("1", each)
        chips = int(slices) * math.prod(map(int, topology.split(":")[1].split("x")))
        start = time.monotonic()
        rows = planned(topology, int(slices), chips, options)
        print(f"{each}: planned in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        # Its functions.
        for name, row in rows.items():
            space = f"{row['needed'] / 2**30:.1f} of {row['memory'] / 2**30:.1f}"
            if not row["fits"]:
                print(
                    f"| {each} | {chips}, {row['clips']} | {name} | {space} | does not fit | |",
                    flush=True,
                )
                continue
            parts = " / ".join(
                f"{row[f'{part}_seconds']:.2f}"
                for part in ("matrix", "memory", "network", "compiler")
            )
            print(
                f"| {each} | {chips}, {row['clips']} | {name} | {space} | {parts} "
                f"| {row['limit']} |",
                flush=True,
            )
        # A whole step, if everything fits.
        if all(row["fits"] for row in rows.values()):
            seconds = sum(row["seconds"] for row in rows.values() if not row["once"])
            speed = row["clips"] / seconds / chips
            first = first or speed
            speed_text = f"{seconds:.2f} s, {speed * chips:.1f} clips a second"
            speed_text += f", {3600 * speed:.0f} a chip-hour"
            print(
                f"| {each} | {chips}, {row['clips']} | **a step** | | {speed_text} "
                f"| efficiency {speed / first:.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
