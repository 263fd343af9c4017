"""A base policy beside those finetuned from it: the page of what `musicrl evaluate` measured.

Legend: n prompts, s seeds, N samples, P points of a series.
"""

import dataclasses
import datetime
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from musicrl_jax.core.metrics import FILE_NAME
from musicrl_jax.report.curves import Curve, read_metrics
from musicrl_jax.report.page import (
    Clip,
    Figure,
    Interval,
    Match,
    Measure,
    Panel,
    Report,
    Reward,
    Run,
    Trial,
    listed,
    write_page,
)

TOTAL = "reward"
NAMES = {"opinion": "opinion, simulated listeners"}
LABELS = {
    TOTAL: "the weighted sum of the terms below",
    "text_adherence": "cosine of MuLan's embeddings of text and clip",
    "acoustic_quality": "(q - 1) / 4 for the regressor's score q, a pseudo-MOS unless it learned "
    "people's ratings",
}

Clips = Sequence[tuple[int, Mapping[str, np.ndarray]]]
Log = Mapping[str, tuple[np.ndarray, np.ndarray]]  # metric -> (steps [P], values [P])


@dataclasses.dataclass(frozen=True)
class Sounds:
    """The clips of a comparison.

    Attributes:
      prompts: n held-out prompts.
      first: of the first prompts, (row in `prompts`, side -> wav f32 [N]); a side is a policy or
        something beside it.
      worst: the same of those whose reward fell the most, worst first.
      scores: side -> term -> f32 [n, s], of which [row, 0] is the clip on the page; a side may have
        none.
      sample_rate_hz: of the clips.
    """

    prompts: Sequence[str]
    first: Clips
    worst: Clips
    scores: Mapping[str, Mapping[str, np.ndarray]]
    sample_rate_hz: int

    def trials(self, clips: Clips) -> list[Trial]:
        """Returns clips as they stand on the page, each with its scores."""
        trials = []
        for row, sides in clips:
            side_clips = {}
            for side, wav in sides.items():
                terms = self.scores.get(side, {}).items()
                scores = {NAMES.get(term, term): float(values[row, 0]) for term, values in terms}
                side_clips[side] = Clip(wav, self.sample_rate_hz, scores)
            trials.append(Trial(self.prompts[row], side_clips))
        return trials


def write_comparison(
    path: Path,
    summary: Mapping[str, Any],
    sounds: Sounds,
    run_dir: str,
    finetuned: Mapping[str, str],
    training: Sequence[str],
    seconds: Mapping[str, float],
    notes: Sequence[str],
) -> None:
    """Writes the page.

    Args:
      path: of the HTML file.
      summary: what `musicrl_jax.evaluate` returns.
      sounds: the clips.
      run_dir: the run's folder; its name is the title.
      finetuned: policy -> folder of its RL run, whose curves are drawn.
      training: folders of the supervised stages.
      seconds: spent in each stage.
      notes: paragraphs for the end.
    """
    base, *others = summary["policies"]
    terms = [name for name in summary["rewards"] if name != TOTAL]
    count, device = len(sounds.prompts), jax.devices()[0]
    report = Report(
        title=Path(run_dir).name,
        facts={
            "Date": datetime.date.today().isoformat(),
            "Machine": f"{jax.device_count()} x {device.device_kind}, {platform.machine()}",
            "Versions": f"Python {platform.python_version()}, jax {jax.__version__}",
            "Policies": f"{base}, the base; {listed(others)}",
            "Held-out prompts": f"{count}, {summary['seeds']} clip(s) of each policy",
        },
        policies=summary["policies"],
        panel=_panel(summary) if "panel" in summary else None,
        rewards=[_reward(summary, term) for term in (TOTAL, *terms)],
        interval_note=f"95 % bootstrap over {count} prompts, {summary['seeds']} clip(s) each.",
        measures=_measures(summary),
        kl=_kl_curves(summary, others),
        trials=sounds.trials(sounds.first),
        trials_rule="The first held-out prompts, as they come; the first seed of each.",
        regressions=sounds.trials(sounds.worst),
        regressions_rule="Of all held-out prompts, those whose reward fell most, worst first.",
        runs=[_run(summary, policy, folder, terms) for policy, folder in finetuned.items()],
        runs_rule=summary["rule"],
        training=[
            Curve(Path(folder).name, "step", "loss", {"training": history["loss"]})
            for folder in training
            if (history := _history(folder))
        ],
        stages=list(seconds.items()),
        identity={**summary["identity"]["hashes"], "seed": str(summary["seed"])},
        notes=notes,
    )
    write_page(path, report)


def _reward(summary: Mapping[str, Any], term: str) -> Reward:
    means, gains = _intervals(summary["rewards"][term]), _intervals(summary["gains"][term])
    return Reward(NAMES.get(term, term), means, gains, LABELS.get(term, ""))


def _measures(summary: Mapping[str, Any]) -> list[Measure]:
    """Returns the figures that nothing was trained on."""
    diversity, frechet = (
        {policy: _words_or(value) for policy, value in summary[name].items()}
        for name in ("diversity", "frechet")
    )
    real = diversity.pop("real")
    beside = f"; of real clips it is {real:.2f}" if isinstance(real, float) else ""
    return [
        Measure(
            "KL to the base, nats a clip", _intervals(summary["kl"]), "how far the policy moved"
        ),
        Measure(
            "Diversity",
            diversity,
            "mean distance between two clips' semantic features, 0 if all prompts gave one clip"
            + beside,
        ),
        Measure(
            "Frechet distance to real clips",
            frechet,
            "between semantic features of generated and held-out real frames; not trained on; "
            "lower is nearer",
        ),
    ]


def _run(summary: Mapping[str, Any], policy: str, folder: str, terms: Sequence[str]) -> Run:
    """Returns an RL run: its curves, and what its alarm did."""
    alarm = summary["watched"].get(policy)
    words = "" if alarm is None else f"silent in {alarm['looks']} looks."
    if alarm and alarm["kept"] is not None:
        words = "went off in look {looks}; step {kept} is kept, at {kl:.1f} nats a clip from its anchor."
        words = words.format(**alarm)
    curves = _run_curves(policy, _history(folder), terms, alarm.get("kl") if alarm else None)
    return Run(policy, curves, words and f"Alarm against over-optimisation: {words}")


def _interval(figure: Mapping[str, Any]) -> Figure:
    return figure["too_small"] if "too_small" in figure else Interval(**figure)


def _intervals(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Figure]:
    return {policy: _interval(figure) for policy, figure in figures.items()}


def _words_or(value: float | Mapping[str, str]) -> float | str:
    """Returns a number as it is, and the words of what is none."""
    return value["too_small"] if isinstance(value, Mapping) else value


def _panel(summary: Mapping[str, Any]) -> Panel:
    matches = [
        Match(
            *(pair.get(name) for name in ("first", "second", "win", "tie", "loss")),
            _interval(pair["win_rate"]),
            pair.get("wilcoxon_p"),
        )
        for pair in summary["pairs"]
    ]
    opinions = {**summary["mos"], "real clips": summary["real"]["mos"]}
    return Panel(**summary["panel"], matches=matches, opinions=_intervals(opinions))


def _history(folder: str) -> Log:
    """Returns a run's metrics; {} if the model was brought without them."""
    path = Path(folder) / FILE_NAME
    return read_metrics(path) if path.exists() else {}


def _kl_curves(summary: Mapping[str, Any], policies: Sequence[str]) -> list[Curve]:
    """Returns where in a frame and when in a clip the policies left the base.

    Policies without figures keep their colours.
    """

    def series(figures: Mapping[str, Sequence[float]], first: int) -> Log:
        values = {policy: np.array(figures.get(policy, ()), np.float64) for policy in policies}
        return {policy: (first + np.arange(len(each)), each) for policy, each in values.items()}

    by_level, by_second = summary["kl_by_level"], summary["kl_by_second"]
    curves = []
    if by_level:
        names = tuple(summary["token_names"])
        title = "KL to the base by code"
        curves.append(Curve(title, "code of a frame", "nats", series(by_level, 0), ticks=names))
    if by_second:
        title = "KL to the base by second"
        curves.append(Curve(title, "second of the clip", "nats", series(by_second, 1)))
    return curves


def _run_curves(
    policy: str,
    log: Log,
    terms: Sequence[str],
    kept_kl: float | None,
) -> list[Curve]:
    """Returns the curves for which there are metrics in the log."""
    curves = []

    def by_step(title: str, unit: str, names: Sequence[str]) -> None:
        if series := {name: log[name] for name in names if name in log}:
            curves.append(Curve(f"{policy}: {title}", "step", unit, series))

    by_step("reward and its terms", "reward", (TOTAL, *terms))
    if TOTAL in log and "kl" in log:
        series = {TOTAL: _over("kl", TOTAL, log)}
        title, x_label = f"{policy}: reward against KL", "KL to the anchor, nats a clip"
        curves.append(Curve(title, x_label, "reward", series))
    if "judge_gain" in log and "kl" in log:
        kl, gain = _over("kl", "judge_gain", log)
        distance, error = np.sqrt(np.maximum(kl, 0.0)), _over("kl", "judge_error", log)[1]
        series = {"gain": (distance, gain)}
        if kept_kl is not None:
            ends = np.array([np.min(gain - error), np.max(gain + error)])
            series["kept"] = (np.full(2, np.sqrt(kept_kl)), ends)  # an upright line
        title = f"{policy}: a held-out judge's gain"
        x_label, y_label = "square root of the KL to the anchor", "gain over the base"
        curves.append(Curve(title, x_label, y_label, series, {"gain": error}))
    by_step("KL to the anchor", "nats a clip", ("kl",))
    by_step("value loss", "squared error", ("value_loss",))
    by_step("explained variance of the value", "share of Var R", ("explained_variance",))
    return curves


def _over(x: str, y: str, log: Log) -> tuple[np.ndarray, np.ndarray]:
    """Returns two metrics at the steps that have both, in the order of x: f64 [P] each."""
    _, at_x, at_y = np.intersect1d(log[x][0], log[y][0], return_indices=True)
    x_values, y_values = log[x][1][at_x], log[y][1][at_y]
    order = np.argsort(x_values, kind="stable")
    return x_values[order], y_values[order]
