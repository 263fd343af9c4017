"""Draws the opinion score of each policy of a run over its distance from the base, as an SVG.

    python tests/benchmarks/judge_over_kl.py --run runs/quickstart --out docs/judge_over_kl.svg

The figures are those of `musicrl evaluate`, in the run's evaluation/summary.json: the mean opinion
score by the judging panel of simulated listeners with its 95 % interval, and the square root of the
KL to the base. Policies named R, or R and a number of steps, are one run at several steps: a line
joins them and the base. A dotted line is the score of a policy without a KL, such as the best of
several clips. The colours can be read on white and on dark pages.

Legend: P policies.
"""

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from musicrl_jax.core.files import read_json
from musicrl_jax.report import plots

TITLE = "Opinion score over the distance from the base"
X_LABEL = "square root of the KL to the base, nats a clip"
Y_LABEL = "opinion score by simulated listeners, 1 to 5"
ONE_RUN = re.compile(r"R( \d+)?")
# A grey with a contrast of 4 on white and on near black.
GREY = "#787c83"
STYLE = {
    **plots.STYLE,
    "font.size": 9.5,
    **dict.fromkeys(
        ("axes.labelcolor", "text.color", "xtick.labelcolor", "ytick.labelcolor"), GREY
    ),
}
RUN_COLOUR, OTHER_COLOUR = plots.SERIES[:2]
KIND = {"policies": list, "mos": {str: dict}, "kl": {str: dict}}
REMEDY = "evaluate the run with listeners, as gin/runs/quickstart.gin does"
# Offsets of a name from its point, in points, with the side of the text that is at the offset.
PLACES = [
    ((x, y), side, edge)
    for y, edge in ((4, "bottom"), (-4, "top"))
    for x, side in ((5, "left"), (-5, "right"))
]


def points(summary: dict[str, Any]) -> tuple[dict[str, tuple[float, ...]], dict[str, float]]:
    """Returns ({name: (square root of the KL, score, low, high)}, {name: score} without a KL).

    Policies with too few clips for an interval are left out, and printed. Of an exact KL of nearly
    0 the estimate may be below 0; it counts as 0.
    """
    placed, unplaced = {}, {}
    base = summary["policies"][0]
    for name in summary["policies"]:
        score, kl = summary["mos"][name], summary["kl"].get(name)
        if name == base:
            kl = {"mean": 0.0}
        for figure in (score, kl or {}):
            if words := figure.get("too_small"):
                print(f"{name} is left out: {words}", file=sys.stderr)
                break
        else:
            if kl is None:
                unplaced[name] = score["mean"]
            else:
                distance = math.sqrt(max(kl["mean"], 0.0))
                placed[name] = (distance, score["mean"], score["low"], score["high"])
    return placed, unplaced


def one_run(names: Sequence[str], base: str) -> list[str]:
    """Returns the base and the steps of the run R; [] without a step."""
    steps = [name for name in names if ONE_RUN.fullmatch(name)]
    return [name for name in names if name == base or name in steps] if steps else []


def write_names(axes: Axes, names: dict[str, tuple[float, ...]], lines: np.ndarray) -> None:
    """Writes the names beside their points, each where it covers the least.

    Args:
      axes: with final limits and a figure of final size.
      names: as `points` returns.
      lines: f64 [P, 2], places on lines that names should not cover.
    """
    # What is drawn already, in pixels: a few points on each line and interval.
    covered = [axes.transData.transform(lines)] if len(lines) else []
    for x, score, low, high in names.values():
        covered.append(
            axes.transData.transform([(x, y) for y in (score, *np.linspace(low, high, 9))])
        )
    pixels, boxes = np.concatenate(covered), []

    for name, (x, score, *_) in names.items():
        choices = []
        for offset, side, edge in PLACES:
            text = axes.annotate(
                name, (x, score), offset, textcoords="offset points", ha=side, va=edge
            )
            text.set_parse_math(False)
            box = text.get_window_extent()
            inside = np.all((pixels > box.p0) & (pixels < box.p1), axis=1).sum()
            overlaps = sum(Bbox.intersection(box, other) is not None for other in boxes)
            outside = box.x0 < axes.bbox.x0 or box.x1 > axes.bbox.x1
            choices.append((inside + 10 * overlaps + 100 * outside, len(choices), text, box))
        best = min(choices)
        boxes.append(best[3])
        for *_, text, _ in choices:
            if text is not best[2]:
                text.remove()


def draw(summary: dict[str, Any]) -> Figure:
    """Draws the figure; raises ValueError if no policy has a score."""
    placed, unplaced = points(summary)
    if not placed:
        raise ValueError("no policy has enough clips for an interval: evaluate more prompts")
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    base = summary["policies"][0]

    # One run at several steps, from the base on.
    joined = sorted(placed[name][:2] for name in one_run(list(placed), base))
    if joined:
        axes.plot(*zip(*joined, strict=True), color=RUN_COLOUR, linewidth=1.4, zorder=1)

    # Policies.
    for name, (x, score, low, high) in placed.items():
        colour = RUN_COLOUR if ONE_RUN.fullmatch(name) else OTHER_COLOUR
        colour = GREY if name == base else colour
        error = [[score - low], [high - score]]
        axes.errorbar(
            x, score, error, fmt="o", color=colour, markersize=5, elinewidth=1.2, capsize=2.5
        )
    for name, score in unplaced.items():
        axes.axhline(score, linestyle=":", color=GREY, linewidth=1.2)
        beside = (4, 0), ("axes fraction", "data"), "offset points"
        text = axes.annotate(name, (1.0, score), *beside, va="center", annotation_clip=False)
        text.set_parse_math(False)

    # Axes.
    axes.set_title(TITLE, loc="left", fontsize=10.5)
    axes.set_xlabel(X_LABEL)
    axes.set_ylabel(Y_LABEL)
    axes.grid(axis="y", color=GREY, linewidth=0.5, alpha=0.35)
    axes.spines["bottom"].set_color(GREY)
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(ticker.MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.margins(x=0.06, y=0.08)

    # Names, once the layout is known.
    figure.draw_without_rendering()
    places = np.linspace(0, max(len(joined) - 1, 0), 20 * len(joined))
    lines = [
        np.interp(places, np.arange(len(joined)), column) for column in zip(*joined, strict=True)
    ]
    write_names(axes, placed, np.array(lines).T)
    return figure


def main() -> None:
    """Reads the summary and writes the SVG."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--out", type=Path, required=True, help="file of the SVG")
    flags = parser.parse_args()
    summary = read_json(flags.run / "evaluation/summary.json", KIND, REMEDY)
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        metadata = {"Date": None, "Creator": None, "Title": f"{Y_LABEL}, over {X_LABEL}"}
        FigureCanvasSVG(draw(summary)).print_svg(flags.out, metadata=metadata)
    print(f"{flags.out}: {flags.out.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
