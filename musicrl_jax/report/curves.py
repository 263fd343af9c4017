"""Curves of a run: read back from its metrics file, or made from arrays.

Letters: P points of a series.
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
        title: what the chart shows, printed above it.
        x_label: what x counts, e.g. "step".
        y_label: what y measures, with its unit, e.g. "nats a clip".
        series: name -> (x [P], y [P]), drawn in this order. Points that are not finite are left out.
        errors: of some series, name -> [P]: half the height of a band around it.
        ticks: names of x = 0, 1 ... where it counts things that have one; the chart is then of bars.
    """

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, tuple[np.ndarray, np.ndarray]]
    errors: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    ticks: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, (x, y) in self.series.items():
            if np.ndim(x) != 1 or np.shape(x) != np.shape(y):
                raise ValueError(
                    f"curve {self.title!r}, series {name!r}: x has shape {np.shape(x)} and y {np.shape(y)}; "
                    "give two vectors of one length"
                )
            if name in self.errors and np.shape(self.errors[name]) != np.shape(y):
                raise ValueError(
                    f"curve {self.title!r}, series {name!r}: errors has shape {np.shape(self.errors[name])} and y "
                    f"{np.shape(y)}; give one for each point"
                )


def read_metrics(path: str | pathlib.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads a JSON-lines metrics file: metric -> (steps i64 [P] ascending, values f64 [P]).

    Each line is an object {"step": 12, "loss": 0.3, ...}; a metric may be missing from lines. Where a resumed
    run wrote a step again, its later value stands. A last line that was cut off (no newline, as a killed run
    leaves it) is ignored. Any other line that is not such an object is left out as well, and the first is printed.
    Raises FileNotFoundError when there is no file, ValueError when it is no regular file; an empty file gives {}.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"no metrics file at {path}: give the metrics.jsonl of a run folder"
        )
    records, fault = read_records(path)
    if fault:
        print(f"{path} is damaged: {fault}; the {len(records)} good lines are read", flush=True)
    points: dict[str, dict[int, float]] = {}
    for record in records:
        for name, value in record.items():
            if name != "step":
                points.setdefault(name, {})[int(record["step"])] = float(value)
    return {
        name: (
            np.array(sorted(values), np.int64),
            np.array([values[s] for s in sorted(values)], np.float64),
        )
        for name, values in points.items()
    }
