"""Curves of a run, read from its metrics file or made from arrays.

Legend: P points of a series.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from musicrl_jax.core.metrics import read_records

Log = Mapping[str, tuple[np.ndarray, np.ndarray]]  # metric -> (steps [P], values [P])

TOTAL = "reward"  # the metric of the weighted sum of a mixture


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


def read_metrics(path: str | pathlib.Path) -> Log:
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


# --- curves of a run of RL ---


def run_curves(
    policy: str, log: Log, terms: Sequence[str], alarm_kl: float | None = None
) -> list[Curve]:
    """Returns the curves of a run of RL.

    Args:
      policy: name of the policy.
      log: the run's metrics; those that are missing have no curve.
      terms: names of the reward terms.
      alarm_kl: KL of the step that the held-out judge's alarm chose, in nats a clip.
    """
    return [
        *_step_curves(policy, log, [("reward and its terms", "reward", (TOTAL, *terms))]),
        *_kl_against(policy, log, alarm_kl),
        *_step_curves(
            policy,
            log,
            [
                ("KL to the anchor", "nats a clip", ("kl",)),
                ("value loss", "squared error", ("value_loss",)),
                ("explained variance of the value", "share of Var R", ("explained_variance",)),
            ],
        ),
    ]


def _step_curves(
    policy: str, log: Log, charts: Sequence[tuple[str, str, Sequence[str]]]
) -> list[Curve]:
    """Returns a curve for each (title, unit, metrics) over steps, if the log has any metric."""
    curves = []
    for title, unit, names in charts:
        if series := {name: log[name] for name in names if name in log}:
            curves.append(Curve(f"{policy}: {title}", "step", unit, series))
    return curves


def _kl_against(policy: str, log: Log, alarm_kl: float | None) -> list[Curve]:
    """Returns the reward and the held-out judge's gain over the KL to the anchor."""
    curves = []
    if TOTAL in log and "kl" in log:
        series = {TOTAL: _over("kl", TOTAL, log)}
        title, x_label = f"{policy}: reward against KL", "KL to the anchor, nats a clip"
        curves.append(Curve(title, x_label, "reward", series))
    if "judge_gain" in log and "kl" in log:
        kl, gain = _over("kl", "judge_gain", log)
        distance, error = np.sqrt(np.maximum(kl, 0.0)), _over("kl", "judge_error", log)[1]
        series = {"gain": (distance, gain)}
        # A vertical line at the step that the alarm chose.
        if alarm_kl is not None:
            ends = np.array([np.min(gain - error), np.max(gain + error)])
            series["chosen step"] = np.full(2, np.sqrt(alarm_kl)), ends
        title = f"{policy}: a held-out judge's gain"
        x_label, y_label = "square root of the KL to the anchor", "gain over the base"
        curves.append(Curve(title, x_label, y_label, series, {"gain": error}))
    return curves


def _over(x: str, y: str, log: Log) -> tuple[np.ndarray, np.ndarray]:
    """Returns two metrics at the steps that have both, in the order of x: f64 [P] each."""
    _, at_x, at_y = np.intersect1d(log[x][0], log[y][0], return_indices=True)
    x_values, y_values = log[x][1][at_x], log[y][1][at_y]
    order = np.argsort(x_values, kind="stable")
    return x_values[order], y_values[order]
