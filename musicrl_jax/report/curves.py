"""Curves of a run, read from its metrics file or made from arrays.

Legend: P points of a series.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from musicrl_jax.core.metrics import read_records


@dataclasses.dataclass(frozen=True)
class Curve:
    """One small chart: series over a common x axis, usually steps.

    Attributes:
      title: printed above the chart.
      x_label: e.g. "step".
      y_label: with its unit, e.g. "nats a clip".
      series: name -> (x [P], y [P]), in drawing order. Points that are not finite are left out.
      errors: name -> [P], half the height of a band around a series.
      ticks: names of x = 0, 1, ...; with them the chart has bars.
    """

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, tuple[np.ndarray, np.ndarray]]
    errors: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    ticks: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, (x, y) in self.series.items():
            shapes = {"x": np.shape(x), "errors": np.shape(self.errors.get(name, y))}
            for part, shape in shapes.items():
                if shape != np.shape(y) or len(shape) != 1:
                    raise ValueError(
                        f"curve {self.title!r}, series {name!r}: {part} has shape {shape} and y "
                        f"{np.shape(y)}: give two vectors of one length"
                    )


def read_metrics(path: str | pathlib.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns metric -> (steps i64 [P], ascending; values f64 [P]) of a JSON-lines metrics file.

    Each line is an object {"step": 12, "loss": 0.3, ...}; lines may lack metrics. If a resumed run
    wrote a step again, the later value counts. An incomplete last line (a killed run leaves one
    without newline) is ignored. Other wrong lines are left out, and the first is printed.

    Raises FileNotFoundError without a file, ValueError if it is not a regular file.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"no metrics file at {path}: give the metrics.jsonl of a run folder"
        )
    records, fault = read_records(path)
    if fault:
        print(f"{path} is damaged: {fault}; the {len(records)} good lines are read", flush=True)
    # metric -> step -> value; a later line replaces an earlier one.
    points: dict[str, dict[int, float]] = {}
    for record in records:
        for name in record.keys() - {"step"}:
            points.setdefault(name, {})[int(record["step"])] = float(record[name])
    # As arrays, by step.
    metrics = {}
    for name in sorted(points):
        steps = sorted(points[name])
        values = [points[name][step] for step in steps]
        metrics[name] = np.array(steps, np.int64), np.array(values, np.float64)
    return metrics
