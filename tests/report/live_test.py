"""Charts and page of a run that is going on."""

import importlib.util
import json

import events
import numpy as np
import pytest

from musicrl_jax.core import extras
from musicrl_jax.core.metrics import WANDB, WANDB_ID, MetricWriter
from musicrl_jax.report.live import LiveCharts, loss_curves

RATE = 16_000
WAVS = np.sin(np.arange(2 * RATE, dtype=np.float32).reshape(2, RATE) / 9)


def show_steps(directory, steps, start=0):
    """Shows some steps of a run of two clips a step."""
    with MetricWriter(directory, start) as writer:
        charts = LiveCharts(
            writer, directory, 2, RATE, ["a <reel>", "a jig"], "Two clips.", loss_curves
        )
        for step in range(start, steps):
            writer.write(step, {"loss": 3.0 - step})
            writer.histogram(step, "reward", np.array([0.0, 1.0, np.nan], np.float32))
            charts.end_step(step)
            charts.show(step, {"base": WAVS, "policy": 0.5 * WAVS})


def test_a_page_has_the_clips_and_curves_of_the_last_step(tmp_path):
    show_steps(tmp_path, 2)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<audio ") == 4 and "a &lt;reel&gt;" in page and "Two clips." in page
    assert "Clips a second" in page and "<dd>2</dd>" in page and "<figcaption>loss" in page


def test_a_run_without_sound_has_curves_alone(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(0, {"loss": 1.0})
        LiveCharts(writer, tmp_path, 2, 0, ["a"], "None.", loss_curves).show(0, {})
    page = (tmp_path / "page.html").read_text()
    assert "<audio " not in page and "<figcaption>loss" in page


def test_a_run_without_the_extra_report_has_charts_alone(tmp_path, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        extras.importlib.util,
        "find_spec",
        lambda name: None if name == "jinja2" else find_spec(name),
    )
    show_steps(tmp_path, 1)
    assert not (tmp_path / "page.html").exists()
    assert "The page of a run needs jinja2" in capsys.readouterr().out
    assert len(events.read(tmp_path / "tensorboard")["clip_2/policy"]) == 1


def test_wandb_gets_the_same_charts_offline_and_a_resumed_run_is_one_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv(WANDB, "1")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    show_steps(tmp_path, 2)
    show_steps(tmp_path, 3, start=2)

    values, runs = {}, set()
    for record in events.read_wandb(tmp_path):
        if record.WhichOneof("record_type") == "run":
            runs.add(record.run.run_id)
        if record.WhichOneof("record_type") == "history":
            row = {}
            for item in record.history.item:
                row[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
            for name in row:
                values.setdefault(name, []).append(row["step"])
    assert runs == {(tmp_path / WANDB_ID).read_text()}
    assert values["loss"] == [0, 1, 2] and values["clips_per_second"] == [1]
    assert any(name.startswith("clip_2/policy") for name in values)
    assert any(name.startswith("histogram/reward") for name in values)


def test_wandb_without_its_package_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(WANDB, "1")
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"--wandb needs wandb: pip install"):
        MetricWriter(tmp_path)
