"""Figures of enough prompts, and words in place of figures of too few."""

import json

import numpy as np
import pytest

from musicrl_jax import evaluate
from musicrl_jax.arena import figures
from musicrl_jax.arena.listeners import MEASUREMENTS, judging_panel

NAMES = ["reward", "quality"]


def results(prompts, seeds=2):
    """Returns arrays [P, S, ...] of a base and of a policy."""
    rng = np.random.default_rng(0)
    arrays = {}
    for number, policy in enumerate(("MusicLM", "R")):
        arrays[policy] = {
            "reward": number + rng.normal(size=(prompts, seeds)),
            "quality": rng.uniform(size=(prompts, seeds)),
            "kl": np.full((prompts, seeds), 2.0 * number),
            "kl_by_level": rng.uniform(size=(prompts, seeds, 5)),
            "kl_by_second": rng.uniform(size=(prompts, seeds, 2)),
            "features": rng.normal(size=(prompts, 10, 3)),
            "measured": rng.normal(size=(prompts, seeds, len(MEASUREMENTS))) + number,
        }
    return arrays


def summary(prompts):
    arrays = results(prompts)
    features = np.random.default_rng(1).normal(size=(prompts, 10, 3))
    real = np.random.default_rng(2).normal(size=(prompts, len(MEASUREMENTS)))
    metrics = figures.automatic_metrics(arrays, NAMES, ["R"], features, seed=0)
    return metrics | figures.opinions(judging_panel(), arrays, real, raters=3, seed=0)


def test_eight_prompts_have_figures(capsys):
    report = summary(8)
    assert "too small" not in json.dumps(report)
    (pair,) = report["pairs"]
    assert pair["win"] + pair["tie"] + pair["loss"] == pytest.approx(1)
    assert 0 < pair["wilcoxon_p"] <= 1
    assert report["kl"]["R"]["mean"] == 2 and len(report["kl_by_level"]["R"]) == 5
    evaluate._print(report | {"page": "page.html"})
    out = capsys.readouterr().out
    assert "win / tie / loss" in out and "too small" not in out


def test_fewer_have_words_in_the_summary_and_in_print(capsys):
    report, words = summary(7), {"too_small": "n too small (7 < 8)"}
    for of_each in (
        *report["rewards"].values(),
        *report["gains"].values(),
        report["kl"],
        report["mos"],
    ):
        assert of_each and all(figure == words for figure in of_each.values())
    for name in ("diversity", "frechet"):
        assert all(figure == words for figure in report[name].values())
    assert report["pairs"] == [{"first": "R", "second": "MusicLM", "win_rate": words}]
    assert report["real"]["mos"] == words and report["panel"]["agreement"] == words["too_small"]
    assert report["kl_by_level"] == report["kl_by_second"] == {}
    evaluate._print(report | {"page": "page.html"})
    out = capsys.readouterr().out
    assert out.count("n too small (7 < 8)") == 4 + 1 + 1 and "%" not in out
