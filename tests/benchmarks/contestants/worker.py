"""One contestant on one row: a process that works when it is told to, so that others may in turn.

    python -m contestants.worker KIND ROW     with tests/benchmarks and a checkout in PYTHONPATH

It prints one JSON object when it is ready, {"weights": N, "compile": seconds, "versions": [...]},
and one for each line of its standard input: after 'run' the seconds of a call by the name of the
figure, after 'memory' the MiB that one more update needs at most. It ends with its input. KIND
names a module.
"""

import ctypes
import importlib
import json
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Protocol

from contestants.rows import BY_NAME, Row

# Modules by kind of contestant: a checkout with `musicrl_jax.systems`, an older one, PyTorch, and
# the limits of the machine.
MODULES = {
    "systems": "contestants.by_systems",
    "studio": "contestants.by_studio",
    "transformers": "contestants.by_transformers",
    "limit": "contestants.by_limit",
}
PACKAGES = ("jax", "torch", "transformers")  # whose versions are reported


class Work(Protocol):
    """A row's work, compiled.

    Attributes:
      weights: number of weights of the policy, the decoder or the codec's decoder.
      compile_seconds: None if nothing is compiled.
    """

    weights: int
    compile_seconds: float | None

    def run(self) -> dict[str, float]:
        """Works once; returns seconds by the name of the figure."""

    def prepare(self) -> None:
        """Frees what the update of the last `run` left and the next one does not need."""

    def measured(self) -> None:
        """Updates once more with the last draw; only in rows with an update."""


def status(name: str) -> int:
    """Returns a size of this process in KiB, by its name in /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {name}: peak memory is measured on Linux alone")


def peak_mib(work: Work) -> float:
    """Returns the greatest memory of `work.measured`, above that before it.

    Memory that is free but not returned to the system would hide a part; so it is returned first.
    """
    work.prepare()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    before = status("VmRSS")
    work.measured()
    return (status("VmHWM") - before) / 1024


def main() -> None:
    """Answers each line of the standard input."""
    kind, name = sys.argv[1:]
    row: Row = BY_NAME[name]
    # Libraries that print must not print answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**figures: object) -> None:
        print(json.dumps(figures), file=answers, flush=True)

    work: Work = importlib.import_module(MODULES[kind]).work(row)
    versions = [f"{each} {metadata.version(each)}" for each in PACKAGES if each in sys.modules]
    answer(weights=work.weights, compile=work.compile_seconds, versions=versions)
    for line in sys.stdin:
        if line.strip() == "memory":
            answer(mib=peak_mib(work))
        else:
            answer(**work.run())


if __name__ == "__main__":
    main()
