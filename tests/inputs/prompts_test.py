"""Prompts from captions and files: every text once, held-out ones never trained on."""

import itertools

import numpy as np
import pytest

from musicrl_jax.inputs.prompts import Prompts


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prompts.txt"
    lines = [f"a waltz number {i} for two flutes" for i in range(400)]
    path.write_text(
        "\n".join([*lines, "", "  ", "A WALTZ  number 3 for two flutes"]), encoding="utf-8"
    )
    return str(path)


def test_captions_keep_their_split_and_held_out_ones_are_never_trained_on(data_dir):
    prompts = Prompts(datasets=("ramp/ten", "ramp/five"), data_dir=data_dir)
    kinds = ("slow", "fast", "lively")
    for split, expected in {
        "train": {
            f"A {kind} jig for {where}, größer" for kind in kinds for where in ("all", "train")
        },
        "validation": set(),  # its three captions are also in train
        "test": {f"A {kind} jig for test, größer" for kind in kinds},
    }.items():
        assert set(prompts.unique(split)) == expected
        assert len(prompts.unique(split)) == len(expected) == prompts.count(split)


def test_lines_of_a_file_are_split_by_their_words(file):
    prompts = Prompts(files=(file,))
    splits = {split: prompts.unique(split) for split in ("train", "validation", "test")}
    everything = list(itertools.chain(*splits.values()))
    assert len(everything) == len(set(everything)) == 400
    # 90 : 5 : 5 of 400, within 4 standard errors.
    for split, percent in {"train": 90, "validation": 5, "test": 5}.items():
        assert abs(len(splits[split]) - 4 * percent) < 4 * np.sqrt(
            4 * percent * (1 - percent / 100)
        )
    assert Prompts(files=(file, file)).unique("test") == splits["test"]


def test_batches_resume_and_hold_every_prompt_once_an_epoch(file):
    prompts = Prompts(files=(file,))
    count = prompts.count("train")
    walk = list(itertools.islice(prompts.batches("train", 1, seed=0), 2 * count))
    texts = [text for (text,) in walk]
    assert sorted(texts[:count]) == sorted(texts[count:]) == sorted(prompts.unique("train"))
    assert texts[:count] != texts[count:]
    assert next(prompts.batches("train", 16, seed=0, start_step=7)) == texts[112:128]


def test_few_prompts_fill_a_batch_by_coming_again(tmp_path):
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
    with pytest.raises(error, match=message):
        prompts = Prompts(files=(str(path),))
        for split in ("train", "validation", "test"):
            prompts.batches(split, 2, seed=0)


def test_nothing_to_read_and_unknown_splits_are_refused(file):
    with pytest.raises(ValueError, match="datasets and files are both empty"):
        Prompts().unique("train")
    with pytest.raises(ValueError, match="split 'dev' is none of train, validation, test"):
        Prompts(files=(file,)).unique("dev")


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"start_step": -1}, {"seed": -1}])
def test_numbers_out_of_range_are_refused(file, wrong):
    with pytest.raises(ValueError, match="must be at least"):
        Prompts(files=(file,)).batches("train", **{"batch_size": 2, "seed": 0, **wrong})
