"""Configs mark the fields that hold paths, so no other text is taken for a path."""

import ast
import hashlib
import json
import re
from pathlib import Path

import numpy as np

from musicrl_jax.core import checkpoint, identity
from musicrl_jax.inputs.clips import Clips, Ratings
from musicrl_jax.inputs.prompts import Prompts
from musicrl_jax.inputs.tokens import Tokens
from musicrl_jax.losses.optimiser import Optimiser
from musicrl_jax.losses.policy_gradient import PolicyGradient
from musicrl_jax.models.tokens import TokenLayout
from musicrl_jax.objectives.preference import PreferenceObjective
from musicrl_jax.rl.config import RLConfig
from musicrl_jax.systems import folder
from musicrl_jax.systems.musiclm import MusicLMSystem

PACKAGE = Path(checkpoint.__file__).parents[1]
ROOMS = "arena", "inputs", "losses", "models", "objectives", "rl", "systems"
PARTS = {*MusicLMSystem.PARTS, *folder.BESIDE.values(), "quality", "preference", "system"}
LOOKS_LIKE_A_PATH = re.compile(
    rf"dir|folder|path|file|model|vocabulary|weights|csv|({'|'.join(PARTS)})$"
)
TEXTS = "str", "str | None", "tuple[str, ...]"
NO_CONFIG = {"Wheel.file"}  # a file's name on the package index


def text_fields(source):
    """Yields the name of each text field of dataclasses, and whether it is an unmarked path."""
    for config in ast.walk(ast.parse(source)):
        decorators = [ast.unparse(each) for each in getattr(config, "decorator_list", ())]
        if not isinstance(config, ast.ClassDef) or "dataclass" not in " ".join(decorators):
            continue
        for field in config.body:
            if isinstance(field, ast.AnnAssign) and ast.unparse(field.annotation) in TEXTS:
                name = f"{config.name}.{field.target.id}"
                is_marked = field.value is not None and "metadata=" in ast.unparse(field.value)
                is_path = LOOKS_LIKE_A_PATH.search(field.target.id) and name not in NO_CONFIG
                yield name, bool(is_path and not is_marked)


# --- Marks. ---


def test_every_field_that_looks_like_a_path_is_marked():
    fields = {}
    for room in ROOMS:
        for file in sorted((PACKAGE / room).glob("*.py")):
            fields |= dict(text_fields(file.read_text()))
    bare = [name for name, is_bare in fields.items() if is_bare]
    assert not bare, f"mark {bare[0]} with dataclasses.field(metadata=checkpoint.PATH)"
    assert fields.keys() >= {"Clips.data_dir", "Prompts.files", "DPOObjective.policy"}
    # Only unmarked fields that look like paths count.
    source = "@dataclass\nclass A:\n out_dir: str\n mulan: str = ''\n steps: int\n baseline: str\n"
    assert dict(text_fields(source)) == {"A.out_dir": True, "A.mulan": True, "A.baseline": False}


# --- Descriptions. ---


def settings():
    """Returns one setting of each kind, with paths that do not exist."""
    clips = Clips({"value": 1.0}, "data", 16_000, vocabulary="words")
    optimiser = Optimiser(1e-3)
    return [
        clips,
        Ratings(clips, "ratings"),
        Prompts(files=("prompts",)),
        Prompts(("value",), data_dir="data"),
        PreferenceObjective(None, Tokens("tokens", {"codec": "c0"})),
        RLConfig(1, 2, 0.4, 0.1, optimiser, optimiser, PolicyGradient(baseline="value")),
    ]


def test_a_file_named_like_a_setting_changes_no_identity(tmp_path, monkeypatch):
    """So a run may be resumed from any working directory."""
    monkeypatch.chdir(tmp_path)
    before = checkpoint.describe(settings())
    # Files with the names of settings.
    for name in ("value", "float32", "reinforce", "exact", "c0", "manifest.json", "votes.jsonl"):
        (tmp_path / name).write_text("a file")
    assert checkpoint.describe(settings()) == before
    assert checkpoint.describe(settings()[-1])["gradient"]["baseline"] == "value"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert checkpoint.describe(settings()) == before


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_paths_are_described_as_before_they_were_marked(tmp_path):
    """So that a run that an older version began goes on."""
    (tmp_path / "words").write_text("a vocabulary")
    (tmp_path / "tokens").mkdir()
    manifest = {
        "schema": "1.1.0",
        "models": {"codec": "c0"},
        "layout": {},
        "data": {},
        "counts": {},
    }
    (tmp_path / "tokens/manifest.json").write_text(json.dumps(manifest))
    policy = checkpoint.save_model(tmp_path / "policy", TokenLayout(), {"w": np.ones(3)})
    clips = Clips({"a/b": 1.0}, str(tmp_path), 16_000, vocabulary=str(tmp_path / "words"))
    described = checkpoint.describe(clips)
    assert described.pop("content", None) in (None, {"a/b": identity.ABSENT})
    assert described == {
        "datasets": {"a/b": 1.0},
        "data_dir": tmp_path.name,
        "sample_rate_hz": 16_000,
        "crop_seconds": None,
        "vocabulary": sha256(tmp_path / "words"),
        "text_length": 64,
        "with_captions": False,
    }
    votes = Tokens(str(tmp_path / "tokens"))
    assert checkpoint.describe(PreferenceObjective(None, votes, str(tmp_path / "policy"))) == {
        "model": None,
        "data": {"directory": sha256(tmp_path / "tokens/manifest.json"), "models": None},
        "policy": policy,
        "crop": 1.0,
    }
    missing = checkpoint.describe(PreferenceObjective(None, votes, "missing/policy"))
    assert missing["policy"] == "missing/policy"
    prompts = checkpoint.describe(Prompts(files=(str(tmp_path / "words"), "none")))
    assert prompts["files"] == [sha256(tmp_path / "words"), "none"]
