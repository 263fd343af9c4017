"""Where a run's numbers go: TensorBoard for the eyes, `metrics.jsonl` for programs."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import tensorboardX

from musicrl_jax.core import hosts
from musicrl_jax.core.files import write_text

FILE_NAME = "metrics.jsonl"


class MetricWriter:
    """Appends scalars to `directory`/metrics.jsonl, one JSON object a step, and to TensorBoard event files.

    A run that resumes at `start_step` first drops the lines at and past it, so that no step stands twice. Of several
    hosts the first writes.
    """

    def __init__(self, directory: str | Path, start_step: int = 0):
        self._writes = hosts.first()
        if self._writes:
            path = Path(directory) / FILE_NAME
            path.parent.mkdir(parents=True, exist_ok=True)
            _drop_from(path, start_step)
            self._file = path.open("a")
            self._board = tensorboardX.SummaryWriter(str(path.parent / "tensorboard"), purge_step=start_step)
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
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _drop_from(path: Path, start_step: int) -> None:
    """Keeps the whole lines below start_step; a line cut short by a kill goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        if line.endswith("}") and json.loads(line)["step"] < start_step:
            kept.append(line + "\n")
    write_text(path, "".join(kept))
