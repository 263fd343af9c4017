"""Writes a run's metrics: to `metrics.jsonl` for programs, to TensorBoard and W&B for people.

Legend: n values, N samples.
"""

import contextlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorboardX

from musicrl_jax.core import extras, hosts
from musicrl_jax.core.files import set_aside, write_text
from musicrl_jax.core.manifest import parse_json, read_regular

FILE_NAME = "metrics.jsonl"
INT_LIMIT = 2**63  # larger integers are damage: no counter gets there, and NumPy cannot hold them


WANDB = "MUSICRL_WANDB"  # environment variable; if it is 1, runs are logged to W&B as well
WANDB_ID = "wandb_id.txt"


class MetricWriter(contextlib.AbstractContextManager):
    """Appends scalars to `directory`/metrics.jsonl, one JSON object per step, and to the charts.

    The charts are TensorBoard's, in `directory`/tensorboard, and with MUSICRL_WANDB=1 those of
    Weights & Biases. They also have histograms, clips, and numbers that differ between two equal
    runs, such as times. A run that resumes at `start_step` first drops the lines from that step
    on, so no step appears twice; its charts go on. A damaged file is set aside, and its valid lines
    are kept. Only the first host writes.
    """

    def __init__(self, directory: str | Path, start_step: int = 0):
        self._writes = hosts.first()
        if self._writes:
            path = Path(directory) / FILE_NAME
            path.parent.mkdir(parents=True, exist_ok=True)
            self._wandb = _wandb_run(path.parent) if os.environ.get(WANDB) == "1" else None
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
        self.chart(step, numbers)

    def chart(self, step: int, numbers: Mapping[str, float]) -> None:
        """Writes numbers to the charts alone."""
        if not self._writes:
            return
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)
        self._log(step, numbers)

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        """Writes the distribution of values [n]; those that are not finite are left out."""
        finite = values[np.isfinite(values)]
        if not self._writes or not len(finite):
            return
        # A name of its own: TensorBoard keeps one kind of chart for a name.
        self._board.add_histogram(f"histogram/{name}", finite, step)
        if self._wandb:
            import wandb

            self._log(step, {f"histogram/{name}": wandb.Histogram(finite)})

    def clip(self, step: int, name: str, wav: np.ndarray, sample_rate_hz: int) -> None:
        """Writes a clip to listen to, f32 [N] in [-1, 1]."""
        if not self._writes:
            return
        self._board.add_audio(name, wav[:, None], step, sample_rate=sample_rate_hz)
        if self._wandb:
            import wandb

            self._log(step, {name: wandb.Audio(wav, sample_rate=sample_rate_hz)})

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        if self._wandb:  # W&B ignores a step that goes back, so the step is a value like others
            self._wandb.log({**values, "step": step})

    def close(self) -> None:
        """Flushes and closes the file and the charts."""
        if self._writes:
            self._file.close()
            self._board.close()
            if self._wandb:
                self._wandb.finish()

    def __exit__(self, *_: object) -> None:
        self.close()


def _wandb_run(directory: Path) -> Any:
    """Starts a W&B run, or continues the one of this folder.

    Project, entity and mode are those of W&B's own environment variables, such as WANDB_PROJECT and
    WANDB_MODE=offline.
    """
    extras.check("--wandb", "wandb", "wandb")
    import wandb

    path = directory / WANDB_ID
    if not path.exists():
        write_text(path, secrets.token_hex(8))
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "musicrl"),
        name=directory.name,
        dir=str(directory),
        id=path.read_text(),
        resume="allow",
    )
    run.define_metric("*", step_metric="step")
    return run


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
