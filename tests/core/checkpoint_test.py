"""What is restored is what was saved, to the bit, or an error says why not."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musicrl_jax.core import checkpoint
from musicrl_jax.models.musiclm import MusicLMConfig
from musicrl_jax.models.tokens import TokenLayout
from musicrl_jax.models.transformer import TransformerConfig


@pytest.fixture
def tree():
    key = jax.random.key(0)
    return {
        "params": {"w": jax.random.normal(key, (3, 4)), "half": jnp.ones(5, jnp.bfloat16) / 3},
        "step": jnp.int32(7),
        "flag": jnp.array(True),
    }


def assert_equal_bits(a, b):
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(
            np.asarray(x).tobytes(), np.asarray(y).tobytes()
        ),
        a,
        b,
    )
    assert jax.tree.structure(a) == jax.tree.structure(b)


def test_model_comes_back_with_config_hash_and_assets(tmp_path, tree):
    config = MusicLMConfig(
        TransformerConfig(1, 8, 2, 8), TransformerConfig(1, 4, 1, 8), TokenLayout(5, 6, 2), 3, 4
    )
    saved = checkpoint.save_model(tmp_path / "m", config, tree, {"words.txt": b"\x00hello"})
    model = checkpoint.load_model(tmp_path / "m", MusicLMConfig)
    assert_equal_bits(tree, model.variables)
    assert (model.config, model.hash, model.assets) == (config, saved, {"words.txt": b"\x00hello"})
    assert checkpoint.model_hash(tmp_path / "m") == saved


def test_hash_sees_one_bit_name_shape_and_dtype(tree):
    reference = checkpoint.content_hash(tree)
    nudged = {**tree, "step": jnp.int32(6)}
    renamed = {**{k: v for k, v in tree.items() if k != "step"}, "stop": tree["step"]}
    reshaped = {**tree, "params": {**tree["params"], "w": tree["params"]["w"].reshape(4, 3)}}
    assert len({reference, *map(checkpoint.content_hash, (nudged, renamed, reshaped))}) == 4


def test_another_kind_of_model_is_refused(tmp_path, tree):
    checkpoint.save_model(tmp_path / "m", TokenLayout(), tree)
    with pytest.raises(ValueError, match="holds a TokenLayout, not a MusicLMConfig"):
        checkpoint.load_model(tmp_path / "m", MusicLMConfig)


@dataclasses.dataclass(frozen=True)
class Either:
    """A config whose part is one of two others."""

    part: TokenLayout | TransformerConfig


@pytest.mark.parametrize("part", [TokenLayout(5, 6, 2), TransformerConfig(1, 8, 2, 8)])
def test_of_several_parts_the_one_that_was_saved_comes_back(tmp_path, tree, part):
    checkpoint.save_model(tmp_path / "m", Either(part), tree)
    assert checkpoint.load_model(tmp_path / "m", Either).config == Either(part)


def test_missing_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no TokenLayout checkpoint in .*nowhere"):
        checkpoint.load_model(tmp_path / "nowhere", TokenLayout)


def test_changed_arrays_are_noticed(tmp_path, tree):
    checkpoint.save_model(tmp_path / "a", TokenLayout(), tree)
    checkpoint.save_model(tmp_path / "b", TokenLayout(), {**tree, "step": jnp.int32(8)})
    shutil.rmtree(tmp_path / "a/model/variables")
    shutil.copytree(tmp_path / "b/model/variables", tmp_path / "a/model/variables")
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.load_model(tmp_path / "a", TokenLayout)


def test_a_setting_is_described_by_what_it_holds(tmp_path, tree, monkeypatch):
    checkpoint.save_model(tmp_path / "m", TokenLayout(), tree)
    (tmp_path / "votes.csv").write_text("clip,rater,score\n")
    describe = checkpoint.describe_path
    first = describe(str(tmp_path / "votes.csv"))
    (tmp_path / "votes.csv").write_text("clip,rater,score\nx,y,3\n")
    assert describe(str(tmp_path / "votes.csv")) != first
    assert describe(str(tmp_path / "m")) == checkpoint.model_hash(tmp_path / "m")
    assert describe(tmp_path) == tmp_path.name
    monkeypatch.chdir(tmp_path)
    assert describe(".") == describe("../" + tmp_path.name + "/") == tmp_path.name
    (tmp_path / "votes.jsonl").write_text("one vote\n")
    few = describe(tmp_path)
    (tmp_path / "votes.jsonl").write_text("one vote\nanother\n")
    assert (
        tmp_path.name != few != describe(tmp_path)
    )  # a reward learned from more votes is another reward
    assert describe(("score_clips/mine", "x" * 5000)) == ["score_clips/mine", "x" * 5000]
    assert describe("") == "" and describe(None) is None  # not the working directory
    assert checkpoint.describe({"layout": TokenLayout(5, 6, 2)})["layout"]["semantic_codes"] == 5
    assert checkpoint.describe(["votes.jsonl", tmp_path / "m"]) == [
        "votes.jsonl",
        describe(str(tmp_path / "m")),
    ]


def test_full_disk_is_said_before_anything_is_written(tmp_path, tree, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(OSError, match="no space to save"):
        checkpoint.save_model(tmp_path / "m", TokenLayout(), tree)
    assert not list((tmp_path / "m").iterdir())


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_flipped_bit_in_any_file_of_a_model_is_named(tmp_path, tree):
    checkpoint.save_model(tmp_path, TokenLayout(), tree, {"words.txt": b"hello"})
    bits = np.random.default_rng(0)
    files = files_of(tmp_path / "model")
    assert {path.name for path in files} > {"words.txt", "manifest.json", "_METADATA"}
    for path in files:
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[bits.integers(len(whole))] ^= 1 << bits.integers(8)
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=f"is damaged: .*{path.name} "):
            checkpoint.load_model(tmp_path, TokenLayout)
        path.write_bytes(whole)
    (tmp_path / "model/notes.txt").write_text("what I tried")  # nobody minds another file
    assert_equal_bits(tree, checkpoint.load_model(tmp_path, TokenLayout).variables)


def test_a_model_of_an_older_version_is_read(tmp_path, tree):
    saved = checkpoint.save_model(tmp_path, TokenLayout(), tree, {"words.txt": b"hello"})
    path = tmp_path / "model/manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(
        json.dumps({name: manifest[name] for name in ("config", "hash", "assets")}, indent=1)
    )
    assert checkpoint.model_hash(tmp_path) == saved
    assert checkpoint.load_model(tmp_path, TokenLayout).assets == {"words.txt": b"hello"}


def test_a_model_is_replaced_in_one_move(tmp_path, tree, monkeypatch):
    old = checkpoint.save_model(tmp_path, TokenLayout(), tree)
    seen = []

    def watched(folder, *arguments, **keywords):
        if checkpoint.has_model(
            tmp_path
        ):  # whenever something is removed, what is called the model can be read
            seen.append(checkpoint.load_model(tmp_path, TokenLayout).hash)
        remove(folder, *arguments, **keywords)

    remove = shutil.rmtree
    monkeypatch.setattr(checkpoint.shutil, "rmtree", watched)
    new = checkpoint.save_model(tmp_path, TokenLayout(), {**tree, "step": jnp.int32(8)})
    assert {old, new} <= set(seen)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
