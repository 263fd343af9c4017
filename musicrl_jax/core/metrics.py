"""Writes a run's metrics: to TensorBoard for people, to `metrics.jsonl` for programs."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import tensorboardX

from musicrl_jax.core import hosts
from musicrl_jax.core.files import set_aside, write_text
from musicrl_jax.core.manifest import parse_json, read_regular

FILE_NAME = "metrics.jsonl"
INT_LIMIT = 2**63  # larger integers are damage: no counter gets there, and NumPy cannot hold them


class MetricWriter(contextlib.AbstractContextManager):
    """Appends scalars to `directory`/metrics.jsonl, one JSON object per step, and to TensorBoard.

    A run that resumes at `start_step` first drops the lines from that step on, so no step appears
    twice. A damaged file is set aside, and its valid lines are kept. Only the first host writes.
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
        hosts.wait_for_all("metrics")  # no host may read the lines that the first one drops

    def write(self, step: int, metrics: Mapping[str, float], prefix: str = "") -> None:
        """Writes the metrics of one step, with `prefix` before their names."""
        if not self._writes:
            return
        numbers = {prefix + name: float(value) for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **numbers}) + "\n")
        self._file.flush()
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes both files."""
        if self._writes:
            self._file.close()
            self._board.close()

    def __exit__(self, *_: object) -> None:
        self.close()


# --- Reading. ---


def read_records(path: str | Path) -> tuple[list[dict[str, float]], str]:
    """Reads the valid lines of a metrics file.

    A last line without a newline, which a killed run leaves, is read if it is whole and ignored
    otherwise. Neither it nor a repeated step is a fault.

    Returns:
      The records, {"step": 12, "loss": 0.3, ...}, in the order of the file, and a description of
      the first invalid line, "" if there is none.

    Raises:
      ValueError: if the path is not a regular file; names it.
      OSError: if there is no file or it cannot be read; names it.
    """
    # All whole lines.
    *lines, tail = read_regular(path).split(b"\n")
    is_cut = tail.startswith(b'{"step"'[: len(tail)])
    if not is_cut:
        lines.append(tail)  # such as the NUL bytes that a power cut leaves
    records, fault = [], ""
    for number, line in enumerate(lines, start=1):
        try:
            records.append(_record(line))
        except ValueError as error:
            fault = fault or f"line {number} {error}"
    # The last line, if a kill has not cut it.
    if is_cut:
        with contextlib.suppress(ValueError):
            records.append(_record(tail))
    return records, fault


def _record(line: bytes) -> dict[str, float]:
    """Parses a line. Raises ValueError, which says what is wrong with it."""
    where = f"({line[:60]!r})"
    record = parse_json(line, where)
    # Not isinstance, because True is an int.
    is_numbers = isinstance(record, dict) and all(
        type(value) is float or (type(value) is int and abs(value) < INT_LIMIT)
        for value in record.values()
    )
    if not is_numbers or type(record.get("step")) is not int or record["step"] < 0:
        raise ValueError(f'{where} is no object of numbers with a whole number "step"')
    return record


def _drop_from(path: Path, start_step: int) -> None:
    """Rewrites a metrics file with its valid lines below start_step."""
    if not os.path.lexists(path):
        return
    try:
        records, fault = read_records(path)
    except (ValueError, OSError) as error:
        records, fault = [], str(error).removeprefix(f"{path} ")
    if fault:
        set_aside(path, fault)
        print(f"{path}: {len(records)} good lines are kept", flush=True)
    # Of several lines with the same step and metric names the last is kept.
    lines = {(record["step"], *record): record for record in records if record["step"] < start_step}
    write_text(path, "".join(json.dumps(record) + "\n" for record in lines.values()))
