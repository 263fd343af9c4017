"""Content hashes: equal for equal examples in any serialisation, used without reading records."""

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
LISTS = {bytes: "bytes_list", float: "float_list", int: "int64_list"}


def digest(*examples):
    """Returns the hash of examples, each with its features in the order of the dict."""
    content_hash = content.ContentHash()
    for values in examples:
        example = tf.train.Example()
        for name, value in values.items():
            feature = example.features.feature[name]
            getattr(feature, LISTS[type(value[0])]).value.extend(value)
        content_hash.add_example(example)
    return content_hash.hexdigest()


def test_the_hash_depends_on_all_but_the_order_of_features():
    a, b = {"a": [b"x"], "n": [1, 2], "f": [0.5]}, {"a": [b"y"], "n": [3], "f": [1.5]}
    for order in itertools.permutations(a):
        assert digest({name: a[name] for name in order}, b) == digest(a, b)
    others = [
        [b, a],
        [a],
        [a, b, b],
        [a | {"n": [1, 3]}, b],
        [a | {"f": [0.25]}, b],
        [a | {"a": [b"x", b""]}, b],
        [a | {"a": [b"xn"]}, b],
        [{"A": a["a"], "n": a["n"], "f": a["f"]}, b],
        [{"a": [b"xy", b"z"]}],
        [{"a": [b"x", b"yz"]}],
        [{"a": [1]}],
        [{"a": [1.0]}],
    ]
    assert len({digest(a, b), *(digest(*other) for other in others)}) == len(others) + 1


@pytest.fixture(scope="module")
def mine(ramp_builder, tmp_path_factory):
    """Builds 'ramp/mine' and returns its folder."""
    folder = tmp_path_factory.mktemp("mine")
    build.prepare(ramp_builder, FIELDS, str(folder))
    return folder


def described(folder):
    return checkpoint.describe(Clips({"ramp/mine": 1.0}, str(folder), 100))


def save_run(folder, data):
    run = RunCheckpoints(folder, {"data": data})
    run.save(1, {"w": np.zeros(1)})
    run.close()


def test_equal_sets_have_equal_hashes_and_others_differ(ramp_builder, mine, tmp_path):
    hashes = content.read(mine / "ramp/mine/1.0.0")
    assert sorted(hashes) == ["test", "train", "validation"] and len(set(hashes.values())) == 3
    for lowest, splits in ((-200, set()), (-199, {"test", "train", "validation"})):
        build.prepare(ramp_builder, {**FIELDS, "lowest": lowest}, str(tmp_path / str(lowest)))
        other = content.read(tmp_path / str(lowest) / "ramp/mine/1.0.0")
        assert {split for split in hashes if hashes[split] != other[split]} == splits


def test_a_run_refuses_a_set_that_was_built_anew(ramp_builder, mine, tmp_path):
    save_run(tmp_path / "run", described(mine))
    RunCheckpoints(tmp_path / "run", {"data": described(mine)}).close()
    build.prepare(ramp_builder, {**FIELDS, "lowest": 0}, str(tmp_path / mine.name))
    message = (
        r"checkpoints holds a run that learned from other data: ramp/mine was built anew with "
        r"other examples \(content hash of test \w{12}, now \w{12}; train .*\); choose a new "
        "MODEL_DIR, or put back the data"
    )
    with pytest.raises(ValueError, match=message):
        RunCheckpoints(tmp_path / "run", {"data": described(tmp_path / mine.name)})
    # A finished run still opens without its data.
    shutil.rmtree(tmp_path / mine.name / "ramp")
    RunCheckpoints(tmp_path / "run", {"data": described(tmp_path / mine.name)}).close()


def test_a_set_without_hashes_stays_usable(ramp_builder, mine, tmp_path):
    """Sets of old versions load, have the old description, and get no hash from later commands."""
    old = tmp_path / mine.name
    shutil.copytree(mine, old)
    (old / "ramp/mine/1.0.0" / content.CONTENT).unlink()
    build.prepare(ramp_builder, FIELDS, str(old))
    assert Clips({"ramp/mine": 1.0}, str(old), 100).count("train") == 3
    assert described(old) == {
        "datasets": {"ramp/mine": 1.0},
        "data_dir": mine.name,
        "sample_rate_hz": 100,
        "crop_seconds": None,
        "vocabulary": None,
        "text_length": 64,
        "with_captions": False,
    }
    save_run(tmp_path / "run", described(old))
    RunCheckpoints(tmp_path / "run", {"data": described(old)}).close()
    message = r"ramp/mine was built anew .now it has a content hash, then it has none"
    with pytest.raises(ValueError, match=message):
        RunCheckpoints(tmp_path / "run", {"data": described(mine)})


def test_descriptions_have_hashes_without_reading_a_record(mine, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(mine, bare, ignore=shutil.ignore_patterns("*.array_record*"))
    hashes = {"ramp/mine": content.read(mine / "ramp/mine/1.0.0")}
    clips = Clips({"ramp/mine": 1.0}, str(bare), 100)
    assert checkpoint.describe(clips)["content"] == hashes
    assert checkpoint.describe(Ratings(clips, "ratings.csv"))["clips"]["content"] == hashes
    assert checkpoint.describe(Prompts(("ramp/mine",), data_dir=str(bare)))["content"] == hashes
    assert "content" not in checkpoint.describe(Prompts(files=("prompts.txt",)))


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ("[]", "must be of type dict")]
)
def test_a_damaged_file_of_hashes_is_named(tmp_path, text, message):
    (tmp_path / content.CONTENT).write_text(text)
    with pytest.raises(ValueError, match=rf"content\.json.*{message}.*build the data set anew"):
        content.read(tmp_path)


def test_hashes_are_those_of_the_records(mine):
    folder = mine / "ramp/mine/1.0.0"
    assert content.of_splits(tfds.builder_from_directory(folder)) == content.read(folder)
