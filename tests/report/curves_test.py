"""Metrics files of runs: whole, resumed, cut off, damaged."""

import json

import numpy as np
import pytest

from musicrl_jax.report import curves


def write(path, text):
    path.write_bytes(text.encode())
    return path


def test_metrics_come_back_by_name(tmp_path):
    lines = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "kl": 3}, {"step": 4, "kl": -1.5}]
    path = write(tmp_path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    metrics = curves.read_metrics(path)
    assert sorted(metrics) == ["kl", "loss"]
    np.testing.assert_array_equal(metrics["loss"], [[1, 2], [0.5, 0.25]])
    np.testing.assert_array_equal(metrics["kl"], [[2, 4], [3.0, -1.5]])
    assert metrics["kl"][0].dtype == np.int64 and metrics["kl"][1].dtype == np.float64


def test_a_resumed_run_overwrites_its_steps(tmp_path):
    steps = [(1, 1.0), (2, 2.0), (3, 3.0), (2, 20.0), (3, 30.0), (4, 40.0)]
    text = "".join(f'{{"step": {s}, "x": {x}}}\n' for s, x in steps)
    metrics = curves.read_metrics(write(tmp_path / "metrics.jsonl", text))
    np.testing.assert_array_equal(metrics["x"], [[1, 2, 3, 4], [1.0, 20.0, 30.0, 40.0]])


def test_an_incomplete_last_line_is_ignored(tmp_path):
    first, last = '{"step": 1, "é": 0.5}\n', '{"step": 2, "é": 0.75}'
    for cut in range(len(last.encode())):
        path = tmp_path / "metrics.jsonl"
        path.write_bytes(first.encode() + last.encode()[:cut])
        np.testing.assert_array_equal(curves.read_metrics(path)["é"], [[1], [0.5]])
    # Complete but for its newline.
    whole = write(tmp_path / "metrics.jsonl", first + last)
    np.testing.assert_array_equal(curves.read_metrics(whole)["é"], [[1, 2], [0.5, 0.75]])


@pytest.mark.parametrize(
    "line",
    ['{"step": 2, "x', "", "7", '{"x": 1.0}', '{"step": 1.5, "x": 1}', '{"step": 2, "x": "high"}'],
)
def test_a_damaged_line_elsewhere_is_named_and_left_out(tmp_path, line, capsys):
    text = f'{{"step": 1, "x": 1}}\n{line}\n{{"step": 3, "x": 2}}\n'
    path = write(tmp_path / "metrics.jsonl", text)
    np.testing.assert_array_equal(curves.read_metrics(path)["x"], [[1, 3], [1, 2]])
    assert f"{path} is damaged: line 2 (b'{line}')" in capsys.readouterr().out.replace("\\", "")


def test_a_damaged_last_line_with_its_newline_is_named(tmp_path, capsys):
    path = write(tmp_path / "metrics.jsonl", '{"step": 1, "x": 1}\n{"step": 2, "x"\n')
    assert curves.read_metrics(path)["x"][0].tolist() == [1]
    assert "line 2" in capsys.readouterr().out


def test_empty_and_missing_files(tmp_path):
    assert curves.read_metrics(write(tmp_path / "metrics.jsonl", "")) == {}
    with pytest.raises(FileNotFoundError, match=r"no metrics file at .*absent"):
        curves.read_metrics(tmp_path / "absent.jsonl")


def test_a_series_needs_as_many_values_as_steps():
    with pytest.raises(ValueError, match=r"curve 'Loss', series 'train'.*\(2,\).*\(3,\)"):
        curves.Curve("Loss", "step", "nats", {"train": (np.arange(2), np.arange(3.0))})
