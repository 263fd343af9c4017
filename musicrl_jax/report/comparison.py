"""Page of a base policy and those finetuned from it, from the results of `musicrl evaluate`.

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
from musicrl_jax.report import page
from musicrl_jax.report.curves import TOTAL, Curve, Log, read_metrics, run_curves
from musicrl_jax.report.page import Figure, write_page

# Terms that are shown under other names.
NAMES = {"opinion": "opinion, simulated listeners"}
# Explanations of terms, beside their names.
LABELS = {
    TOTAL: "the weighted sum of the terms below",
    "text_adherence": "cosine of MuLan's embeddings of text and clip",
    "acoustic_quality": "(q - 1) / 4 for the regressor's score q, a pseudo-MOS unless it learned "
    "people's ratings",
}

Clips = Sequence[tuple[int, Mapping[str, np.ndarray]]]
# Name -> (x [P], y [P]).


@dataclasses.dataclass(frozen=True)
class Sounds:
    """The clips of a comparison.

    Attributes:
      prompts: n held-out prompts.
      first: (row in `prompts`, side -> wav f32 [N]) of the first prompts. A side is a policy or
        another source of clips.
      worst: the same for the prompts with the largest loss of reward, worst first.
      scores: side -> term -> f32 [n, s]; [row, 0] is the clip on the page. Sides may have none.
      sample_rate_hz: of the clips.
    """

    prompts: Sequence[str]
    first: Clips
    worst: Clips
    scores: Mapping[str, Mapping[str, np.ndarray]]
    sample_rate_hz: int

    def trials(self, clips: Clips) -> list[page.Trial]:
        """Returns clips as the page shows them, each with its scores."""
        trials = []
        for row, sides in clips:
            side_clips = {}
            for side, wav in sides.items():
                terms = self.scores.get(side, {}).items()
                scores = {NAMES.get(term, term): float(values[row, 0]) for term, values in terms}
                side_clips[side] = page.Clip(wav, self.sample_rate_hz, scores)
            trials.append(page.Trial(self.prompts[row], side_clips))
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
      summary: the result of `musicrl_jax.evaluate`.
      sounds: the clips.
      run_dir: the run's folder; its name is the title.
      finetuned: policy -> folder of its RL run, for the curves.
      training: folders of the supervised stages.
      seconds: of each stage.
      notes: paragraphs for the end.
    """
    # What was compared.
    base, *others = summary["policies"]
    terms = [name for name in summary["rewards"] if name != TOTAL]
    count, device = len(sounds.prompts), jax.devices()[0]
    facts = {
        "Date": datetime.date.today().isoformat(),
        "Machine": f"{jax.device_count()} x {device.device_kind}, {platform.machine()}",
        "Versions": f"Python {platform.python_version()}, jax {jax.__version__}",
        "Policies": f"{base}, the base; {page.listed(others)}",
        "Held-out prompts": f"{count}, {summary['seeds']} clip(s) of each policy",
    }

    # Curves of the supervised stages.
    losses = []
    for folder in training:
        if log := _read_log(folder):
            losses.append(Curve(Path(folder).name, "step", "loss", {"training": log["loss"]}))

    # The page.
    report = page.Report(
        title=Path(run_dir).name,
        facts=facts,
        policies=summary["policies"],
        panel=_panel(summary) if "panel" in summary else None,
        rewards=[_reward(summary, term) for term in (TOTAL, *terms)],
        interval_note=f"95 % bootstrap over {count} prompts, {summary['seeds']} clip(s) each.",
        measures=_measures(summary),
        kl=_kl_curves(summary, others),
        trials=sounds.trials(sounds.first),
        trials_rule="The first held-out prompts, in their order, with the first seed of each.",
        regressions=sounds.trials(sounds.worst),
        regressions_rule="The held-out prompts with the largest loss of reward, worst first.",
        runs=[_run(summary, policy, folder, terms) for policy, folder in finetuned.items()],
        runs_rule=summary["rule"],
        training=losses,
        stages=list(seconds.items()),
        identity={**summary["identity"]["hashes"], "seed": str(summary["seed"])},
        notes=notes,
    )
    write_page(path, report)


# --- Figures ---


def _figure(value: float | Mapping[str, Any]) -> Figure | float:
    """Returns a number as it is, an interval as an Interval, and words for too few prompts."""
    if not isinstance(value, Mapping):
        return value
    return value["too_small"] if "too_small" in value else page.Interval(**value)


def _figures(values: Mapping[str, float | Mapping[str, Any]]) -> dict[str, Figure | float]:
    return {policy: _figure(value) for policy, value in values.items()}


def _reward(summary: Mapping[str, Any], term: str) -> page.Reward:
    means, gains = _figures(summary["rewards"][term]), _figures(summary["gains"][term])
    return page.Reward(NAMES.get(term, term), means, gains, LABELS.get(term, ""))


def _measures(summary: Mapping[str, Any]) -> list[page.Measure]:
    """Returns the figures that are not trained on."""
    kl, diversity, frechet = (_figures(summary[name]) for name in ("kl", "diversity", "frechet"))
    real = diversity.pop("real")
    spread = "mean distance between semantic features of two clips, 0 if all prompts give one clip"
    if isinstance(real, float):
        spread += f"; of real clips it is {real:.2f}"
    distance = (
        "between semantic features of generated and held-out real frames; not trained on; "
        "lower is nearer"
    )
    return [
        page.Measure("KL to the base, nats a clip", kl, "how far the policy moved"),
        page.Measure("Diversity", diversity, spread),
        page.Measure("Frechet distance to real clips", frechet, distance),
    ]


def _panel(summary: Mapping[str, Any]) -> page.Panel:
    matches = []
    for pair in summary["pairs"]:
        shares = (pair.get(name) for name in ("first", "second", "win", "tie", "loss"))
        matches.append(page.Match(*shares, _figure(pair["win_rate"]), pair.get("wilcoxon_p")))
    opinions = {**summary["mos"], "real clips": summary["real"]["mos"]}
    return page.Panel(**summary["panel"], matches=matches, opinions=_figures(opinions))


# --- Curves ---


def _read_log(folder: str) -> Log:
    """Returns metric -> (steps [P], values [P]) of a run; {} for a model without metrics."""
    path = Path(folder) / FILE_NAME
    return read_metrics(path) if path.exists() else {}


def _kl_curves(summary: Mapping[str, Any], policies: Sequence[str]) -> list[Curve]:
    """Returns the KL to the base over the codes of a frame and over the seconds of a clip.

    Policies without figures keep their colours.
    """
    codes = tuple(summary["token_names"])
    charts = [
        ("by_level", 0, "KL to the base by code", "code of a frame", codes),
        ("by_second", 1, "KL to the base by second", "second of the clip", ()),
    ]
    curves = []
    for key, first, title, x_label, ticks in charts:
        if figures := summary[f"kl_{key}"]:
            # An empty series keeps the colours of those after it.
            series = {}
            for policy in policies:
                values = np.array(figures.get(policy, ()), np.float64)
                series[policy] = first + np.arange(len(values)), values
            curves.append(Curve(title, x_label, "nats", series, ticks=ticks))
    return curves


def _run(summary: Mapping[str, Any], policy: str, folder: str, terms: Sequence[str]) -> page.Run:
    """Returns an RL run: its curves, and the outcome of its alarm."""
    log, alarm = _read_log(folder), summary["watched"].get(policy) or {}
    curves = run_curves(policy, log, terms, alarm.get("kl"))
    # The alarm, if a held-out judge watched the run.
    if not alarm:
        return page.Run(policy, curves)
    outcome = "silent in {looks} looks."
    if alarm["kept"] is not None:
        outcome = (
            "raised in look {looks}; step {kept} is kept, {kl:.1f} nats a clip from its anchor."
        )
    return page.Run(policy, curves, f"Alarm for over-optimisation: {outcome.format(**alarm)}")
