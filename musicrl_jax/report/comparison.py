"""A base policy beside a finetuned one: what `musicrl evaluate` measured, laid out as a page.

Letters: n prompts, s seeds, N samples.
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
from musicrl_jax.report.page import Clip, Interval, Measure, Pair, Report, Reward, write_page

LABELS = {
    "reward": "the weighted sum that was trained on",
    "text_adherence": "cosine of MuLan's embeddings of text and clip",
    "acoustic_quality": "(q - 1) / 4 for the regressor's score q, a pseudo-MOS unless it learned people's ratings",
}
CURVES = (
    ("KL to the base, a clip", "nats", ("kl",)),
    ("KL to the base, a second", "nats", ("kl_per_second",)),
    ("Value loss", "squared error", ("value_loss",)),
    ("Explained variance of the value", "share of Var R", ("explained_variance",)),
)


def write_comparison(
    path: Path,
    summary: Mapping[str, Any],
    prompts: Sequence[str],
    results: Mapping[str, Mapping[str, np.ndarray]],
    sample_rate_hz: int,
    run_dir: str,
    finetuned: str,
    training: Sequence[str],
    seconds: Mapping[str, float],
    clips: tuple[int, int],
    notes: Sequence[str],
) -> None:
    """Writes the page.

    Args:
      path: of the HTML file.
      summary: what `musicrl_jax.evaluate` returns.
      prompts: n held-out prompts.
      results: for 'base' and 'finetuned' the arrays 'wav' f32 [n, s, N], 'reward' f32 [n, s], and each term's likewise.
      sample_rate_hz: of the clips.
      run_dir: the run's folder; its name is the title.
      finetuned: folder of the RL run, whose curves are drawn.
      training: folders of the supervised stages.
      seconds: spent in each stage.
      clips: how many of the first prompts, and how many of those that lost most, can be heard.
      notes: paragraphs for the end.
    """
    terms = list(summary["terms"])

    def reward(name: str, figures: Mapping[str, Any]) -> Reward:
        intervals = (Interval(**figures[which]) for which in ("base", "finetuned", "gain"))
        return Reward(name, *intervals, label=LABELS.get(name, ""))

    def pair(row: int) -> Pair:
        sides = []
        for result in results.values():
            scores = {name: float(result[name][row, 0]) for name in ("reward", *terms)}
            sides.append(Clip(result["wav"][row, 0], sample_rate_hz, scores))
        return Pair(prompts[row], *sides)

    def history(folder: str) -> dict[str, Any]:
        """A run's metrics; {} where the model was brought without them."""
        path = Path(folder) / FILE_NAME
        return read_metrics(path) if path.exists() else {}

    first, worst = clips
    gains = (results["finetuned"]["reward"] - results["base"]["reward"])[:, 0]
    lost = [int(row) for row in np.argsort(gains, kind="stable")[:worst] if gains[row] < 0]
    hashes = summary["identity"]["hashes"]
    seeds = results["base"]["reward"].shape[1]
    rl = history(finetuned)
    report = Report(
        title=Path(run_dir).name,
        facts={
            "Date": datetime.date.today().isoformat(),
            "Machine": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {platform.machine()}",
            "Versions": f"Python {platform.python_version()}, jax {jax.__version__}",
            "Held-out prompts": f"{len(prompts)}, {seeds} clip(s) each, on the same seeds for both models",
            "Base policy": hashes["policy"][:16],
            "Finetuned policy": hashes["finetuned"][:16],
        },
        stages=list(seconds.items()),
        total=reward("reward", {which: summary[f"reward_{which}"] for which in ("base", "finetuned", "gain")}),
        terms=[reward(name, summary["terms"][name]) for name in terms],
        measures=[
            Measure("KL to the base, nats a clip", None, Interval(**summary["kl"]), "how far the policy moved"),
            Measure(
                "Diversity",
                summary["diversity"]["base"],
                summary["diversity"]["finetuned"],
                "mean distance between two clips' semantic features, 0 if all prompts gave one clip; "
                f"of real clips it is {summary['diversity']['real']:.2f}",
            ),
            Measure(
                "Frechet distance to real clips",
                summary["frechet"]["base"],
                summary["frechet"]["finetuned"],
                "between semantic features of generated and held-out real frames; not trained on; lower is nearer",
            ),
        ],
        interval_note=f"95 % bootstrap over {len(prompts)} prompts, {seeds} clip(s) each",
        curves=[
            Curve(title, "step", unit, {name: rl[name] for name in names if name in rl})
            for title, unit, names in (("Reward and its terms", "reward", ("reward", *terms)), *CURVES)
            if not rl.keys().isdisjoint(names)
        ],
        training=[
            Curve(Path(folder).name, "step", "loss", {"training": history(folder)["loss"]})
            for folder in training
            if history(folder)
        ],
        pairs=[pair(row) for row in range(min(first, len(prompts)))],
        pairs_rule=f"The first {first} held-out prompts, as they come; the first seed of each.",
        regressions=[pair(row) for row in lost],
        regressions_rule=f"Of all held-out prompts, the {worst} whose reward fell most.",
        notes=notes,
    )
    write_page(path, report)
