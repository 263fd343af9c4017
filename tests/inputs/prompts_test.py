"""Prompts from captions and files: every text once, held-out ones never in training."""

import itertools

import numpy as np
import pytest

from musicrl_jax.inputs.prompts import Prompts

SPLITS = "train", "validation", "test"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prompts.txt"
    lines = [f"a waltz number {i} for two flutes" for i in range(400)]
    text = "\n".join([*lines, "", "  ", "A WALTZ  number 3 for two flutes"])
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_captions_keep_their_split_and_held_out_ones_are_not_in_training(data_dir):
    prompts = Prompts(datasets=("ramp/ten", "ramp/five"), data_dir=data_dir)
    expected = {
        "train": ("all", "train"),
        # Its three captions are also in train.
        "validation": (),
        "test": ("test",),
    }
    for split, places in expected.items():
        captions = []
        for place in places:
            captions += [f"A {kind} jig for {place}, größer" for kind in ("slow", "fast", "lively")]
        assert sorted(prompts.unique(split)) == sorted(captions)
        assert prompts.count(split) == len(captions)


def test_lines_of_a_file_are_split_by_their_words(file):
    prompts = Prompts(files=(file,))
    splits = {split: prompts.unique(split) for split in SPLITS}
    everything = list(itertools.chain(*splits.values()))
    assert len(everything) == len(set(everything)) == 400
    # 90 : 5 : 5 of 400, within 4 standard errors.
    for split, percent in zip(SPLITS, (90, 5, 5), strict=True):
        error = np.sqrt(4 * percent * (1 - percent / 100))
        assert abs(len(splits[split]) - 4 * percent) < 4 * error
    assert Prompts(files=(file, file)).unique("test") == splits["test"]


def test_batches_resume_and_hold_every_prompt_once_an_epoch(file):
    prompts = Prompts(files=(file,))
    count = prompts.count("train")
    walk = itertools.islice(prompts.batches("train", 1, seed=0), 2 * count)
    texts = [text for (text,) in walk]
    assert sorted(texts[:count]) == sorted(texts[count:]) == sorted(prompts.unique("train"))
    assert texts[:count] != texts[count:]
    assert next(prompts.batches("train", 16, seed=0, start_step=7)) == texts[112:128]


def test_few_prompts_repeat_to_fill_a_batch(tmp_path):
    (tmp_path / "few.txt").write_text("\n".join(f"tune {i}" for i in range(5)))
    prompts = Prompts(files=(str(tmp_path / "few.txt"),))
    batch = next(prompts.batches("train", 8, seed=0))
    assert len(batch) == 8 and set(batch) == set(prompts.unique("train"))


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "is no file"),
        (b"a reel\ncaf\xe9", ValueError, r"prompts.txt, line 2: byte 0xe9 is not UTF-8"),
        (b"\n \n", ValueError, "holds no prompts"),
        (b"one tune\n", ValueError, "has no prompts that earlier splits lack"),
    ],
)
def test_wrong_files_are_refused(tmp_path, content, error, message):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    prompts = Prompts(files=(str(path),))
    with pytest.raises(error, match=message):
        for split in SPLITS:
            prompts.batches(split, 2, seed=0)


def test_empty_configs_and_unknown_splits_are_refused(file):
    with pytest.raises(ValueError, match="datasets and files are both empty"):
        Prompts().unique("train")
    with pytest.raises(ValueError, match="split 'dev' is none of train, validation, test"):
        Prompts(files=(file,)).unique("dev")


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"start_step": -1}, {"seed": -1}])
def test_numbers_out_of_range_are_refused(file, wrong):
    with pytest.raises(ValueError, match="must be at least"):
        Prompts(files=(file,)).batches("train", **{"batch_size": 2, "seed": 0, **wrong})
