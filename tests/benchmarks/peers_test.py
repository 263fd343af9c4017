"""The table of speed: its ratios, and that each contestant samples and scores the same thing."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
from contestants import rows

RL, PLAIN_RL = rows.BY_NAME["RL, tiny, batch 4"], rows.BY_NAME["RL, plain tiny, 4 x 6"]


def test_rows_have_names_of_their_own_and_sizes():
    assert len(rows.BY_NAME) == len(rows.ROWS + rows.TINY_ROWS)
    for row in rows.BY_NAME.values():
        assert row.kind == "decode" or row.size in rows.SIZES


def test_a_ratio_is_of_least_values_and_of_each_turn():
    assert peers.ratio([2.0, 1.0], [3.0, 4.0]) == "**3x** [1.5, 4]"
    assert peers.ratio([2.0], [1.0]) == "**0.5x**"
    assert peers.ratio(None, [1.0]) == peers.ratio([1.0], None) == peers.ratio([0.0], [1.0]) == ""


def test_the_table_has_ratios_first_and_only_what_was_measured():
    row = rows.Row("decode", "demo", 2)
    figures = {
        "ours": {"codec decode": [0.5, 0.1], rows.COMPILE: [3.0]},
        "theirs": {"codec decode": [0.4, 0.2]},
    }
    assert peers.table(["ours", "theirs"], {row: figures})[2:] == [
        f"| {row} | codec decode | **2x** [0.8, 2] | 0.1 s, 100 x real time "
        "| 0.2 s, 50 x real time |",
        f"| {row} | compile |  | 3 s |  |",
    ]


def test_an_unknown_contestant_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="nothing is no folder and no git revision"):
        peers.Contestant("nothing", tmp_path, sys.executable)
    with pytest.raises(SystemExit, match="too old"):
        peers.Contestant(str(tmp_path), tmp_path, sys.executable)


def test_a_failure_has_the_end_of_the_output(tmp_path):
    contestant = peers.Contestant("transformers", tmp_path, sys.executable)
    contestant.kind = "nothing"
    with pytest.raises(peers.ContestantError, match=r"^transformers failed on RL(?s:.*)KeyError"):
        peers.Process(contestant, RL, tmp_path)


def test_the_plain_system_samples_what_it_scores():
    from contestants import by_systems

    system = by_systems.system_of(PLAIN_RL)
    values = by_systems.drawing(PLAIN_RL).values
    policy = jax.tree.map(lambda x: 20 * jnp.asarray(x), values["policy"])
    weights = system.compute_copy(by_systems.Weights(policy, {}), "float32")

    @jax.jit
    def sample_and_score(policy, weights, condition, keys):
        arguments = keys, PLAIN_RL.length, by_systems.SAMPLING
        sampled = system.sample(weights, condition, *arguments)
        return sampled, system.log_probs(policy, condition, sampled, by_systems.SAMPLING)

    arguments = policy, weights.policy, values["condition"], values["keys"]
    sampled, scored = sample_and_score(*arguments)
    np.testing.assert_allclose(sampled.log_probs, scored, atol=1e-5)
    assert np.ptp(sampled.log_probs) > 0.1


@pytest.mark.slow  # it imports PyTorch
@pytest.mark.parametrize("row", [RL, PLAIN_RL], ids=str)
def test_the_peer_scores_what_it_samples(row):
    pytest.importorskip("torch", reason="pip install -e '.[parity]'")
    from contestants import by_transformers

    # Greedy codes are the likeliest codes given those before them. Larger weights make them differ.
    work = by_transformers.work(row)
    decoder = work.decoder
    for model in (decoder.model, work.anchor):
        for weights in model.parameters():
            weights.data *= 8 if weights.ndim > 1 else 1
    codes = decoder.sample(do_sample=False, top_k=None, temperature=None)
    likeliest = decoder.logits(decoder.model, codes).argmax(-1)
    assert (likeliest == codes).all() and len(codes.unique()) > 3

    # A policy that is its anchor has no KL; sampling differs from clip to clip.
    work.sampled = decoder.sample()
    log_probs, kl = work.scores()
    assert log_probs.shape == kl.shape == (row.batch, codes[0].numel())
    assert (log_probs < 0).all() and (kl == 0).all()
    assert (work.sampled != work.sampled[:1]).any()


@pytest.mark.slow
@pytest.mark.parametrize("pair", [(".", "transformers"), (".", "limit"), ("f1186c7", ".")], ids=str)
def test_every_row_runs(pair):
    """A clone without its history, or an environment without torch, skips its pair."""
    root = Path(__file__).parents[2]
    if "transformers" in pair:
        pytest.importorskip("torch", reason="pip install -e '.[parity]'")
    known = ["git", "cat-file", "-e", f"{pair[0]}^{{commit}}"]
    if pair[0] != "." and subprocess.run(known, cwd=root, capture_output=True).returncode:
        pytest.skip(f"no revision {pair[0]} in this clone")
    command = [sys.executable, "tests/benchmarks/peers.py", *pair, "--tiny", "--repeats=1"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for row in rows.TINY_ROWS:
        assert f"| {row} | " in done.stdout
