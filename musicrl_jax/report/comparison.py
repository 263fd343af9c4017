"""A base policy beside those finetuned from it: what `musicrl evaluate` measured, laid out as a page.

Letters: n prompts, s seeds, N samples, P points of a series.
"""

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
    "acoustic_quality": "(q - 1) / 4 for the regressor's score q, a pseudo-MOS unless it learned people's ratings",
}

Clips = Sequence[tuple[int, Mapping[str, np.ndarray]]]


def write_comparison(
    path: Path,
    summary: Mapping[str, Any],
    prompts: Sequence[str],
    heard: Clips,
    lost: Clips,
    scores: Mapping[str, Mapping[str, np.ndarray]],
    sample_rate_hz: int,
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
      prompts: n held-out prompts.
      heard: of the first prompts, (row in `prompts`, side -> wav f32 [N]); a side is a policy or something beside it.
      lost: the same of those whose reward fell the most, worst first.
      scores: side -> term -> f32 [n, s], of which [row, 0] is the clip that is heard; a side may have none.
      sample_rate_hz: of the clips.
      run_dir: the run's folder; its name is the title.
      finetuned: policy -> folder of its RL run, whose curves are drawn.
      training: folders of the supervised stages.
      seconds: spent in each stage.
      notes: paragraphs for the end.
    """
    base, *others = summary["policies"]
    terms = [name for name in summary["rewards"] if name != TOTAL]

    def trial(row: int, sides: Mapping[str, np.ndarray]) -> Trial:
        return Trial(
            prompts[row],
            {
                side: Clip(
                    wav,
                    sample_rate_hz,
                    {NAMES.get(term, term): float(values[row, 0]) for term, values in scores.get(side, {}).items()},
                )
                for side, wav in sides.items()
            },
        )

    def run(policy: str, folder: str) -> Run:
        watched = summary["watched"].get(policy)
        words = "" if watched is None else f"Alarm against over-optimisation: silent in {watched['looks']} looks."
        if watched and watched["kept"] is not None:
            kept = "went off in look {looks}; step {kept} is kept, at {kl:.1f} nats a clip from its anchor"
            words = f"Alarm against over-optimisation: {kept.format(**watched)}."
        kl = watched.get("kl") if watched else None
        return Run(policy, _run_curves(policy, _history(folder), terms, kl), words)

    diversity = summary["diversity"]
    report = Report(
        title=Path(run_dir).name,
        facts={
            "Date": datetime.date.today().isoformat(),
            "Machine": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {platform.machine()}",
            "Versions": f"Python {platform.python_version()}, jax {jax.__version__}",
            "Policies": f"{base}, the base; {listed(others)}",
            "Held-out prompts": f"{len(prompts)}, {summary['seeds']} clip(s) of each policy",
        },
        policies=summary["policies"],
        panel=_panel(summary) if "panel" in summary else None,
        rewards=[
            Reward(
                NAMES.get(term, term),
                _intervals(summary["rewards"][term]),
                _intervals(summary["gains"][term]),
                LABELS.get(term, ""),
            )
            for term in (TOTAL, *terms)
        ],
        interval_note=f"95 % bootstrap over {len(prompts)} prompts, {summary['seeds']} clip(s) each.",
        measures=[
            Measure("KL to the base, nats a clip", _intervals(summary["kl"]), "how far the policy moved"),
            Measure(
                "Diversity",
                {policy: _words_or(diversity[policy]) for policy in summary["policies"]},
                "mean distance between two clips' semantic features, 0 if all prompts gave one clip"
                + (f"; of real clips it is {diversity['real']:.2f}" if isinstance(diversity["real"], float) else ""),
            ),
            Measure(
                "Frechet distance to real clips",
                {policy: _words_or(distance) for policy, distance in summary["frechet"].items()},
                "between semantic features of generated and held-out real frames; not trained on; lower is nearer",
            ),
        ],
        kl=_kl_curves(others, summary["kl_by_level"], summary["kl_by_second"]),
        trials=[trial(row, sides) for row, sides in heard],
        trials_rule="The first held-out prompts, as they come; the first seed of each.",
        regressions=[trial(row, sides) for row, sides in lost],
        regressions_rule="Of all held-out prompts, those whose reward fell most, worst first.",
        runs=[run(policy, folder) for policy, folder in finetuned.items()],
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


def _history(folder: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A run's metrics; {} where the model was brought without them."""
    path = Path(folder) / FILE_NAME
    return read_metrics(path) if path.exists() else {}


def _kl_curves(
    policies: Sequence[str], by_level: Mapping[str, Sequence[float]], by_second: Mapping[str, Sequence[float]]
) -> list[Curve]:
    """Where in a frame and when in a clip the policies left the base; those without figures keep their colours."""

    def series(figures: Mapping[str, Sequence[float]], first: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        found = {policy: np.array(figures.get(policy, ()), np.float64) for policy in policies}
        return {policy: (first + np.arange(len(values)), values) for policy, values in found.items()}

    codes = max(map(len, by_level.values()), default=1)  # 1 semantic, twice the coarse levels
    coarse = [f"coarse {level + 1}" for level in range((codes - 1) // 2)]
    curves = [
        Curve(
            "KL to the base by code",
            "code of a frame",
            "nats",
            series(by_level, 0),
            ticks=("semantic", *coarse, *coarse),
        ),
        Curve("KL to the base by second", "second of the clip", "nats", series(by_second, 1)),
    ]
    return [curve for curve, figures in zip(curves, (by_level, by_second), strict=True) if figures]


def _run_curves(
    policy: str,
    log: Mapping[str, tuple[np.ndarray, np.ndarray]],
    terms: Sequence[str],
    kept_kl: float | None,
) -> list[Curve]:
    """Those for which there are metrics in the log, metric -> (steps [P], values [P])."""
    curves = []

    def by_step(title: str, unit: str, names: Sequence[str]) -> None:
        if found := {name: log[name] for name in names if name in log}:
            curves.append(Curve(f"{policy}: {title}", "step", unit, found))

    by_step("reward and its terms", "reward", (TOTAL, *terms))
    if TOTAL in log and "kl" in log:
        series = {TOTAL: _over("kl", TOTAL, log)}
        curves.append(Curve(f"{policy}: reward against KL", "KL to the anchor, nats a clip", "reward", series))
    if "judge_gain" in log and "kl" in log:
        kl, gain = _over("kl", "judge_gain", log)
        distance, error = np.sqrt(np.maximum(kl, 0.0)), _over("kl", "judge_error", log)[1]
        series = {"gain": (distance, gain)}
        if kept_kl is not None:
            ends = np.array([np.min(gain - error), np.max(gain + error)])
            series["kept"] = (np.full(2, np.sqrt(kept_kl)), ends)  # an upright line
        title, x_label = f"{policy}: a held-out judge's gain", "square root of the KL to the anchor"
        curves.append(Curve(title, x_label, "gain over the base", series, {"gain": error}))
    by_step("KL to the anchor", "nats a clip", ("kl",))
    by_step("value loss", "squared error", ("value_loss",))
    by_step("explained variance of the value", "share of Var R", ("explained_variance",))
    return curves


def _over(x: str, y: str, log: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Two metrics at the steps that have both, in the order of x: f64 [P] each."""
    _, at_x, at_y = np.intersect1d(log[x][0], log[y][0], return_indices=True)
    x_values, y_values = log[x][1][at_x], log[y][1][at_y]
    order = np.argsort(x_values, kind="stable")
    return x_values[order], y_values[order]
