"""Shows a run while it goes on, in charts and on a page: clips of fixed prompts, curves, speed.

Legend: n clips, N samples.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from musicrl_jax.core import extras, hosts
from musicrl_jax.core.metrics import FILE_NAME, MetricWriter
from musicrl_jax.report.curves import Curve, Log, read_metrics

PAGE = "page.html"
CLIPS = 4  # on the page
Sides = Mapping[str, np.ndarray]  # clips f32 [n, N] by name, such as 'base' and 'policy'


@dataclasses.dataclass
class LiveCharts:
    """Writes the charts and the page of one run.

    Attributes:
      writer: writes the run's charts.
      directory: folder of the run, which gets the page.
      clips_per_step: clips that a step computes.
      sample_rate_hz: sample rate of the clips on the page.
      titles: titles of the n clips, such as their prompts.
      rule: says in a sentence what the clips are.
      curves: returns the curves of the run's metrics.
    """

    writer: MetricWriter
    directory: Path
    clips_per_step: int
    sample_rate_hz: int
    titles: Sequence[str]
    rule: str
    curves: Callable[[Log], list[Curve]]

    def __post_init__(self) -> None:
        self._has_page = True
        try:
            extras.check("The page of a run", "report", "jinja2", "matplotlib")
        except ModuleNotFoundError as error:  # charts need no extra
            self._has_page = False
            if hosts.first():
                print(error, flush=True)
        self._time: float | None = None  # end of the last step
        self._clips_per_second = float("nan")

    def end_step(self, step: int) -> None:
        """Charts the speed; the first step after a start is not counted, since it compiles."""
        now = time.monotonic()
        # Times differ between two equal runs, so they are no metrics.
        if self._time is not None:
            self._clips_per_second = self.clips_per_step / (now - self._time)
            self.writer.chart(step, {"clips_per_second": self._clips_per_second})
        self._time = now

    def show(self, step: int, sides: Sides) -> None:
        """Charts the clips of a step, and writes the page anew. Time for it is no step's."""
        # The clips, numbered as the titles on the page.
        if hosts.first():
            for name, wavs in sides.items():
                for number, wav in enumerate(wavs, start=1):
                    self.writer.clip(step, f"clip_{number}/{name}", wav, self.sample_rate_hz)
            if self._has_page:
                self._write_page(step, sides)
        # The next step starts now.
        if self._time is not None:
            self._time = time.monotonic()

    def _write_page(self, step: int, sides: Sides) -> None:
        from musicrl_jax.report import page  # needs the extra `report`

        facts = {"Steps done": f"{step + 1:,}"}
        if np.isfinite(self._clips_per_second):
            facts["Clips a second, in the last step"] = f"{self._clips_per_second:.2f}"
        # Clips stand beside each other, one row a title.
        trials = []
        for row, title in enumerate(self.titles if sides else ()):
            clips = {
                name: page.Clip(wavs[row], self.sample_rate_hz, {}) for name, wavs in sides.items()
            }
            trials.append(page.Trial(title, clips))
        # Curves come from the file, so a resumed run shows those of earlier attempts too.
        curves = self.curves(read_metrics(self.directory / FILE_NAME))
        live = page.Live(self.directory.name, facts, curves, trials, self.rule)
        page.write_live_page(self.directory / PAGE, live)


def loss_curves(log: Log) -> list[Curve]:
    """Returns a curve of each metric of supervised training."""
    names = [name for name in log if not name.startswith("validation/")]
    return [Curve(name, "step", name, {name: log[name]}) for name in names]
