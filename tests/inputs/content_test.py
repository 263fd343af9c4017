"""Content hashes: equal for equal examples, however they are serialised, and read by a run without its records."""

import itertools
import shutil

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from musicrl_jax.core import checkpoint
from musicrl_jax.core.run_checkpoints import RunCheckpoints
from musicrl_jax.inputs import build, content
from musicrl_jax.inputs.clips import Clips, Ratings
from musicrl_jax.inputs.prompts import Prompts

FIELDS = {"name": "mine", "train": 3, "validation": 1, "test": 1, "samples": 50}


def example(**values):
    """A `tf.train.Example` with features in the order of the arguments."""
    made = tf.train.Example()
    for name, value in values.items():
        feature = made.features.feature[name]
        if isinstance(value[0], bytes):
            feature.bytes_list.value.extend(value)
        elif isinstance(value[0], float):
            feature.float_list.value.extend(value)
        else:
            feature.int64_list.value.extend(value)
    return made


def digest(*examples):
    made = content.ContentHash()
    for each in examples:
        made.add_example(each)
    return made.hexdigest()


def test_the_order_of_features_changes_nothing_and_all_else_does():
    a, b = {"a": [b"x"], "n": [1, 2], "f": [0.5]}, {"a": [b"y"], "n": [3], "f": [1.5]}
    first = digest(example(**a), example(**b))
    for order in itertools.permutations(a):
        assert digest(example(**{name: a[name] for name in order}), example(**b)) == first
    others = [
        [example(**b), example(**a)],
        [example(**a)],
        [example(**a), example(**b), example(**b)],
        [example(**(a | {"n": [1, 3]})), example(**b)],
        [example(**(a | {"f": [0.25]})), example(**b)],
        [example(**(a | {"a": [b"x", b""]})), example(**b)],
        [example(**(a | {"a": [b"xn"]})), example(**b)],
        [example(**{"A": a["a"], "n": a["n"], "f": a["f"]}), example(**b)],
    ]
    assert len({first, *(digest(*other) for other in others)}) == len(others) + 1
    assert digest(example(a=[b"xy", b"z"])) != digest(example(a=[b"x", b"yz"]))
    assert digest(example(a=[1])) != digest(example(a=[1.0]))


@pytest.fixture(scope="module")
def mine(ramp_builder, tmp_path_factory):
    """Where 'ramp/mine' is prepared."""
    folder = tmp_path_factory.mktemp("mine")
    build.prepare(ramp_builder, FIELDS, str(folder))
    return folder


def described(folder):
    return checkpoint.describe(Clips({"ramp/mine": 1.0}, str(folder), 100))


def test_equal_sets_have_equal_hashes_and_others_have_others(ramp_builder, mine, tmp_path):
    hashes = content.read(mine / "ramp/mine/1.0.0")
    assert sorted(hashes) == ["test", "train", "validation"] and len(set(hashes.values())) == 3
    for lowest, splits in ((-200, set()), (-199, {"test", "train", "validation"})):
        build.prepare(ramp_builder, {**FIELDS, "lowest": lowest}, str(tmp_path / str(lowest)))
        other = content.read(tmp_path / str(lowest) / "ramp/mine/1.0.0")
        assert {split for split in hashes if hashes[split] != other[split]} == splits


def test_a_run_refuses_a_set_that_was_built_anew(ramp_builder, mine, tmp_path):
    run = RunCheckpoints(tmp_path / "run", {"data": described(mine)})
    run.save(1, {"w": np.zeros(1)})
    run.close()
    RunCheckpoints(tmp_path / "run", {"data": described(mine)}).close()
    build.prepare(ramp_builder, {**FIELDS, "lowest": 0}, str(tmp_path / mine.name))
    message = (
        r"checkpoints holds a run that learned from other data: ramp/mine was built anew with other examples "
        r"\(content hash of test \w{12}, now \w{12}; train .*\); choose a new MODEL_DIR, or put back the data"
    )
    with pytest.raises(ValueError, match=message):
        RunCheckpoints(tmp_path / "run", {"data": described(tmp_path / mine.name)})
    # one that is gone does not keep a finished run from being left as it is
    shutil.rmtree(tmp_path / mine.name / "ramp")
    RunCheckpoints(tmp_path / "run", {"data": described(tmp_path / mine.name)}).close()


def test_a_set_without_hashes_is_what_it_was(ramp_builder, mine, tmp_path):
    """As built before there were any: it loads, is described as before, and no later command adds a hash."""
    old = tmp_path / mine.name
    shutil.copytree(mine, old)
    (old / "ramp/mine/1.0.0" / content.CONTENT).unlink()
    build.prepare(ramp_builder, FIELDS, str(old))
    clips = Clips({"ramp/mine": 1.0}, str(old), 100)
    assert clips.count("train") == 3
    assert described(old) == {
        "datasets": {"ramp/mine": 1.0},
        "data_dir": mine.name,
        "sample_rate_hz": 100,
        "crop_seconds": None,
        "vocabulary": None,
        "text_length": 64,
        "with_captions": False,
    }
    run = RunCheckpoints(tmp_path / "run", {"data": described(old)})
    run.save(1, {"w": np.zeros(1)})
    run.close()
    RunCheckpoints(tmp_path / "run", {"data": described(old)}).close()
    with pytest.raises(
        ValueError, match=r"ramp/mine was built anew .now it has a content hash, then it has none"
    ):
        RunCheckpoints(tmp_path / "run", {"data": described(mine)})


def test_all_that_reads_a_set_is_described_by_its_hashes_without_a_record(mine, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(mine, bare)
    for path in bare.rglob("*.array_record*"):
        path.unlink()
    hashes = {"ramp/mine": content.read(mine / "ramp/mine/1.0.0")}
    clips = Clips({"ramp/mine": 1.0}, str(bare), 100)
    assert checkpoint.describe(clips)["content"] == hashes
    assert checkpoint.describe(Ratings(clips, "ratings.csv"))["clips"]["content"] == hashes
    assert checkpoint.describe(Prompts(("ramp/mine",), data_dir=str(bare)))["content"] == hashes
    assert "content" not in checkpoint.describe(Prompts(files=("prompts.txt",)))


def test_a_damaged_file_of_hashes_is_named(mine, tmp_path):
    for text, message in (("{", "is not JSON"), ("[]", ".* must be of type dict")):
        (tmp_path / content.CONTENT).write_text(text)
        with pytest.raises(ValueError, match=rf"content\.json.*{message}.*build the data set anew"):
            content.read(tmp_path)


def test_hashes_are_those_of_the_records(mine):
    folder = mine / "ramp/mine/1.0.0"
    assert content.of_splits(tfds.builder_from_directory(folder)) == content.read(folder)
