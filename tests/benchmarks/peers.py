"""Speed of two contestants on the same work, in turns: a table in Markdown, ratios first.

    python tests/benchmarks/peers.py . transformers              this checkout and PyTorch
    python tests/benchmarks/peers.py . f1186c7 --rows="3 M"      an older revision, some rows
    python tests/benchmarks/peers.py . limit                     what this machine could do

A contestant is a folder with a checkout, a git revision, `transformers` or `limit`. Each is a
process that has one row's models and works when it is told to, so that one works at a time and
both see the same machine. The least seconds of all turns count. A ratio above 1 says that the first
contestant is as many times as fast, or needs so many times less memory. In brackets are the least
and the greatest ratio of a turn.

Clips are 5 s long, all is in float32 and weights are random. A draw is of the policy's tokens: 225
a second of music, and 200 of MusicGen's decoder, with as many weights. An update is the anchor's
scores, the exact KL, the gradient and AdamW; the baseline is leave-one-out. `contestants/` has the
work of each; PyTorch runs without compilation, on all cores. Peak memory is what an update adds to
the process. Compile seconds are of all functions of the row, without a cache.

PyTorch may have an environment of its own, which --torch_python names:

    python -m venv peers_env && peers_env/bin/pip install 'torch==2.13.*' 'transformers==5.23.*'

Its threads spin while they wait. On a machine with other work that makes it many times slower; set
OMP_WAIT_POLICY=passive there. The load average is printed below the table.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from contestants.rows import COMPILE, MEMORY, ROWS, SECONDS, TINY_ROWS, Row
from startup import ROOT, checkout, environment

HERE = Path(__file__).resolve().parent
THIS = "this build"  # name of the checkout that the script is in
HUGE_PAGES = os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
PATIENCE = 10  # seconds until a process that should end is killed

Figures = dict[str, list[float]]  # values of each turn, by the name of the figure


class ContestantError(Exception):
    """A contestant's process failed; the message has the end of its output."""


# --- contestants ---


class Contestant:
    """One of the two.

    Attributes:
      name: as in the table.
      kind: of `contestants.worker`.
      python: interpreter.
      paths: folders with the modules that it imports.
    """

    def __init__(self, name: str, scratch: Path, torch_python: str):
        """Unpacks a git revision into `scratch`; raises SystemExit for an unknown name."""
        self.name, self.kind, self.python, self.paths = name, name, sys.executable, [HERE]
        if name == "transformers":
            self.python = torch_python
        elif name == "limit":
            self.paths = [ROOT, HERE]
        else:
            check_revision(name)
            root = checkout(name, scratch / f"root_{self.file_name}")
            self.name = THIS if root == ROOT else name
            self.kind, self.paths = kind_of(root), [root, HERE]

    @property
    def file_name(self) -> str:
        """The name without separators."""
        return re.sub(r"\W", "_", self.name)

    def environment(self, cache: Path) -> dict[str, str]:
        """Returns the environment of its process, without a cache of compiled functions.

        Memory comes in huge pages, as launch/quickstart.sh has it.
        """
        paths = os.pathsep.join(map(str, self.paths))
        variables = {"PYTHONPATH": paths, "GLIBC_TUNABLES": HUGE_PAGES}
        return environment(ROOT, cache) | variables


def check_revision(name: str) -> None:
    """Raises SystemExit unless `name` is a folder or a git revision."""
    command = ["git", "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"]
    if (
        not Path(name).is_dir()
        and subprocess.run(command, cwd=ROOT, capture_output=True).returncode
    ):
        raise SystemExit(
            f"{name} is no folder and no git revision: name one, or 'transformers' or 'limit'"
        )


def kind_of(root: Path) -> str:
    """Returns the kind of a checkout; raises SystemExit if it is too old for both."""
    for kind, module in {"systems": "systems/system.py", "studio": "rl/rollout.py"}.items():
        if (root / "musicrl_jax" / module).is_file():
            return kind
    raise SystemExit(f"{root} has no musicrl_jax/systems and no musicrl_jax/rl/rollout.py: too old")


class Process:
    """A contestant at work on one row."""

    def __init__(self, contestant: Contestant, row: Row, scratch: Path):
        """Starts the process, and waits until it is ready."""
        self.contestant, self.row = contestant, row
        self.errors = scratch / f"{contestant.file_name}.txt"
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [contestant.python, "-m", "contestants.worker", contestant.kind, str(row)],
                cwd=scratch,  # which has no module
                env=contestant.environment(scratch / "cache"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.ready = self._answer()

    def ask(self, request: str) -> dict[str, float]:
        """Sends 'run' or 'memory'; returns the answer."""
        with suppress(BrokenPipeError):  # the answer says why
            print(request, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.end()
        output = self.errors.read_text(errors="replace")[-1500:]
        raise ContestantError(f"{self.contestant.name} failed on {self.row}:\n{output}")

    def end(self) -> None:
        """Ends the process with its input."""
        self.process.stdin.close()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


@contextmanager
def processes(
    contestants: Sequence[Contestant], row: Row, scratch: Path
) -> Iterator[dict[str, Process]]:
    """Starts one process after the other; ends them all."""
    started: dict[str, Process] = {}
    try:
        for contestant in contestants:
            print(f"{row}: {contestant.name} gets ready", file=sys.stderr, flush=True)
            started[contestant.name] = Process(contestant, row, scratch)
        yield started
    finally:
        for process in started.values():
            process.end()


# --- measuring ---


def measure(
    contestants: Sequence[Contestant], row: Row, repeats: int, scratch: Path
) -> tuple[dict[str, Figures], dict[str, dict[str, Any]]]:
    """Returns (figures, what the process said when it was ready) of a row, by contestant."""
    figures: dict[str, Figures] = {contestant.name: {} for contestant in contestants}

    def note(name: str, figure: str, value: float) -> None:
        figures[name].setdefault(figure, []).append(value)
        unit = "MiB" if figure == MEMORY else "s"
        print(f"{row}: {name}: {figure}: {value:.4g} {unit}", file=sys.stderr, flush=True)

    with processes(contestants, row, scratch) as started:
        for contestant in contestants:
            name, process = contestant.name, started[contestant.name]
            if (seconds := process.ready["compile"]) is not None:
                note(name, COMPILE, seconds)
            process.ask("run")  # the first call allocates memory
            if row.kind == "rl" and contestant.kind != "limit":
                note(name, MEMORY, process.ask("memory")["mib"])
        for turn in range(repeats):
            for contestant in contestants if turn % 2 == 0 else contestants[::-1]:
                for figure, seconds in started[contestant.name].ask("run").items():
                    note(contestant.name, figure, seconds)
        return figures, {name: process.ready for name, process in started.items()}


# --- the table ---


def cell(row: Row, figure: str, values: Sequence[float] | None) -> str:
    """Returns the least value with its unit; for wavs also the speed beside real time."""
    if not values:
        return ""
    least = min(values)
    if figure == MEMORY:
        return f"{least:,.0f} MiB"
    if figure in ("prompt to wav", "codec decode"):
        return f"{least:.3g} s, {row.batch * row.clip_seconds / least:.3g} x real time"
    return f"{least:.3g} s"


def ratio(first: Sequence[float] | None, second: Sequence[float] | None) -> str:
    """Returns how many times less the first needs, with the range of the turns."""
    if not first or not second or min(first) <= 0:
        return ""
    text = f"**{min(second) / min(first):.3g}x**"
    if len(first) == len(second) > 1:
        turns = [theirs / ours for ours, theirs in zip(first, second, strict=True)]
        text += f" [{min(turns):.3g}, {max(turns):.3g}]"
    return text


def table(names: Sequence[str], measured: Mapping[Row, Mapping[str, Figures]]) -> list[str]:
    """Returns the lines of the table in Markdown."""
    first, second = names
    lines = [f"| work | figure | {first} : {second} | {first} | {second} |", "|---" * 5 + "|"]
    for row, figures in measured.items():
        for figure in (*SECONDS, MEMORY, COMPILE):
            values = [figures[name].get(figure) for name in names]
            if any(values):
                cells = [str(row), figure, ratio(*values)]
                cells += [cell(row, figure, each) for each in values]
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def report(
    names: Sequence[str],
    measured: Mapping[Row, Mapping[str, Figures]],
    ready: Mapping[Row, Mapping[str, Mapping[str, Any]]],
    repeats: int,
) -> None:
    """Prints the table, and below it how it was measured, versions and weights."""
    print("\n".join(table(names, measured)))
    cores, policy = len(os.sched_getaffinity(0)), os.environ.get("OMP_WAIT_POLICY", "not set")
    print(
        f"\nThe least of {repeats} turns, float32, {cores} cores, OMP_WAIT_POLICY {policy}; load "
        f"average of the last minutes {', '.join(f'{load:.1f}' for load in os.getloadavg())}."
    )
    for name in names:
        versions = {version for each in ready.values() for version in each[name]["versions"]}
        weights = {str(row): f"{each[name]['weights'] / 1e6:.2f} M" for row, each in ready.items()}
        listed = ", ".join(f"{row}: {count}" for row, count in weights.items())
        print(f"\n{name}: {', '.join(sorted(versions))}. Weights: {listed}.")


def main() -> None:
    """Measures both contestants row by row, and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "contestants", nargs=2, help="folder or git revision of a checkout, transformers or limit"
    )
    parser.add_argument("--rows", nargs="+", default=[""], help="only rows with one of these texts")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each row")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to see that it runs")
    parser.add_argument(
        "--torch_python", default=sys.executable, help="interpreter that has torch and transformers"
    )
    parser.add_argument("--json_file", help="keeps every figure")
    flags = parser.parse_args()
    available = TINY_ROWS if flags.tiny else ROWS
    rows = [row for row in available if any(part in str(row) for part in flags.rows)]
    if not rows:
        parser.error(f"--rows={flags.rows} names none of: {'; '.join(map(str, available))}")
    if flags.repeats < 1:
        parser.error(f"--repeats={flags.repeats} must be 1 or more")

    measured, ready, failures = {}, {}, []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        pair = [Contestant(name, scratch, flags.torch_python) for name in flags.contestants]
        names = [contestant.name for contestant in pair]
        if names[0] == names[1]:
            parser.error(f"both contestants are {names[0]}: name two")
        for row in rows:
            try:
                measured[row], ready[row] = measure(pair, row, flags.repeats, scratch)
            except ContestantError as error:
                failures.append(str(error))
                print(error, file=sys.stderr, flush=True)
    report(names, measured, ready, flags.repeats)
    if flags.json_file:
        stored = {str(row): figures for row, figures in measured.items()}
        Path(flags.json_file).write_text(json.dumps(stored, indent=1) + "\n")
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
