"""Where a run's numbers go: TensorBoard for the eyes, `metrics.jsonl` for programs."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import tensorboardX

from musicrl_jax.core import hosts
from musicrl_jax.core.files import set_aside, write_text
from musicrl_jax.core.manifest import parse_json, read_regular

FILE_NAME = "metrics.jsonl"
LARGEST = (
    2**63
)  # whole numbers from here on are damage: no counter gets there, and NumPy does not hold them


class MetricWriter:
    """Appends scalars to `directory`/metrics.jsonl, one JSON object a step, and to TensorBoard event files.

    A run that resumes at `start_step` first drops the lines at and past it, so that no step stands
    twice. A damaged file is set aside, and its good lines are kept. Of several hosts the first writes.
    """

    def __init__(self, directory: str | Path, start_step: int = 0):
        self._writes = hosts.first()
        if self._writes:
            path = Path(directory) / FILE_NAME
            path.parent.mkdir(parents=True, exist_ok=True)
            _drop_from(path, start_step)
            self._file = path.open("a")
            self._board = tensorboardX.SummaryWriter(
                str(path.parent / "tensorboard"), purge_step=start_step
            )
        hosts.wait_for_all("metrics")  # who reads them must not see what was dropped

    def write(self, step: int, metrics: Mapping[str, float], prefix: str = "") -> None:
        """Writes the metrics of one step, their names behind `prefix`."""
        if not self._writes:
            return
        numbers = {prefix + name: float(value) for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **numbers}) + "\n")
        self._file.flush()
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes both."""
        if not self._writes:
            return
        self._file.close()
        self._board.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_records(path: str | Path) -> tuple[list[dict[str, float]], str]:
    """Reads a metrics file, good lines only.

    Returns:
      The records, {"step": 12, "loss": 0.3, ...}, in the order of the file, and what is wrong with
      the first line that is no such record, "" if all are. A last line without its newline is what
      a killed run leaves: it is read if it is whole and ignored otherwise, and is no fault. A step
      that was written again is none either.

    Raises ValueError or OSError, which name the file, if it cannot be read.
    """
    *lines, tail = read_regular(path).split(b"\n")
    cut = tail.startswith(b'{"step"'[: len(tail)])
    if not cut:
        lines.append(tail)  # such as the NUL bytes that a power cut leaves
    records, fault = [], ""
    for number, line in enumerate(lines, start=1):
        try:
            records.append(_record(line))
        except ValueError as error:
            fault = fault or f"line {number} {error}"
    if cut:
        with contextlib.suppress(ValueError):
            records.append(_record(tail))
    return records, fault


def _record(line: bytes) -> dict[str, float]:
    """Parses a line; ValueError that says what is wrong with it."""
    try:
        record: Any = parse_json(line)
    except ValueError as error:
        raise ValueError(f"({line[:60]!r}) {error}") from error
    numbers = isinstance(record, dict) and all(
        type(value) is float or (type(value) is int and abs(value) < LARGEST)
        for value in record.values()
    )
    if not numbers or type(record.get("step")) is not int or record["step"] < 0:
        raise ValueError(f'({line[:60]!r}) is no object of numbers with a whole number "step"')
    return record


def _drop_from(path: Path, start_step: int) -> None:
    """Keeps the whole lines below start_step; a line cut short by a kill goes too."""
    if not os.path.lexists(path):
        return
    try:
        records, fault = read_records(path)
    except (ValueError, OSError) as error:
        records, fault = [], str(error).removeprefix(f"{path} ")
    if fault:
        set_aside(path, fault)
        print(f"{path}: {len(records)} good lines are kept", flush=True)
    # Of a step that stands twice with the same metrics the later line holds.
    lines = {(record["step"], *record): record for record in records if record["step"] < start_step}
    write_text(path, "".join(json.dumps(record) + "\n" for record in lines.values()))
