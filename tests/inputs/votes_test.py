"""Votes come back with their clips, swapped ones swapped; what does not count is left out, what is damaged is named."""

import json
from pathlib import Path

import numpy as np
import pytest

from musicrl_jax.inputs.tokens import Tokens, write_tokens
from musicrl_jax.inputs.votes import FIGURES, SIMULATED, VOTES, Vote, Votes, read_votes, write_votes

MODELS = {"codec": "c0", "mulan": "a1"}
LAYOUT = {
    "semantic_codes": 5,
    "acoustic_codes": 7,
    "acoustic_levels": 4,
    "mulan_levels": 3,
    "mulan_codes": 4,
}


def clip(number):
    rng = np.random.default_rng(number)
    return {
        "semantic": rng.integers(0, 5, 6),
        "acoustic": rng.integers(0, 7, (12, 4)),
        "mulan": np.full(3, number // 2),  # that of the prompt
        "id": f"clip-{number}",
        "caption": f"prompt {number // 2}",
    }


def vote(pair, choice="a", heard=(True, True), listener="someone", prompt=None):
    ids = f"clip-{2 * pair}", f"clip-{2 * pair + 1}"
    return Vote(0, prompt or f"prompt {pair}", *ids, choice, listener, list(heard))


@pytest.fixture
def folder(tmp_path):
    """Pairs 0 to 3 are in train, pair 4 is in validation."""
    for split, numbers in (("train", range(8)), ("validation", range(8, 10))):
        write_tokens(str(tmp_path), split, map(clip, numbers), MODELS, LAYOUT, {})
    choices = {0: "a", 1: "b", 2: "tie", 3: "abstain", 4: "b"}
    votes = [vote(pair, choice) for pair, choice in choices.items()]
    write_votes(
        str(tmp_path), [*votes, vote(0, "b", heard=(True, False)), vote(0, "b", listener="another")]
    )
    return str(tmp_path)


def test_votes_that_count_come_with_both_clips(folder):
    data = Votes(folder, MODELS)
    assert data.splits() == ["train", "validation"] and data.layout() == LAYOUT
    assert (data.count("train"), data.count("validation")) == (4, 1)
    batch = next(data.batches("train", 4, seed=0, epochs=1))
    assert sorted(zip(batch["mulan"][:, 0].tolist(), batch["vote"].tolist(), strict=True)) == [
        (0, 0.0),
        (0, 1.0),
        (1, 0.0),
        (2, 0.5),
    ]
    assert batch["vote"].dtype == np.float32
    for row in range(4):
        for side in (0, 1):
            expected = clip(2 * batch["mulan"][row, 0] + side)
            for name in ("semantic", "acoustic"):
                np.testing.assert_array_equal(batch[name][row, side], expected[name])


def test_clips_of_any_system_are_voted_on(tmp_path):
    clips = [{"id": f"clip-{i}", "caption": "", "tokens": np.full((2, 3), i)} for i in range(4)]
    write_tokens(str(tmp_path), "train", clips, {}, {}, {})
    write_votes(str(tmp_path), [vote(0), vote(1, "b")])
    batch = next(Votes(str(tmp_path)).batches("train", 2, seed=0, epochs=1))
    assert set(batch) == {"tokens", "vote"} and batch["tokens"].shape == (2, 2, 2, 3)
    pairs = zip(batch["tokens"][:, :, 0, 0].tolist(), batch["vote"].tolist(), strict=True)
    assert sorted(pairs) == [([0, 1], 1.0), ([2, 3], 0.0)]


@pytest.mark.exactness(20)
def test_clips_swapped_in_the_file_are_swapped_in_the_batch(folder):
    before = next(Votes(folder).batches("train", 4, seed=3, epochs=1))
    opposite = {"a": "b", "b": "a", "tie": "tie", "abstain": "abstain"}
    swapped = [
        v._replace(a=v.b, b=v.a, vote=opposite[v.vote], heard=v.heard[::-1])
        for v in read_votes(folder)
    ]
    write_votes(folder, swapped)
    after = next(Votes(folder).batches("train", 4, seed=3, epochs=1))
    np.testing.assert_array_equal(after["vote"], 1 - before["vote"])
    for name in ("semantic", "acoustic"):
        np.testing.assert_array_equal(after[name], before[name][:, ::-1])


def test_batches_are_a_function_of_seed_and_step(folder):
    def some(start):
        found = Votes(folder).batches("train", 3, seed=5, start_step=start)
        return [next(found) for _ in range(4 - start)]

    for one, other in zip(some(0)[2:], some(2), strict=True):
        assert all((one[name] == other[name]).all() for name in one)


@pytest.mark.parametrize(
    "prompt", ["größer", "line\u2028separator", 'quotes " and \\', "two\nlines"]
)
def test_any_prompt_is_kept(folder, prompt):
    write_votes(folder, [vote(0, prompt=prompt), vote(1)])
    assert [found.prompt for found in read_votes(folder)] == [prompt, "prompt 1"]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"vote": "c"}, r"line 2, column 'vote': 'c' is none of \('a', 'b', 'tie', 'abstain'\)"),
        ({"heard": [True]}, r"line 2, column 'heard': \[True\] must be two"),
        ({"heard": [1, 0]}, r"line 2, column 'heard': \[1, 0\] must be two"),
        ({"heard": "yes"}, "line 2, column 'heard': 'yes' where a list should be"),
        ({"prompt": 3}, "line 2, column 'prompt': 3 where text should be"),
        ({"prompt": "a \ud800 b"}, "line 2, column 'prompt': half of a surrogate pair"),
        ({"b": "clip-0"}, "line 2, column 'b': 'clip-0' is clip a too"),
        (
            {"time": 3},
            "line 2, column 'time': no such column; there are prompt, a, b, vote, listener, heard",
        ),
    ],
)
def test_a_damaged_line_is_named(folder, changes, complaint):
    good = {
        "prompt": "p",
        "a": "clip-0",
        "b": "clip-1",
        "vote": "a",
        "listener": "l",
        "heard": [True, True],
    }
    with open(f"{folder}/{VOTES}", "w") as file:
        file.write(f"{json.dumps(good)}\n{json.dumps(good | changes)}\n")
    with pytest.raises(ValueError, match=complaint):
        Votes(folder).count("train")


def test_what_is_no_json_or_missing_is_named(folder):
    with open(f"{folder}/{VOTES}", "a") as file:
        file.write("{half a line")
    with pytest.raises(ValueError, match="line 8, column 2: not JSON"):
        read_votes(folder)
    with pytest.raises(
        FileNotFoundError, match=r"no votes at .*elsewhere/votes\.jsonl; write them with"
    ):
        read_votes(f"{folder}/elsewhere")


def test_a_field_given_twice_is_named(folder):
    with open(f"{folder}/{VOTES}", "a") as file:
        file.write('\n{"prompt": "p", "a": "clip-0", "a": "clip-2", "b": "clip-1", "vote": "a"}\n')
    with pytest.raises(ValueError, match="line 9, column 'a': twice in one object"):
        read_votes(folder)


@pytest.mark.parametrize("there", [True, False], ids=["votes alone", "nothing"])
def test_votes_without_tokens_are_told_the_verb_that_writes_both(tmp_path, there):
    if there:
        write_votes(str(tmp_path), [vote(0)])
    for data in (Votes(str(tmp_path)), *([Tokens(str(tmp_path))] if there else [])):
        for read in (data.layout, data.splits, lambda data=data: data.count("train")):
            with pytest.raises(
                FileNotFoundError, match=r"no tokens at .* for the votes.*`musicrl collect`"
            ) as told:
                read()
            assert "encode" not in str(told.value)


def test_a_split_and_models_of_votes_are_told_the_right_verb(folder):
    with pytest.raises(
        ValueError, match=r"run `musicrl collect` again with the models of this run"
    ):
        Votes(folder, {"codec": "other"}).count("train")
    with pytest.raises(ValueError, match="`musicrl collect` did not finish it"):
        Votes(folder).layout() and next(Votes(folder).batches("test", 1, seed=0))


def test_figures_of_simulated_listeners_are_not_taken_for_peoples(folder, capsys):
    path, listener = Path(folder) / FIGURES, f"{SIMULATED} 3 of the training panel"
    content = '{"panel": "training panel", "agreement": {"train": 0.7}}'
    path.write_text(content)
    write_votes(folder, [vote(0, listener=listener), vote(4, listener=listener)])
    assert path.read_text() == content
    lines = Path(folder, VOTES).read_text().replace(listener, "Ada")
    Path(folder, VOTES).write_text(lines)
    assert Votes(folder).count("train") == 1
    assert (
        not path.exists()
        and (Path(folder) / "agreement.training_panel.json").read_text() == content
    )
    assert (
        "is of simulated listeners of the training panel, and 'Ada' voted; renamed"
        in capsys.readouterr().out
    )


def test_a_clip_that_is_not_there_is_named(folder):
    write_votes(folder, [vote(0), vote(1)._replace(b="clip-9")])  # which is in another split
    with pytest.raises(ValueError, match="line 2, column 'b': no clip 'clip-9' in split 'train'"):
        next(Votes(folder).batches("train", 1, seed=0))
    write_votes(folder, [vote(0), vote(1)._replace(a="clip-99")])
    for split in ("train", "validation"):
        with pytest.raises(ValueError, match="line 2, column 'a': no clip 'clip-99' in any split"):
            Votes(folder).count(split)


def test_tokens_of_other_models_are_refused(folder):
    with pytest.raises(ValueError, match="were written by codec c0, and this run uses codec other"):
        Votes(folder, {"codec": "other"}).count("train")


def test_more_than_there_is_is_refused(folder):
    with pytest.raises(ValueError, match="batch_size 5 is more than the 4 votes of split 'train'"):
        next(Votes(folder).batches("train", 5, seed=0))
