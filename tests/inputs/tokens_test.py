"""Tokens are read as they were written, and only for the models that wrote them."""

import errno
import hashlib
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from musicrl_jax.core import checkpoint
from musicrl_jax.core.run_checkpoints import RunCheckpoints
from musicrl_jax.inputs import content, tokens
from musicrl_jax.inputs.tokens import Tokens, write_tokens

MODELS = {"mulan": "aa11", "semantic": "bb22", "codec": "cc33"}
LAYOUT = {"semantic_codes": 64, "acoustic_codes": 1024, "levels": (4, 8)}
FIELDS = "semantic", "acoustic", "mulan"
DATA = {"datasets": {"score_clips/tiny": 1.0}, "crop_seconds": None}


def examples(count, start=0):
    for i in range(start, start + count):
        rng = np.random.default_rng(i)
        yield {
            "semantic": rng.integers(0, 64, 25),
            "acoustic": rng.integers(0, 1024, (50, 8)).astype(np.int32),
            "mulan": rng.integers(0, 256, 12).astype(np.int16),
            "id": f"clip-{i}",
            "caption": f"größer {i}",
        }


def write(folder, split, written, models=MODELS, data=DATA, **options):
    return write_tokens(folder, split, written, models, LAYOUT, data, **options)


def complete(folder, split, models=MODELS, layout=LAYOUT, data=DATA):
    return tokens.complete(folder, split, models, layout, data)


@pytest.fixture
def folder(tmp_path):
    folder = str(tmp_path / "tokens")
    assert write(folder, "train", examples(11), examples_per_shard=4) == 11
    return folder


def test_examples_are_read_as_they_were_written(folder):
    records, _ = tokens.read(folder, "train")
    assert len(records) == 11
    assert len(list((Path(folder) / "train").glob("*array_record*"))) == 3
    for record, example in zip(records, examples(11), strict=True):
        for name in ("id", "caption"):
            assert record[name].decode() == example[name]
        for name in FIELDS:
            np.testing.assert_array_equal(record[name], example[name])


def test_batches_hold_every_example_once_an_epoch_and_resume(folder):
    data = Tokens(folder, MODELS)
    assert data.count("train") == 11
    batches = list(data.batches("train", 4, seed=0, epochs=1))
    assert [len(batch["semantic"]) for batch in batches] == [4, 4, 3]
    for name in FIELDS:
        values = np.concatenate([batch[name] for batch in batches])
        expected = np.stack([example[name] for example in examples(11)])
        assert values.dtype == np.int32
        assert sorted(values.tolist()) == sorted(expected.tolist())
    walk = list(itertools.islice(data.batches("train", 4, seed=5), 9))
    resumed = itertools.islice(data.batches("train", 4, seed=5, start_step=6), 3)
    for batch, other in zip(resumed, walk[6:], strict=True):
        assert set(batch) == set(FIELDS)
        for name in FIELDS:
            np.testing.assert_array_equal(batch[name], other[name])


def test_arrays_of_any_name_and_rank_are_written_and_read(tmp_path):
    """Names and shapes come from the data alone, so any system can write tokens."""
    codes = np.random.default_rng(0).integers(0, 9, (5, 3, 2, 2))
    written = [
        {"id": f"{i}", "caption": "", "tokens": codes[i], "style": np.array([i])} for i in range(5)
    ]
    write_tokens(str(tmp_path), "train", written, {}, {"codes": 9}, {})
    (batch,) = Tokens(str(tmp_path)).batches("train", 8, seed=0, epochs=1)
    assert set(batch) == {"tokens", "style"} and batch["tokens"].dtype == np.int32
    np.testing.assert_array_equal(batch["tokens"], codes[batch["style"][:, 0]])


@pytest.mark.parametrize("name", sorted(MODELS))
def test_tokens_of_other_models_are_refused(folder, name):
    data = Tokens(folder, {**MODELS, name: "ff99"})
    message = rf"written by {name} {MODELS[name]}, and this run uses {name} ff99: run `musicrl enc"
    with pytest.raises(ValueError, match=message):
        data.count("train")
    for epochs in (None, 1):
        with pytest.raises(ValueError, match=message):
            data.batches("train", 2, seed=0, epochs=epochs)
    assert Tokens(folder).count("train") == 11


def digest(written):
    """Returns the hash of examples from their arrays alone."""
    content_hash = content.ContentHash()
    for example in written:
        arrays = {name: np.asarray(example[name], np.int32) for name in FIELDS}
        texts = {name: example[name] for name in ("id", "caption")}
        content_hash.add(content.of_arrays(arrays | texts))
    return content_hash.hexdigest()


def test_a_run_refuses_other_tokens_under_the_same_manifest(folder, tmp_path):
    before = checkpoint.describe(Tokens(folder))
    run = RunCheckpoints(tmp_path / "run", {"data": before})
    run.save(1, {"w": np.zeros(1)})
    run.close()
    write(folder, "train", [{**each, "semantic": each["semantic"][::-1]} for each in examples(11)])
    message = r"other data: tokens was built anew .* hash of train \w+, now \w+\); choose"
    with pytest.raises(ValueError, match=message):
        RunCheckpoints(tmp_path / "run", {"data": checkpoint.describe(Tokens(folder))})
    write(folder, "train", examples(11), examples_per_shard=3)
    assert checkpoint.describe(Tokens(folder)) == before


def test_tokens_of_an_old_version_without_hashes_keep_their_description(folder):
    path = Path(folder) / tokens.MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["content"]
    path.write_text(json.dumps(manifest))
    old = hashlib.sha256(path.read_bytes()).hexdigest()
    assert checkpoint.describe(Tokens(folder)) == {"directory": old, "models": None}
    assert complete(folder, "train")


def test_tokens_of_a_set_that_was_built_anew_are_refused(folder):
    old, new = ({**DATA, "content": {"score_clips/tiny": {"train": 64 * digit}}} for digit in "ab")
    write(folder + "2", "train", examples(3), data=old)
    message = r"tiny was built anew with other examples \(content hash of train a{12}, now b{12}\)"
    with pytest.raises(ValueError, match=rf"score_clips/{message}: give"):
        complete(folder + "2", "train", data=new)
    message = r"/tiny was built anew .now it has a content hash, then it has none"
    with pytest.raises(ValueError, match=message):
        complete(folder, "train", data=new)


def test_the_manifest_names_the_complete_splits(folder):
    assert complete(folder, "train")
    assert not complete(folder, "test")
    assert not complete(folder, "train", models={**MODELS, "codec": "dd44"})
    assert not complete(folder, "train", layout={**LAYOUT, "semantic_codes": 65})
    write(folder, "test", examples(3, 100))
    text = (Path(folder) / tokens.MANIFEST).read_text()
    assert text == json.dumps(tokens.read_manifest(folder), indent=2) + "\n"
    assert json.loads(text) == {
        "schema": tokens.SCHEMA,
        "models": MODELS,
        "layout": {**LAYOUT, "levels": [4, 8]},
        "data": DATA,
        "counts": {"train": 11, "test": 3},
        "content": {"train": digest(examples(11)), "test": digest(examples(3, 100))},
    }


def test_tokens_of_other_data_are_refused(folder):
    other = {**DATA, "datasets": {"audio_folder/mine": 0.5}}
    message = (
        r"encoded from datasets {'score_clips/tiny': 1.0}, not {'audio_folder/mine': 0.5}: "
        "give another TOKENS folder"
    )
    for split in ("train", "test"):
        with pytest.raises(ValueError, match=message):
            complete(folder, split, data=other)
        with pytest.raises(ValueError, match=message):
            write(folder, split, examples(3), data=other)
    assert Tokens(folder).count("train") == 11
    assert not complete(folder, "train", models={**MODELS, "codec": "dd44"}, data=other)


def test_other_models_replace_all_splits(folder):
    other = {**MODELS, "codec": "dd44"}
    write(folder, "test", examples(3, 100), other)
    assert tokens.read_manifest(folder)["counts"] == {"test": 3}
    with pytest.raises(ValueError, match=r"split 'train' is not among \['test'\]"):
        Tokens(folder, other).batches("train", 2, seed=0)
    write(folder, "train", examples(5, 50), other)
    (batch,) = Tokens(folder, other).batches("train", 8, seed=0, epochs=1)
    expected = [example["mulan"].tolist() for example in examples(5, 50)]
    assert sorted(batch["mulan"].tolist()) == sorted(expected)


def interrupted(error):
    yield from examples(2)
    raise error


def test_a_write_that_fails_leaves_no_split(folder):
    with pytest.raises(RuntimeError, match="stopped"):
        write(folder, "train", interrupted(RuntimeError("stopped")))
    with pytest.raises(ValueError, match="did not finish"):
        Tokens(folder).batches("train", 2, seed=0)
    assert write(folder, "train", examples(4)) == Tokens(folder).count("train") == 4


def test_a_full_disk_is_named_and_leaves_room(tmp_path):
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match="directory: no space left: free some"):
        write(str(tmp_path), "train", interrupted(error))
    assert [path.name for path in tmp_path.iterdir()] == [tokens.MANIFEST]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("semantic", np.zeros(24, np.int32)),
        ("mulan", -np.ones(12, np.int32)),
        ("acoustic", np.zeros((50, 8), np.float32)),
    ],
)
def test_arrays_that_are_not_codes_are_refused(tmp_path, field, value):
    wrong = [*examples(1), {**next(examples(1)), "id": "odd", field: value}]
    with pytest.raises(ValueError, match=f"{field} of clip 'odd' must be codes of shape"):
        write(str(tmp_path), "train", wrong)


def test_a_folder_of_something_else_stays_untouched(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.wav").write_bytes(b"music")
    with pytest.raises(ValueError, match="is no token folder, and has a 'train' of its own"):
        write(str(tmp_path), "train", examples(1))
    assert (tmp_path / "train" / "mine.wav").read_bytes() == b"music"


def test_missing_examples_missing_tokens_and_an_old_schema_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="split 'test': there are no examples"):
        write(folder, "test", [])
    with pytest.raises(FileNotFoundError, match="musicrl encode"):
        Tokens(str(tmp_path / "none")).count("train")
    with pytest.raises(ValueError, match="batch_size 12 is more than the 11 examples"):
        Tokens(folder).batches("train", 12, seed=0)
    old = {**tokens.read_manifest(folder), "schema": "0.9.0"}
    (tmp_path / "tokens" / tokens.MANIFEST).write_text(json.dumps(old))
    with pytest.raises(ValueError, match=r"schema 0.9.0, not 1.1.0"):
        Tokens(folder).count("train")
