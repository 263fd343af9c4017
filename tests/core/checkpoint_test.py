"""A model comes back bit-equal, or an error says why not."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musicrl_jax.core import checkpoint
from musicrl_jax.models.musiclm import MusicLMConfig
from musicrl_jax.models.tokens import TokenLayout
from musicrl_jax.models.transformer import TransformerConfig

KEY = jax.random.key(0)
TREE = {
    "params": {"w": jax.random.normal(KEY, (3, 4)), "half": jnp.ones(5, jnp.bfloat16) / 3},
    "step": jnp.int32(7),
    "flag": jnp.array(True),
}
CONFIG = MusicLMConfig(
    TransformerConfig(1, 8, 2, 8), TransformerConfig(1, 4, 1, 8), TokenLayout(5, 6, 2), 3, 4
)
ASSETS = {"words.txt": b"\x00hello"}
NEXT_TREE = {**TREE, "step": jnp.int32(8)}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("template")
    checkpoint.save_model(folder, CONFIG, TREE, ASSETS)
    return folder


@pytest.fixture
def folder(template, tmp_path):
    """Returns the folder of a model, which the test may damage."""
    return Path(shutil.copytree(template, tmp_path / "m"))


def assert_equal_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


# --- Models come back. ---


def test_a_model_comes_back_with_config_hash_and_assets(template):
    model = checkpoint.load_model(template, MusicLMConfig)
    assert_equal_bits(TREE, model.variables)
    assert (model.config, model.assets) == (CONFIG, ASSETS)
    assert model.hash == checkpoint.model_hash(template) == checkpoint.content_hash(TREE)


def test_the_hash_depends_on_bits_names_shapes_and_dtypes():
    # The lowest bit of one array, a name, a shape, a dtype.
    nudged = {**TREE, "step": jnp.int32(6)}
    renamed = {**{k: v for k, v in TREE.items() if k != "step"}, "stop": TREE["step"]}
    reshaped = {**TREE, "params": {**TREE["params"], "w": TREE["params"]["w"].reshape(4, 3)}}
    retyped = {**TREE, "step": jnp.uint32(7)}
    trees = TREE, nudged, renamed, reshaped, retyped
    assert len(set(map(checkpoint.content_hash, trees))) == len(trees)


def test_another_kind_of_model_is_refused(template):
    with pytest.raises(ValueError, match="holds a MusicLMConfig, not a TokenLayout"):
        checkpoint.load_model(template, TokenLayout)


@dataclasses.dataclass(frozen=True)
class Either:
    """A config whose part is one of two kinds."""

    part: TokenLayout | TransformerConfig


@pytest.mark.parametrize("part", [TokenLayout(5, 6, 2), TransformerConfig(1, 8, 2, 8)])
def test_a_part_of_several_kinds_comes_back(part):
    content = json.loads(json.dumps(checkpoint.config_to_json(Either(part))))
    assert checkpoint.config_from_json(Either, content, "here") == Either(part)


# --- Missing and damaged models. ---


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no TokenLayout checkpoint in .*nowhere"):
        checkpoint.load_model(tmp_path / "nowhere", TokenLayout)


def test_arrays_of_another_model_are_detected(folder, tmp_path):
    checkpoint.save_model(tmp_path / "other", CONFIG, NEXT_TREE)
    shutil.rmtree(folder / "model/variables")
    shutil.copytree(tmp_path / "other/model/variables", folder / "model/variables")
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.load_model(folder, MusicLMConfig)


# --- The identity of a run. ---


def test_a_setting_is_described_by_its_content(folder, tmp_path, monkeypatch):
    (tmp_path / "votes.csv").write_text("clip,rater,score\n")
    describe = checkpoint.describe_path
    first = describe(str(tmp_path / "votes.csv"))
    (tmp_path / "votes.csv").write_text("clip,rater,score\nx,y,3\n")
    assert describe(str(tmp_path / "votes.csv")) != first
    assert describe(str(folder)) == checkpoint.model_hash(folder)
    assert describe(tmp_path) == tmp_path.name
    monkeypatch.chdir(tmp_path)
    # A folder without a description has its name, also as ".".
    assert describe(".") == describe("../" + tmp_path.name + "/") == tmp_path.name
    (tmp_path / "votes.jsonl").write_text("one vote\n")
    few = describe(tmp_path)
    (tmp_path / "votes.jsonl").write_text("one vote\nanother\n")
    # A reward that learned from more votes is another reward.
    assert tmp_path.name != few != describe(tmp_path)
    assert describe(("score_clips/mine", "x" * 5000)) == ["score_clips/mine", "x" * 5000]
    assert describe("") == "" and describe(None) is None  # not the working directory
    assert checkpoint.describe({"layout": TokenLayout(5, 6, 2)})["layout"]["semantic_codes"] == 5
    assert checkpoint.describe(["votes.jsonl", folder]) == ["votes.jsonl", describe(folder)]


# --- Saving. ---


def test_a_full_disk_is_reported_before_the_save(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(OSError, match="no space to save"):
        checkpoint.save_model(tmp_path / "m", TokenLayout(), TREE)
    assert not list((tmp_path / "m").iterdir())


def test_a_flipped_bit_in_any_file_of_a_model_is_detected(folder):
    random = np.random.default_rng(0)
    files = sorted(path for path in (folder / "model").rglob("*") if path.is_file())
    assert {path.name for path in files} > {"words.txt", "manifest.json", "_METADATA"}
    for path in files:
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[random.integers(len(whole))] ^= 1 << random.integers(8)
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=f"is damaged: .*{path.name} "):
            checkpoint.load_model(folder, MusicLMConfig)
        path.write_bytes(whole)
    # Other files are allowed.
    (folder / "model/notes.txt").write_text("what I tried")
    assert_equal_bits(TREE, checkpoint.load_model(folder, MusicLMConfig).variables)


def test_a_model_of_an_older_version_is_read(folder):
    path = folder / "model/manifest.json"
    manifest = json.loads(path.read_text())
    old = {name: manifest[name] for name in ("config", "hash", "assets")}
    path.write_text(json.dumps(old, indent=1))
    assert checkpoint.model_hash(folder) == manifest["hash"]
    assert checkpoint.load_model(folder, MusicLMConfig).assets == ASSETS


def test_a_model_is_replaced_in_one_move(folder, monkeypatch):
    old, hashes, remove = checkpoint.model_hash(folder), [], shutil.rmtree

    def check_and_remove(path, *arguments, **keywords):
        if checkpoint.has_model(folder):  # then it can be read
            hashes.append(checkpoint.load_model(folder, MusicLMConfig).hash)
        remove(path, *arguments, **keywords)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", check_and_remove)
    new = checkpoint.save_model(folder, CONFIG, NEXT_TREE)
    assert {old, new} <= set(hashes)
    assert [path.name for path in folder.iterdir()] == ["model"]
