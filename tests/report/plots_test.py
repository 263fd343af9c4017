"""Drawings: the data, one colour scale for clips side by side, and no effect on the page."""

import base64
import io
import re
import xml.etree.ElementTree

import librosa
import matplotlib
import numpy as np
import pytest
from matplotlib import image

from musicrl_jax.report import curves, plots


def tone(hz, level):
    """Returns 1 s at 16 kHz."""
    return (level * np.sin(2.0 * np.pi * hz * np.arange(16000) / 16000)).astype(np.float32)


def chart(x, y, **options):
    """Returns the drawing of one series."""
    return plots.curve_svg(curves.Curve("Loss", "step", "nats", {"d": (x, y)}, **options))


def texts(svg):
    return [text.text for text in xml.etree.ElementTree.fromstring(svg).iter("text")]


def pixels(svg: str) -> np.ndarray:
    """Returns the embedded spectrogram: RGB [M, S, 3] in 0..1, top row highest."""
    encoded = re.search(r'href="data:image/png;base64,([^"]*)"', svg)[1]
    picture = image.imread(io.BytesIO(base64.b64decode(encoded, validate=True)))[..., :3]
    return picture[::-1] if "scale(1 -1)" in svg else picture


def shown_decibels(svg: str, low: float, high: float) -> np.ndarray:
    """Inverts the colour map: dB [M, S] to half a colour step."""
    table = plots.COLOURS(np.arange(plots.LEVELS))[:, :3]
    level = np.argmin(np.abs(pixels(svg)[:, :, None, :] - table[None, None]).sum(-1), axis=-1)
    return low + (level + 0.5) / plots.LEVELS * (high - low)


def test_mel_decibels_equal_librosa():
    wav = (tone(440.0, 0.3) + tone(3000.0, 0.01)).astype(np.float32)
    ours = plots.mel_decibels(wav, 16000)
    assert ours.shape == (100, 80)
    starts = np.arange(100)[:, None] * 160 + 1024 - 432  # centred on a hop
    windows = np.pad(wav, 1024)[starts + np.arange(1024)]
    hann = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(1024) / 1024)
    filters = librosa.filters.mel(sr=16000, n_fft=1024, n_mels=80)
    mel = np.abs(np.fft.rfft(windows * hann)) @ filters.T
    np.testing.assert_allclose(ours, 20.0 * np.log10(np.maximum(mel, 1e-5)), atol=0.05)


def test_clips_side_by_side_share_one_scale():
    wavs = tone(1000.0, 0.5), tone(1000.0, 0.05), tone(3000.0, 0.005)  # 20 dB apart
    decibels = [plots.mel_decibels(wav, 16000) for wav in wavs]
    low, high = plots.colour_range(decibels)
    assert high == pytest.approx(max(image.max() for image in decibels))
    assert high - low == plots.RANGE_DB
    svgs = plots.spectrogram_svgs(wavs, 16000, ("a", "b", "c"))
    loud, soft, softest = (shown_decibels(svg, low, high) for svg in svgs)
    step = plots.RANGE_DB / plots.LEVELS
    assert loud.max() - soft.max() == pytest.approx(20.0, abs=step)
    assert softest.max() == pytest.approx(decibels[2].max(), abs=step)
    loudest = [np.sort(each.ravel())[-500:] for each in (loud, decibels[0])]
    np.testing.assert_allclose(*loudest, atol=step)
    alone = plots.spectrogram_svgs((wavs[1], wavs[1]), 16000, ("a", "b"))[0]
    assert not np.array_equal(pixels(alone), pixels(svgs[1]))


def test_silence_is_dark_not_bright():
    silence = np.zeros(16000, np.float32)
    for other in (silence, tone(500.0, 0.3)):
        image = pixels(plots.spectrogram_svgs((silence, other), 16000, ("a", "b"))[0])
        dark = np.broadcast_to(plots.COLOURS(0)[:3], image.shape)
        np.testing.assert_allclose(image, dark, rtol=0, atol=0.01)


@pytest.mark.parametrize("samples", [1, 50, 700])
def test_very_short_clips_can_be_drawn(samples):
    wav = tone(1000.0, 0.5)[:samples] + np.float32(0.01)
    first, second = (pixels(svg) for svg in plots.spectrogram_svgs((wav, wav), 16000, ("a", "b")))
    assert first.shape == (80, max(1, samples // 160), 3)
    np.testing.assert_array_equal(first, second)


def test_running_mean_by_hand():
    values = np.array([1.0, 2.0, 6.0, 4.0])
    np.testing.assert_allclose(plots.running_mean(values, 3), [1.5, 3.0, 4.0, 5.0])
    np.testing.assert_allclose(plots.running_mean(values, 1), values)


def line_points(svg: str, colour: int) -> np.ndarray:
    """Returns the last path in a series' colour with more than 2 points: [P, 2] in drawing units.

    A legend's line has 2 points.
    """
    paths = re.findall(rf'<path d="([^"]*)"[^>]*stroke: var\(--series-{colour}\)', svg)
    points = [np.array(re.findall(r"[ML] (\S+) ([\d.]+)", path), float) for path in paths]
    return [p for p in points if len(p) > 2][-1]


def test_a_line_goes_through_its_points():
    y = np.array([3.0, 1.0, 2.0, 5.0])
    points = line_points(chart(np.array([0, 10, 20, 40]), y), 0)
    share = (points - points.min(axis=0)) / np.ptp(points, axis=0)
    np.testing.assert_allclose(share[:, 0], [0, 0.25, 0.5, 1], rtol=0, atol=1e-3)
    np.testing.assert_allclose(1 - share[:, 1], (y - 1.0) / 4.0, rtol=0, atol=1e-3)


def test_points_that_are_not_finite_are_left_out():
    y = np.array([3.0, np.nan, 2.0, np.inf, 1.0])
    assert len(line_points(chart(np.arange(5), y), 0)) == 3


def test_tick_labels_have_enough_digits():
    def shown(x):
        labels = texts(chart(x, np.array([0.0, 0.1, 0.3])))
        return labels[: labels.index("step")]

    assert shown(np.array([0, 1, 2])) == shown(np.array([0.0, 1.25, 2.5])) == ["0", "1", "2"]
    assert shown(np.array([0, 1000, 2000]))[-1] == "2,000"
    assert shown(np.array([0.0, 0.3, 0.5]))[:3] == ["0", "0.1", "0.2"]


def test_a_band_spans_twice_the_error():
    x, y = np.arange(3), np.array([0.0, 1.0, 2.0])
    with pytest.raises(ValueError, match=r"series 'd': errors has shape \(2,\) and y \(3,\)"):
        chart(x, y, errors={"d": np.zeros(2)})
    for errors in (np.full(3, 0.5), np.array([0.5, 0.0, 0.25])):
        svg = chart(x, y, errors={"d": errors})
        band = re.findall(r'<path id="[^"]*" d="([^"]*)"', svg)[-1]
        band = np.array(re.findall(r"[ML] (\S+) (-?[\d.]+)", band), float)
        line = line_points(svg, 0)
        # Drawing units a unit of y.
        unit = (line[0, 1] - line[-1, 1]) / 2.0
        for place, error in zip(line[:, 0], errors, strict=True):
            edges = band[np.abs(band[:, 0] - place) < 0.02, 1]
            assert np.ptp(edges) == pytest.approx(2.0 * error * unit, abs=0.05)


def bars(svg: str, colour: int) -> np.ndarray:
    """Returns left, right and height of a series' bars, in drawing units, without the legend."""
    paths = re.findall(rf'<path d="([^"]*)"[^>]*fill: var\(--series-{colour}\)', svg)
    corners = [np.array(re.findall(r"[ML] (\S+) ([\d.]+)", path), float) for path in paths]
    return np.array([[c[:, 0].min(), c[:, 0].max(), np.ptp(c[:, 1])] for c in corners[:3]])


def test_bars_are_side_by_side_over_their_names():
    names, nothing = ("semantic", "coarse 1", "coarse 1"), np.array([])
    first, third = np.array([3.0, 1.0, 2.0]), np.array([1.0, 4.0, 0.5])
    series = {
        "R": (np.arange(3), first),
        "best of 8": (nothing, nothing),
        "U": (np.arange(3), third),
    }
    svg = plots.curve_svg(curves.Curve("KL", "code", "nats", series, ticks=names))
    lefts, rights = bars(svg, 0), bars(svg, 2)
    # The colour of a series without points stays free.
    assert not len(bars(svg, 1)) and "best of 8" not in texts(svg)
    heights = np.concatenate([lefts[:, 2], rights[:, 2]])
    expected = np.concatenate([first, third]) / 4.0
    np.testing.assert_allclose(heights / heights.max(), expected, atol=2e-3)
    np.testing.assert_allclose(lefts[:, 1], rights[:, 0], atol=0.02)  # they touch
    assert (rights[:-1, 1] < lefts[1:, 0]).all()
    assert texts(svg)[:3] == list(names)
    assert "nothing was logged" in chart(nothing, nothing, ticks=names)


def test_a_curve_without_points_says_so():
    assert "nothing was logged" in plots.curve_svg(curves.Curve("Loss", "step", "nats", {}))
    assert "nothing was logged" in chart(np.array([]), np.array([]))
    assert "nothing was logged" in chart(np.array([1]), np.array([np.nan]))


def test_drawings_are_escaped_and_use_the_colours_of_the_page():
    names = [f"<b>&{i}$_x$" for i in range(8)]
    series = {name: (np.arange(50), np.arange(50.0) + i) for i, name in enumerate(names)}
    before = dict(matplotlib.rcParams)
    curve = plots.curve_svg(curves.Curve('a "quoted" <title>', "step", "$y$", series))
    pair = plots.spectrogram_svgs(
        (tone(500.0, 0.2), tone(900.0, 0.2)), 16000, ('a "quoted" <title>', "b")
    )
    assert dict(matplotlib.rcParams) == before
    for svg in (curve, *pair):
        # Well-formed, and so is the escaped label.
        root = xml.etree.ElementTree.fromstring(svg)
        assert re.match('a "quoted" <title>|b$', root.attrib["aria-label"])
        assert "<style" not in svg and "http" not in svg and "var(--ink-soft)" in svg
        assert not any(colour in svg for colour in plots.VARIABLES)
    assert {*names, "$y$"} <= set(texts(curve))
    ids = [re.findall(r' id="([^"]*)"', svg) for svg in (curve, *pair)]
    assert not set(ids[0]) & set(ids[1]) and not set(ids[1]) & set(ids[2])
    for svg, own in zip((curve, *pair), ids, strict=True):
        assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg)) == set(own)


def test_the_same_curve_is_the_same_bytes():
    points = np.arange(60), np.sin(np.arange(60.0))
    assert chart(*points) == chart(*points)
