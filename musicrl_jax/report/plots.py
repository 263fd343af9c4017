"""Curves and mel spectrograms as inline SVG.

The drawings use the CSS variables of the page for their colours (--ink-soft, --rule, --series-0
...), so they follow its light and dark mode. Text stays text. pyplot's global figures are not used.

Legend: N samples, S spectral frames, M mel bands, P points.
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
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from musicrl_jax.core import spectral
from musicrl_jax.report.curves import Curve

# Okabe and Ito's colours, which colour-blind readers can distinguish. Each is replaced by a CSS
# variable of the page.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# One dash for each round through the colours.
DASHES = ("-", "--", ":", "-.")
INK, RULE = "#5c6069", "#dddad3"
VARIABLES = {INK: "--ink-soft", RULE: "--rule"} | {
    colour: f"--series-{i}" for i, colour in enumerate(SERIES)
}

# Series with fewer points than this are drawn without a running mean.
SMOOTHED_FROM = 40
# The mean is over 1 / 20 of the series.
SMOOTHED_PART = 20
# Width of all bars at one tick, in ticks.
BAR_WIDTH = 0.8

MELS = 80
RANGE_DB = 80.0
FLOOR = 1e-5  # mel magnitude
# Colour steps of 1.25 dB; the images are half as large as with 256.
LEVELS = 64
COLOURS = matplotlib.colormaps["magma"].resampled(LEVELS)
TICKS_HZ = (500, 1000, 2000, 4000, 8000)

# Settings of Matplotlib; all colours are replaced by CSS variables later.
STYLE = {
    "svg.fonttype": "none",
    # A fixed salt, so that the same plot always gives the same bytes.
    "svg.hashsalt": "musicrl",
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


# --- Curves ---


def curve_svg(curve: Curve) -> str:
    """Draws a curve as an <svg> element for inlining in HTML.

    Series of SMOOTHED_FROM points and more are drawn thin, with their centred running mean on top.
    With ticks, the series are bars side by side. A curve without a finite point has the text
    "nothing was logged". A series without one still takes its colour.
    """
    # Figure, and not pyplot, keeps no global state.
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 2.7), layout="constrained")
        axes = figure.add_subplot()

        # The data.
        if curve.ticks:
            handles = _draw_bars(axes, curve)
        else:
            handles = [
                _draw_series(axes, i, *points, curve.errors.get(name))
                for i, (name, points) in enumerate(curve.series.items())
            ]

        # Axes.
        axes.set_xlabel(curve.x_label, parse_math=False)
        axes.set_ylabel(curve.y_label, parse_math=False)
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.tick_params(length=0)
        if curve.ticks:
            slanted = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
            axes.set_xticks(np.arange(len(curve.ticks)), curve.ticks, parse_math=False, **slanted)
        else:
            locator = ticker.MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10])
            axes.xaxis.set_major_locator(locator)
            axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:,.6g}"))
        axes.yaxis.set_major_locator(ticker.MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
        axes.margins(x=0.02, y=0.08)

        # The legend, of the series with points.
        legend = {name: each for name, each in zip(curve.series, handles, strict=True) if each}
        if not legend:
            axes.set(xticks=[], yticks=[])
            centre = {"ha": "center", "va": "center", "transform": axes.transAxes}
            axes.text(0.5, 0.5, "nothing was logged", **centre)
        elif len(curve.series) > 1:
            legend_box = figure.legend(
                list(legend.values()),
                list(legend),
                loc="outside upper left",
                ncols=4,
                frameon=False,
                handlelength=1.4,
                columnspacing=1.4,
                borderpad=0.1,
            )
            for text in legend_box.get_texts():
                text.set_parse_math(False)
        return _inline_svg(figure, f"{curve.title}: {', '.join(curve.series)} over {curve.x_label}")


def _finite(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns x and y of the finite points, f64 [P] each, and the mask of these points."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    mask = np.isfinite(x) & np.isfinite(y)
    return x[mask], y[mask], mask


def _draw_series(
    axes: Axes, index: int, x: np.ndarray, y: np.ndarray, error: np.ndarray | None
) -> Artist | None:
    """Draws series number `index` and returns its line; None without finite points."""
    x, y, mask = _finite(x, y)
    if not x.size:
        return None
    colour, dash = SERIES[index % len(SERIES)], DASHES[index // len(SERIES) % len(DASHES)]
    # The band, the points, then the line.
    if error is not None:
        half = np.asarray(error, np.float64)[mask]
        axes.fill_between(x, y - half, y + half, color=colour, linewidth=0, alpha=0.2)
    if x.size >= SMOOTHED_FROM:
        axes.plot(x, y, color=colour, linewidth=0.6, alpha=0.35)
        y = running_mean(y, x.size // SMOOTHED_PART)
    marker = "o" if x.size == 1 else None
    return axes.plot(x, y, dash, color=colour, linewidth=1.6, marker=marker, markersize=4)[0]


def _draw_bars(axes: Axes, curve: Curve) -> list[Artist | None]:
    """Draws series as bars side by side and returns a bar of each; None without finite points."""
    series = [_finite(x, y)[:2] for x, y in curve.series.values()]
    count, place, handles = sum(x.size > 0 for x, _ in series), 0, []
    for index, (x, y) in enumerate(series):
        bar = None
        if x.size:
            edges, width = x + BAR_WIDTH * (place / count - 0.5), BAR_WIDTH / count
            bar = axes.bar(edges, y, width, align="edge", color=SERIES[index % len(SERIES)])[0]
            place += 1
        handles.append(bar)
    return handles


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Returns the centred mean of values [P] over `width` points, one more if even: [P].

    It is over fewer points at the ends.
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    first, last = np.maximum(place - width // 2, 0), np.minimum(place + width // 2 + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


# --- Spectrograms ---


def spectrogram_svgs(
    wavs: Sequence[np.ndarray], sample_rate_hz: int, labels: Sequence[str]
) -> list[str]:
    """Draws clips, each f32 [N], as mel spectrograms on one colour scale: an <svg> element each.

    The scale ends at the loudest cell of all clips and spans RANGE_DB. `labels` are the images'
    alternative texts.
    """
    decibels = [mel_decibels(wav, sample_rate_hz) for wav in wavs]
    scale = colour_range(decibels)
    return [
        _spectrogram_svg(image, len(wav) / sample_rate_hz, sample_rate_hz, scale, label)
        for image, wav, label in zip(decibels, wavs, labels, strict=True)
    ]


def mel_decibels(wav: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    """Returns mel magnitudes of wav [N] in dB, f32 [S, 80], at least -100.

    There are 100 frames a second, fewer in long clips.
    """
    window = 1024 if sample_rate_hz < 24000 else 2048
    hop = min(window, max(sample_rate_hz // 100, len(wav) // 480))
    # At least one frame.
    wav = np.pad(np.asarray(wav, np.float32), (0, max(0, hop - len(wav))))
    log_mel = _log_mel(wav, sample_rate_hz, window, hop)  # [S, M]
    return np.asarray(log_mel) * np.float32(20.0 / np.log(10.0))


def colour_range(decibels: list[np.ndarray]) -> tuple[float, float]:
    """Returns the colour scale (low, high) in dB of images [S, M]; silence alone stays dark."""
    floor = 20.0 * np.log10(FLOOR)
    high = max(floor + RANGE_DB, *(float(image.max()) for image in decibels))
    return high - RANGE_DB, high


def colour_bar_css() -> str:
    """Returns the spectrograms' colours, quiet to loud, as a CSS gradient."""
    stops = [matplotlib.colors.to_hex(COLOURS(x)) for x in np.linspace(0.0, 1.0, 12)]
    return f"linear-gradient(to right, {', '.join(stops)})"


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _log_mel(wav: jax.Array, sample_rate_hz: int, window: int, hop: int) -> jax.Array:
    return spectral.log_mel(wav, sample_rate_hz, MELS, window, hop, FLOOR)


def _spectrogram_svg(
    decibels: np.ndarray,
    seconds: float,
    sample_rate_hz: int,
    scale: tuple[float, float],
    label: str,
) -> str:
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
            vmin=scale[0],
            vmax=scale[1],
        )
        # The image is even in mel, so the ticks in Hz are not.
        heights = spectral.hz_to_mel(np.array(ticks)) / spectral.hz_to_mel(sample_rate_hz / 2)
        axes.set_yticks(heights, [f"{hz / 1000:g}" for hz in ticks])
        axes.set_ylabel("kHz")
        axes.set_xlabel("seconds")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        return _inline_svg(figure, label)


# --- SVG ---


def _inline_svg(figure: Figure, label: str) -> str:
    """Returns a figure as an <svg> that fills its column and takes the page's colours.

    Matplotlib writes a document. Its header, sizes, style sheet and ids would affect the page.
    """
    out = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(out, metadata=metadata)
    svg = out.getvalue()
    view_box = re.search(r'viewBox="([^"]*)"', svg).group(1)

    # Without header and style sheet, in smaller numbers and without line breaks.
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL).replace("xlink:href", "href")
    pixels = "image-rendering:crisp-edges;image-rendering:pixelated"
    body = body.replace(pixels, "image-rendering:auto")
    body = re.sub(r' d="[^"]*"', _short_path, body)
    body = re.sub(r'base64,[^"]*"', lambda m: m[0].replace("\n", ""), body)

    # Ids are unique on the page; unused ones are removed.
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', body))
    prefix = hashlib.sha256((label + svg).encode()).hexdigest()[:10]
    body = re.sub(
        r' id="([^"]*)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", body
    )
    body = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", body)

    # The colours of the page.
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    return f'<svg viewBox="{view_box}" role="img" aria-label="{html.escape(label)}">{body.strip()}'


def _short_path(path: re.Match) -> str:
    """Returns a path's attribute with two decimals and without line breaks."""
    return re.sub(r"(\.\d\d)\d+", r"\1", path[0]).replace("\n", "")
