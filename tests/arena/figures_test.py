"""What is said of measurements: figures of enough prompts, words of too few."""

import numpy as np
import pytest

from musicrl_jax import evaluate
from musicrl_jax.arena import figures
from musicrl_jax.arena.listeners import MEASUREMENTS, judging_panel

NAMES = ["reward", "quality"]


def results(prompts, seeds=2):
    """Measurements of a base and of a policy, by arrays [P, S, ...]."""
    rng = np.random.default_rng(0)
    found = {}
    for number, policy in enumerate(("MusicLM", "R")):
        found[policy] = {
            "reward": number + rng.normal(size=(prompts, seeds)),
            "quality": rng.uniform(size=(prompts, seeds)),
            "kl": np.full((prompts, seeds), 2.0 * number),
            "kl_by_level": rng.uniform(size=(prompts, seeds, 5)),
            "kl_by_second": rng.uniform(size=(prompts, seeds, 2)),
            "features": rng.normal(size=(prompts, 10, 3)),
            "measured": rng.normal(size=(prompts, seeds, len(MEASUREMENTS))) + number,
        }
    return found


def summary(prompts):
    found = results(prompts)
    real = np.random.default_rng(1).normal(size=(prompts, 10, 3))
    heard = np.random.default_rng(2).normal(size=(prompts, len(MEASUREMENTS)))
    told = figures.measured(found, NAMES, ["R"], real, seed=0)
    return told | figures.opinions(judging_panel(), found, heard, raters=3, seed=0)


def leaves(tree):
    if isinstance(tree, dict):
        for part in tree.values():
            yield from leaves(part)
    elif isinstance(tree, list):
        for part in tree:
            yield from leaves(part)
    else:
        yield tree


def test_of_eight_prompts_there_are_figures(capsys):
    told = summary(8)
    assert not any(isinstance(leaf, str) and "too small" in leaf for leaf in leaves(told))
    (pair,) = told["pairs"]
    assert (
        pair["win"] + pair["tie"] + pair["loss"] == pytest.approx(1) and 0 < pair["wilcoxon_p"] <= 1
    )
    assert told["kl"]["R"]["mean"] == 2 and len(told["kl_by_level"]["R"]) == 5
    evaluate._print(told | {"page": "page.html"})
    out = capsys.readouterr().out
    assert "win / tie / loss" in out and "too small" not in out


def test_of_fewer_there_are_words_in_the_summary_and_in_print(capsys):
    told, words = summary(7), {"too_small": "n too small (7 < 8)"}
    for of_each in (*told["rewards"].values(), *told["gains"].values(), told["kl"], told["mos"]):
        assert of_each and all(figure == words for figure in of_each.values())
    assert (
        set(map(str, told["diversity"].values()))
        == set(map(str, told["frechet"].values()))
        == {str(words)}
    )
    assert told["pairs"] == [{"first": "R", "second": "MusicLM", "win_rate": words}]
    assert told["real"]["mos"] == words and told["panel"]["agreement"] == words["too_small"]
    assert told["kl_by_level"] == told["kl_by_second"] == {}
    evaluate._print(told | {"page": "page.html"})
    out = capsys.readouterr().out
    assert out.count("n too small (7 < 8)") == 4 + 1 + 1 and "%" not in out
