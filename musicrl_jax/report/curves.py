"""Curves of a run: read back from its metrics file, or made from arrays.

Letters: P points of a series.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np


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
    """Read a JSON-lines metrics file: metric -> (steps i64 [P] ascending, values f64 [P]).

    Each line is an object {"step": 12, "loss": 0.3, ...}; a metric may be missing from lines. Where a resumed
    run wrote a step again, its later value stands. A last line that was cut off (no newline, as a killed run
    leaves it) is ignored; nothing else is: ValueError names file and line of what is not such an object.
    Raises FileNotFoundError when there is no file; an empty file gives {}.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no metrics file at {path}: give the metrics.jsonl of a run folder")
    *lines, tail = path.read_bytes().split(b"\n")
    points: dict[str, dict[int, float]] = {}
    for number, line in enumerate([*lines, tail], start=1):
        try:
            record = json.loads(line)
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
            if number > len(lines):
                break
            raise ValueError(f"{path}, line {number}: {line[:80]!r} is no JSON: mend or delete it") from error
        numbers = isinstance(record, dict) and all(type(value) in (int, float) for value in record.values())
        if not numbers or type(record.get("step")) is not int:
            raise ValueError(
                f'{path}, line {number}: {line[:80]!r} must be an object of numbers with an integer "step": '
                "mend or delete it"
            )
        step = record.pop("step")
        for name, value in record.items():
            points.setdefault(name, {})[step] = float(value)
    return {
        name: (np.array(sorted(values), np.int64), np.array([values[s] for s in sorted(values)], np.float64))
        for name, values in points.items()
    }
