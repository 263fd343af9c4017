"""What evaluate says of its measurements: figures of enough prompts, words of too few."""

import json

import numpy as np
import pytest

from musicrl_jax import evaluate
from musicrl_jax.arena.audience import Hearing
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
    told = evaluate._figures(found, NAMES, "MusicLM", ["R"], real, seed=0)
    return told | evaluate._opinions(
        Hearing(judging_panel(), None, {}), found, heard, raters=3, seed=0
    )


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
    for figures in (*told["rewards"].values(), *told["gains"].values(), told["kl"], told["mos"]):
        assert figures and all(figure == words for figure in figures.values())
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


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"\0" * 99, b'{"identity": 3}', b'{"identity": {}, "rewards": []}']
)
def test_a_damaged_summary_is_set_aside(tmp_path, content, capsys):
    path = tmp_path / "summary.json"
    path.write_bytes(content)
    assert evaluate._summary(path) == {} == evaluate._summary(path)
    assert (tmp_path / "summary.json.damaged").read_bytes() == content and not path.exists()
    assert capsys.readouterr().out.startswith(f"{path} is damaged: ")


def test_a_whole_summary_is_read(tmp_path):
    told = summary(7) | {"page": "p", "identity": {"hashes": {}}}
    (tmp_path / "summary.json").write_text(json.dumps(told))
    assert evaluate._summary(tmp_path / "summary.json") == json.loads(json.dumps(told))
