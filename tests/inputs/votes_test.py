"""Votes come with their clips; uncounted votes are left out, damaged ones are named."""

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


def vote(pair, choice="a", clips_heard=(True, True), listener="someone", prompt=None):
    ids = f"clip-{2 * pair}", f"clip-{2 * pair + 1}"
    return Vote(0, prompt or f"prompt {pair}", *ids, choice, listener, list(clips_heard))


@pytest.fixture
def folder(tmp_path):
    """Pairs 0 to 3 are in train, pair 4 is in validation."""
    for split, numbers in (("train", range(8)), ("validation", range(8, 10))):
        write_tokens(str(tmp_path), split, map(clip, numbers), MODELS, LAYOUT, {})
    votes = [vote(pair, choice) for pair, choice in enumerate(("a", "b", "tie", "abstain", "b"))]
    votes += [vote(0, "b", clips_heard=(True, False)), vote(0, "b", listener="another")]
    write_votes(str(tmp_path), votes)
    return str(tmp_path)


def test_votes_that_count_come_with_both_clips(folder):
    data = Votes(folder, MODELS)
    assert data.splits() == ["train", "validation"] and data.layout() == LAYOUT
    assert (data.count("train"), data.count("validation")) == (4, 1)
    batch = next(data.batches("train", 4, seed=0, epochs=1))
    votes = zip(batch["mulan"][:, 0].tolist(), batch["vote"].tolist(), strict=True)
    assert sorted(votes) == [(0, 0.0), (0, 1.0), (1, 0.0), (2, 0.5)]
    assert batch["vote"].dtype == np.float32
    for name in ("semantic", "acoustic"):
        for pair, clips in zip(batch["mulan"][:, 0], batch[name], strict=True):
            expected = [clip(2 * pair)[name], clip(2 * pair + 1)[name]]
            np.testing.assert_array_equal(clips, expected)


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
    swapped = []
    for each in read_votes(folder):
        choice, clips_heard = opposite[each.vote], each.clips_heard[::-1]
        swapped.append(each._replace(a=each.b, b=each.a, vote=choice, clips_heard=clips_heard))
    write_votes(folder, swapped)
    after = next(Votes(folder).batches("train", 4, seed=3, epochs=1))
    np.testing.assert_array_equal(after["vote"], 1 - before["vote"])
    for name in ("semantic", "acoustic"):
        np.testing.assert_array_equal(after[name], before[name][:, ::-1])


def test_batches_are_a_function_of_seed_and_step(folder):
    walk, resumed = (Votes(folder).batches("train", 3, seed=5, start_step=i) for i in (0, 2))
    later = [next(walk) for _ in range(4)][2:]
    for batch, other in zip(later, resumed, strict=False):
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


@pytest.mark.parametrize(
    "prompt", ["größer", "line\u2028separator", 'quotes " and \\', "two\nlines"]
)
def test_any_prompt_is_read_as_it_was_written(tmp_path, prompt):
    write_votes(str(tmp_path), [vote(0, prompt=prompt), vote(1)])
    assert [each.prompt for each in read_votes(str(tmp_path))] == [prompt, "prompt 1"]


LINE = {
    "prompt": "p",
    "a": "clip-0",
    "b": "clip-1",
    "vote": "a",
    "listener": "l",
    "heard": [True, True],
}
NO_COLUMN = "no such column; there are prompt, a, b, vote, listener, heard"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"vote": "c"}, r"column 'vote': 'c' is none of \('a', 'b', 'tie', 'abstain'\)"),
        ({"heard": [True]}, r"column 'heard': \[True\] must be two"),
        ({"heard": [1, 0]}, r"column 'heard': \[1, 0\] must be two"),
        ({"heard": "yes"}, "column 'heard': 'yes' where a list should be"),
        ({"prompt": 3}, "column 'prompt': 3 where text should be"),
        ({"prompt": "a \ud800 b"}, "column 'prompt': half of a surrogate pair"),
        ({"b": "clip-0"}, "column 'b': 'clip-0' is clip a too"),
        ({"time": 3}, f"column 'time': {NO_COLUMN}"),
        ("{half a line", "column 2: not JSON"),
        ('{"prompt": "p", "a": "clip-0", "a": "clip-2"}', "column 'a': twice in one object"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, message):
    if isinstance(line, dict):
        line = json.dumps(LINE | line)
    (tmp_path / VOTES).write_text(f"{json.dumps(LINE)}\n{line}\n")
    with pytest.raises(ValueError, match=f"line 2, {message}"):
        read_votes(str(tmp_path))


@pytest.mark.parametrize("has_votes", [True, False], ids=["votes alone", "nothing"])
def test_a_folder_without_tokens_names_the_verb_that_writes_both(tmp_path, has_votes):
    readers = [Votes(str(tmp_path))]
    if has_votes:
        write_votes(str(tmp_path), [vote(0)])
        readers.append(Tokens(str(tmp_path)))
    message = r"no tokens at .* for the votes.*`musicrl collect`"
    for data in readers:
        for read in (data.layout, data.splits, lambda data=data: data.count("train")):
            with pytest.raises(FileNotFoundError, match=message) as error:
                read()
            assert "encode" not in str(error.value)


def test_a_missing_split_and_other_models_name_the_verb(folder):
    message = "written by codec c0, and this run uses codec other: run `musicrl collect` again"
    with pytest.raises(ValueError, match=message):
        Votes(folder, {"codec": "other"}).count("train")
    with pytest.raises(ValueError, match="`musicrl collect` did not finish it"):
        Votes(folder).batches("test", 1, seed=0)


def test_figures_of_simulated_listeners_are_not_mistaken_for_those_of_people(folder, capsys):
    path, listener = Path(folder) / FIGURES, f"{SIMULATED} 3 of the training panel"
    content = '{"panel": "training panel", "agreement": {"train": 0.7}}'
    path.write_text(content)
    write_votes(folder, [vote(0, listener=listener), vote(4, listener=listener)])
    assert path.read_text() == content
    votes = Path(folder) / VOTES
    votes.write_text(votes.read_text().replace(listener, "Ada"))
    assert Votes(folder).count("train") == 1
    assert not path.exists()
    assert (Path(folder) / "agreement.training_panel.json").read_text() == content
    message = "is of simulated listeners of the training panel, and 'Ada' voted; renamed"
    assert message in capsys.readouterr().out


def test_a_missing_clip_is_named(folder):
    # The clip is in another split.
    write_votes(folder, [vote(0), vote(1)._replace(b="clip-9")])
    with pytest.raises(ValueError, match="line 2, column 'b': no clip 'clip-9' in split 'train'"):
        Votes(folder).batches("train", 1, seed=0)
    write_votes(folder, [vote(0), vote(1)._replace(a="clip-99")])
    for split in ("train", "validation"):
        with pytest.raises(ValueError, match="line 2, column 'a': no clip 'clip-99' in any split"):
            Votes(folder).count(split)


def test_a_batch_larger_than_the_votes_is_refused(folder):
    with pytest.raises(ValueError, match="batch_size 5 is more than the 4 votes of split 'train'"):
        Votes(folder).batches("train", 5, seed=0)
