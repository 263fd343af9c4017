"""Curves and mel spectrograms as inline SVG.

The drawings carry no colours of their own but the page's CSS variables (--ink-soft, --rule, --series-0 ...),
so they follow its light and dark mode; text stays text. Nothing touches pyplot's global figures.

Letters: N samples, S spectral frames, M mel bands, P points.
"""

import functools
import hashlib
import html
import io
import re
from collections.abc import Sequence

import jax
import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from musicrl_jax.core import spectral
from musicrl_jax.report.curves import Curve

# Okabe and Ito's colours, told apart by colour-blind readers too. Each stands for a CSS variable of the page.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", "--", ":", "-.")  # Changes with every round through the colours.
INK, RULE = "#5c6069", "#dddad3"
VARIABLES = {INK: "--ink-soft", RULE: "--rule"} | {
    colour: f"--series-{i}" for i, colour in enumerate(SERIES)
}

SMOOTHED_FROM = 40  # points; a shorter series is drawn as it is
SMOOTHED_PART = 20  # the thick line is a mean over 1 / 20 of the series

MELS = 80
RANGE_DB = 80.0
FLOOR = 1e-5  # mel magnitude
LEVELS = 64  # colour steps: 1.25 dB each, and half the bytes of 256
COLOURS = matplotlib.colormaps["magma"].resampled(LEVELS)
TICKS_HZ = (500, 1000, 2000, 4000, 8000)

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "musicrl",  # the same page again is the same bytes
    "font.size": 8.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
}


def curve_svg(curve: Curve) -> str:
    """Draw a curve as an <svg> element for inlining in HTML.

    Series of 40 points and more are drawn thin, with their centred running mean over a twentieth of the
    series on top; shorter ones as they are. Where the curve has ticks, its series are bars side by side. A curve
    without a finite point says "nothing was logged". A series without one still takes its colour.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 2.7), layout="constrained")
        axes = figure.add_subplot()
        if curve.ticks:
            drawn = _draw_bars(axes, curve)
        else:
            drawn = [
                _draw_series(axes, i, *points, curve.errors.get(n))
                for i, (n, points) in enumerate(curve.series.items())
            ]
        axes.set_xlabel(curve.x_label, parse_math=False)
        axes.set_ylabel(curve.y_label, parse_math=False)
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.tick_params(length=0)
        if curve.ticks:
            slanted = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
            axes.set_xticks(np.arange(len(curve.ticks)), curve.ticks, parse_math=False, **slanted)
        else:
            axes.xaxis.set_major_locator(
                ticker.MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10])
            )
            axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:,.6g}"))
        axes.yaxis.set_major_locator(ticker.MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
        axes.margins(x=0.02, y=0.08)
        if not any(drawn):
            axes.set(xticks=[], yticks=[])
            axes.text(
                0.5, 0.5, "nothing was logged", ha="center", va="center", transform=axes.transAxes
            )
        elif len(curve.series) > 1:
            legend = figure.legend(
                [line for line in drawn if line],
                [name for name, line in zip(curve.series, drawn, strict=True) if line],
                loc="outside upper left",
                ncols=4,
                frameon=False,
                handlelength=1.4,
                columnspacing=1.4,
                borderpad=0.1,
            )
            for text in legend.get_texts():
                text.set_parse_math(False)
        return _inline_svg(figure, f"{curve.title}: {', '.join(curve.series)} over {curve.x_label}")


def spectrogram_svgs(
    wavs: Sequence[np.ndarray], sample_rate_hz: int, labels: Sequence[str]
) -> list[str]:
    """Draw clips, each f32 [N], as mel spectrograms on one colour scale: an <svg> element each.

    The scale spans 80 dB down from the loudest clip's loudest cell, so a difference in colour is one in level.
    `labels` are the images' alternative texts.
    """
    decibels = [mel_decibels(wav, sample_rate_hz) for wav in wavs]
    low, high = colour_range(decibels)
    return [
        _spectrogram_svg(image, len(wav) / sample_rate_hz, sample_rate_hz, low, high, label)
        for image, wav, label in zip(decibels, wavs, labels, strict=True)
    ]


def mel_decibels(wav: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    """Mel magnitudes of wav [N] in dB, f32 [S, 80], -100 and up; 100 frames a second, fewer in long clips."""
    window = 1024 if sample_rate_hz < 24000 else 2048
    hop = min(window, max(sample_rate_hz // 100, len(wav) // 480))
    wav = np.pad(np.asarray(wav, np.float32), (0, max(0, hop - len(wav))))  # one frame at least
    log_mel = _log_mel(wav, sample_rate_hz, window, hop)  # [S, M]
    return np.asarray(log_mel) * np.float32(20.0 / np.log(10.0))


def colour_range(decibels: list[np.ndarray]) -> tuple[float, float]:
    """The colour scale (low, high) in dB that images [S, M] share; silence alone stays dark."""
    floor = 20.0 * np.log10(FLOOR)
    high = max(floor + RANGE_DB, *(float(image.max()) for image in decibels))
    return high - RANGE_DB, high


def colour_bar_css() -> str:
    """The spectrograms' colours, quiet to loud, as a CSS gradient."""
    stops = [matplotlib.colors.to_hex(COLOURS(x)) for x in np.linspace(0.0, 1.0, 12)]
    return f"linear-gradient(to right, {', '.join(stops)})"


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _log_mel(wav: jax.Array, sample_rate_hz: int, window: int, hop: int) -> jax.Array:
    return spectral.log_mel(wav, sample_rate_hz, MELS, window, hop, FLOOR)


def _draw_series(
    axes: Axes, index: int, x: np.ndarray, y: np.ndarray, error: np.ndarray | None
) -> matplotlib.lines.Line2D | None:
    """Add series number `index` to the axes: the line that a legend shows, None without finite points."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if not x.size:
        return None
    colour, dash = SERIES[index % len(SERIES)], DASHES[index // len(SERIES) % len(DASHES)]
    if error is not None:
        half = np.asarray(error, np.float64)[finite]
        axes.fill_between(x, y - half, y + half, color=colour, linewidth=0, alpha=0.2)
    if x.size >= SMOOTHED_FROM:
        axes.plot(x, y, color=colour, linewidth=0.6, alpha=0.35)
        y = running_mean(y, x.size // SMOOTHED_PART)
    marker = "o" if x.size == 1 else None
    (line,) = axes.plot(x, y, dash, color=colour, linewidth=1.6, marker=marker, markersize=4)
    return line


def _draw_bars(axes: Axes, curve: Curve) -> list[matplotlib.patches.Rectangle | None]:
    """Add the series as bars side by side: for each the patch that a legend shows, None without finite points."""
    series = [
        (np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in curve.series.values()
    ]
    finite = [np.isfinite(x) & np.isfinite(y) for x, y in series]
    count, place, drawn = sum(found.any() for found in finite), 0, []
    for index, ((x, y), found) in enumerate(zip(series, finite, strict=True)):
        patch = None
        if found.any():
            left = x[found] + 0.8 * (place / count - 0.5)
            place += 1
            patch = axes.bar(
                left, y[found], 0.8 / count, align="edge", color=SERIES[index % len(SERIES)]
            )[0]
        drawn.append(patch)
    return drawn


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Centred mean of values [P] over `width` points (one more if even), fewer at the ends: [P]."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    first, last = np.maximum(place - width // 2, 0), np.minimum(place + width // 2 + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _spectrogram_svg(
    decibels: np.ndarray, seconds: float, sample_rate_hz: int, low: float, high: float, label: str
) -> str:
    top_mel = spectral.hz_to_mel(sample_rate_hz / 2)
    ticks = [hz for hz in TICKS_HZ if hz <= sample_rate_hz / 2]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 1.9), layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(
            decibels.T,  # [M, S]
            origin="lower",
            aspect="auto",
            interpolation="none",
            extent=(0.0, seconds, 0.0, 1.0),
            cmap=COLOURS,
            vmin=low,
            vmax=high,
        )
        axes.set_yticks(
            spectral.hz_to_mel(np.array(ticks)) / top_mel, [f"{hz / 1000:g}" for hz in ticks]
        )
        axes.set_ylabel("kHz")
        axes.set_xlabel("seconds")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        return _inline_svg(figure, label)


def _inline_svg(figure: Figure, label: str) -> str:
    """Render a figure as an <svg> that fills its column, takes the page's colours and collides with no other.

    Matplotlib writes a document: its header, sizes, style sheet and unused ids would act on the whole page.
    """
    out = io.StringIO()
    FigureCanvasSVG(figure).print_svg(
        out, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    svg = out.getvalue()
    view_box = re.search(r'viewBox="([^"]*)"', svg).group(1)
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL).replace("xlink:href", "href")
    body = body.replace(
        "image-rendering:crisp-edges;image-rendering:pixelated", "image-rendering:auto"
    )
    body = re.sub(
        r' d="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m[0]).replace("\n", ""), body
    )
    body = re.sub(r'base64,[^"]*"', lambda m: m[0].replace("\n", ""), body)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', body))
    own = hashlib.sha256((label + svg).encode()).hexdigest()[:10]
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{own}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(url\(#|href="#)', rf"\g<1>{own}-", body)
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    return f'<svg viewBox="{view_box}" role="img" aria-label="{html.escape(label)}">{body.strip()}'
