"""Tokens come back as they were written, and only to the models that wrote them."""

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


@pytest.fixture
def folder(tmp_path):
    folder = str(tmp_path / "tokens")
    assert (
        write_tokens(folder, "train", examples(11), MODELS, LAYOUT, DATA, examples_per_shard=4)
        == 11
    )
    return folder


def test_what_is_written_is_read(folder):
    records, _ = tokens.read(folder, "train")
    assert len(records) == 11
    assert len(list((Path(folder) / "train").glob("*array_record*"))) == 3
    for record, example in zip(records, examples(11), strict=True):
        assert (record["id"].decode(), record["caption"].decode()) == (
            example["id"],
            example["caption"],
        )
        for name in FIELDS:
            np.testing.assert_array_equal(record[name], example[name])


def test_batches_hold_every_example_once_an_epoch_and_resume(folder):
    data = Tokens(folder, MODELS)
    assert data.count("train") == 11
    written = {example["semantic"].tobytes(): example for example in examples(11)}
    batches = list(data.batches("train", 4, seed=0, epochs=1))
    assert [len(batch["semantic"]) for batch in batches] == [4, 4, 3]
    seen = set()
    for batch in batches:
        assert set(batch) == set(FIELDS) and {a.dtype for a in batch.values()} == {
            np.dtype(np.int32)
        }
        for semantic, acoustic, mulan in zip(*(batch[name] for name in FIELDS), strict=True):
            key = semantic.astype(np.int64).tobytes()
            seen.add(key)
            np.testing.assert_array_equal(acoustic, written[key]["acoustic"])
            np.testing.assert_array_equal(mulan, written[key]["mulan"])
    assert seen == set(written)
    walk = list(itertools.islice(data.batches("train", 4, seed=5), 9))
    for one, other in zip(
        itertools.islice(data.batches("train", 4, seed=5, start_step=6), 3), walk[6:], strict=True
    ):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_arrays_of_any_name_and_rank_are_written_and_read(tmp_path):
    """As another system's: their names and shapes stand with the data alone."""
    rng = np.random.default_rng(0)
    written = []
    for i in range(5):
        codes = rng.integers(0, 9, (3, 2, 2))
        written.append({"id": f"{i}", "caption": "", "tokens": codes, "style": np.array([i])})
    write_tokens(str(tmp_path), "train", written, {}, {"codes": 9}, {})
    (batch,) = Tokens(str(tmp_path)).batches("train", 8, seed=0, epochs=1)
    assert set(batch) == {"tokens", "style"} and batch["tokens"].dtype == np.int32
    for codes, style in zip(batch["tokens"], batch["style"][:, 0], strict=True):
        np.testing.assert_array_equal(codes, written[style]["tokens"])


@pytest.mark.parametrize("name", sorted(MODELS))
def test_tokens_of_other_models_are_refused(folder, name):
    data = Tokens(folder, {**MODELS, name: "ff99"})
    message = (
        rf"written by {name} {MODELS[name]}, and this run uses {name} ff99: run `musicrl encode`"
    )
    for read in (
        data.count,
        lambda split: data.batches(split, 2, seed=0),
        lambda split: data.batches(split, 2, seed=0, epochs=1),
    ):
        with pytest.raises(ValueError, match=message):
            read("train")
    assert Tokens(folder).count("train") == 11


def digest(written):
    """The hash of examples, made from their arrays alone."""
    made = content.ContentHash()
    for example in written:
        arrays = {name: np.asarray(example[name], np.int32) for name in FIELDS}
        made.add(content.of_arrays({**arrays, "id": example["id"], "caption": example["caption"]}))
    return made.hexdigest()


def test_a_run_knows_its_tokens_by_their_content(folder, tmp_path):
    """Other tokens under the same manifest are named; those of an older version, without hashes, are as they were."""
    before = checkpoint.describe(Tokens(folder))
    run = RunCheckpoints(tmp_path / "run", {"data": before})
    run.save(1, {"w": np.zeros(1)})
    run.close()
    other = [{**example, "semantic": example["semantic"][::-1]} for example in examples(11)]
    write_tokens(folder, "train", other, MODELS, LAYOUT, DATA)
    with pytest.raises(
        ValueError,
        match=r"other data: tokens was built anew .* hash of train \w+, now \w+\); choose",
    ):
        RunCheckpoints(tmp_path / "run", {"data": checkpoint.describe(Tokens(folder))})
    write_tokens(folder, "train", examples(11), MODELS, LAYOUT, DATA, examples_per_shard=3)
    assert checkpoint.describe(Tokens(folder)) == before

    path = Path(folder) / tokens.MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["content"]
    path.write_text(json.dumps(manifest))
    old = hashlib.sha256(path.read_bytes()).hexdigest()
    assert checkpoint.describe(Tokens(folder)) == {"directory": old, "models": None}
    assert tokens.complete(folder, "train", MODELS, LAYOUT, DATA)


def test_tokens_of_a_set_that_was_built_anew_are_refused(folder):
    old, new = ({**DATA, "content": {"score_clips/tiny": {"train": 64 * digit}}} for digit in "ab")
    write_tokens(folder + "2", "train", examples(3), MODELS, LAYOUT, old)
    message = r"score_clips/tiny was built anew with other examples \(content hash of train a{12}, now b{12}\): give"
    with pytest.raises(ValueError, match=message):
        tokens.complete(folder + "2", "train", MODELS, LAYOUT, new)
    with pytest.raises(
        ValueError, match=r"/tiny was built anew .now it has a content hash, then it has none"
    ):
        tokens.complete(folder, "train", MODELS, LAYOUT, new)


def test_the_manifest_says_what_is_complete(folder):
    assert tokens.complete(folder, "train", MODELS, LAYOUT, DATA)
    assert not tokens.complete(folder, "test", MODELS, LAYOUT, DATA)
    assert not tokens.complete(folder, "train", {**MODELS, "codec": "dd44"}, LAYOUT, DATA)
    assert not tokens.complete(folder, "train", MODELS, {**LAYOUT, "semantic_codes": 65}, DATA)
    write_tokens(folder, "test", examples(3, 100), MODELS, LAYOUT, DATA)
    manifest = tokens.read_manifest(folder)
    assert manifest == {
        "schema": tokens.SCHEMA,
        "models": MODELS,
        "layout": {**LAYOUT, "levels": [4, 8]},
        "data": DATA,
        "counts": {"train": 11, "test": 3},
        "content": {"train": digest(examples(11)), "test": digest(examples(3, 100))},
    }


def test_other_data_are_refused(folder):
    other = {**DATA, "datasets": {"audio_folder/mine": 0.5}}
    message = r"encoded from datasets {'score_clips/tiny': 1.0}, not {'audio_folder/mine': 0.5}: give another TOKENS folder"
    for split in ("train", "test"):
        with pytest.raises(ValueError, match=message):
            tokens.complete(folder, split, MODELS, LAYOUT, other)
        with pytest.raises(ValueError, match=message):
            write_tokens(folder, split, examples(3), MODELS, LAYOUT, other)
    assert Tokens(folder).count("train") == 11
    assert not tokens.complete(folder, "train", {**MODELS, "codec": "dd44"}, LAYOUT, other)


def test_other_models_start_afresh(folder):
    other = {**MODELS, "codec": "dd44"}
    write_tokens(folder, "test", examples(3, 100), other, LAYOUT, DATA)
    assert tokens.read_manifest(folder)["counts"] == {"test": 3}
    with pytest.raises(ValueError, match=r"split 'train' is not among \['test'\]"):
        Tokens(folder, other).batches("train", 2, seed=0)
    write_tokens(folder, "train", examples(5, 50), other, LAYOUT, DATA)
    (batch,) = Tokens(folder, other).batches("train", 8, seed=0, epochs=1)
    expected = sorted(example["mulan"].tolist() for example in examples(5, 50))
    assert sorted(batch["mulan"].tolist()) == expected


def test_a_write_that_fails_leaves_no_split(folder, tmp_path):
    def broken():
        yield from examples(2)
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_tokens(folder, "train", broken(), MODELS, LAYOUT, DATA)
    with pytest.raises(ValueError, match="did not finish"):
        Tokens(folder).batches("train", 2, seed=0)
    assert write_tokens(folder, "train", examples(4), MODELS, LAYOUT, DATA) == 4
    assert Tokens(folder).count("train") == 4


def test_a_full_disk_is_named_and_leaves_room(tmp_path):
    def full():
        yield from examples(2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="directory: no space left: free some"):
        write_tokens(str(tmp_path), "train", full(), MODELS, LAYOUT, DATA)
    assert [p.name for p in tmp_path.iterdir()] == [tokens.MANIFEST]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("semantic", np.zeros(24, np.int32)),
        ("mulan", -np.ones(12, np.int32)),
        ("acoustic", np.zeros((50, 8), np.float32)),
    ],
)
def test_codes_that_are_none_are_refused(tmp_path, field, value):
    wrong = [*examples(1), {**next(examples(1)), "id": "odd", field: value}]
    with pytest.raises(ValueError, match=f"{field} of clip 'odd' must be codes of shape"):
        write_tokens(str(tmp_path), "train", wrong, MODELS, LAYOUT, DATA)


def test_a_folder_that_is_none_of_ours_is_left_alone(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.wav").write_bytes(b"music")
    with pytest.raises(ValueError, match="is no token folder, and has a 'train' of its own"):
        write_tokens(str(tmp_path), "train", examples(1), MODELS, LAYOUT, DATA)
    assert (tmp_path / "train" / "mine.wav").read_bytes() == b"music"


def test_no_examples_no_tokens_and_an_old_schema_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="split 'test': there are no examples"):
        write_tokens(folder, "test", [], MODELS, LAYOUT, DATA)
    with pytest.raises(FileNotFoundError, match="musicrl encode"):
        Tokens(str(tmp_path / "none")).count("train")
    with pytest.raises(ValueError, match="batch_size 12 is more than the 11 examples"):
        Tokens(folder).batches("train", 12, seed=0)
    manifest = tokens.read_manifest(folder)
    (tmp_path / "tokens" / tokens.MANIFEST).write_text(json.dumps({**manifest, "schema": "0.9.0"}))
    with pytest.raises(ValueError, match=r"schema 0.9.0, not 1.1.0"):
        Tokens(folder).count("train")
