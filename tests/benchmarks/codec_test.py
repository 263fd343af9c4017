"""A clip that is decoded to silence has no ViSQOL, and does not change the mean of the others."""

import numpy as np
import pytest

pytest.importorskip("visqol", reason="pip install -e '.[benchmark]'")
codec = pytest.importorskip("codec")


def test_silence_has_no_visqol():
    wav = 0.3 * np.sin(np.arange(16_000) * 0.2).astype(np.float32)
    assert np.isnan(codec.visqol(wav, np.zeros_like(wav), 16_000))
    assert np.isnan(codec.visqol(np.zeros_like(wav), wav, 16_000))


def test_values_that_are_not_known_do_not_count():
    places, values = np.arange(9), np.arange(9.0)
    values[0] = np.nan
    mean, interval = codec.interval(values, places).split(" ", 1)
    assert mean == "4.500" and "nan" not in interval
    values[1] = np.nan
    assert codec.interval(values, places) == "n too small (7 < 8)"
    assert codec.interval(np.full(9, np.nan), places) == codec.interval(np.zeros(0), places) == "-"
