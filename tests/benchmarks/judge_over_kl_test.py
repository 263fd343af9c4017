"""The drawing of opinion scores over KL, from a made-up summary."""

import json
import sys
import xml.etree.ElementTree

import judge_over_kl
import numpy as np
import pytest


def interval(mean, half=0.1):
    return {"mean": mean, "low": mean - half, "high": mean + half}


@pytest.fixture
def summary():
    """Returns a base, one run at three steps, another policy, and a best of 16 without a KL."""
    names = ["MusicLM", "R 12", "R", "R 48", "RU", "best of 16"]
    kls = {"R 12": 2.25, "R": 9.0, "R 48": 16.0, "RU": 20.25}
    return {
        "policies": names,
        "mos": {name: interval(2.5 + 0.1 * number) for number, name in enumerate(names)},
        "kl": {name: interval(kl) for name, kl in kls.items()},
    }


def svg_of(summary, folder, monkeypatch):
    """Returns the SVG that the command writes."""
    (folder / "evaluation").mkdir(exist_ok=True)
    (folder / "evaluation/summary.json").write_text(json.dumps(summary))
    out = folder / "docs/drawing.svg"
    monkeypatch.setattr(sys, "argv", ["", f"--run={folder}", f"--out={out}"])
    judge_over_kl.main()
    return out.read_text(encoding="utf-8")


def test_a_policy_is_at_the_square_root_of_its_kl(summary):
    placed, unplaced = judge_over_kl.points(summary)
    assert {name: point[0] for name, point in placed.items()} == {
        "MusicLM": 0.0,
        "R 12": 1.5,
        "R": 3.0,
        "R 48": 4.0,
        "RU": 4.5,
    }
    np.testing.assert_allclose(placed["R"][1:], (2.7, 2.6, 2.8))
    assert unplaced == {"best of 16": 3.0}


def test_a_policy_of_too_few_clips_is_left_out(summary, capsys):
    summary["mos"]["RU"] = {"too_small": "n too small (3 < 8)"}
    assert "RU" not in judge_over_kl.points(summary)[0]
    assert "RU is left out: n too small (3 < 8)" in capsys.readouterr().err


def test_steps_of_one_run_are_joined_with_the_base():
    names = ["base", "R 12", "R", "RU", "R 48", "U", "R2"]
    assert judge_over_kl.one_run(names, "base") == ["base", "R 12", "R", "R 48"]
    assert judge_over_kl.one_run(["base", "U"], "base") == []


def test_the_drawing_is_a_small_svg_with_every_name(summary, tmp_path, monkeypatch):
    svg = svg_of(summary, tmp_path, monkeypatch)
    texts = [text.text for text in xml.etree.ElementTree.fromstring(svg).iter() if text.text]
    labels = judge_over_kl.TITLE, judge_over_kl.X_LABEL, judge_over_kl.Y_LABEL
    assert {*summary["policies"], *labels} <= set(texts)
    assert len(svg) < 100_000
    # Equal figures are equal bytes, and a page shows its own background and no black or white.
    assert svg == svg_of(summary, tmp_path, monkeypatch)
    assert not any(colour in svg for colour in ("#000000", "#ffffff"))
