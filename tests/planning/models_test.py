"""Checks models and systems as shapes: of stages, of packs and of folders on disk."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from musicrl_jax.core import checkpoint
from musicrl_jax.models.mulan import MuLanConfig
from musicrl_jax.models.musiclm import MusicLMConfig
from musicrl_jax.planning.models import PROMPT, PlannedModels
from musicrl_jax.planning.stages import Stage

PACK = Path(__file__).parents[2] / "data/pretrained/demo"


def unpacking(out):
    """Returns a stage that unpacks the shipped models."""
    return {"shipped": Stage("unpack", {"source": str(PACK), "out": str(out)})}


def test_a_model_has_the_shapes_of_the_stage_that_trains_it(stages, models):
    model = models.read("policy", MusicLMConfig)
    config = stages["policy"].arguments["objective"].model
    real = jax.jit(config.init)(jax.random.key(0))
    assert model.config == config
    assert jax.tree.map(np.shape, jax.tree.leaves(real)) == [
        leaf.shape for leaf in jax.tree.leaves(model.variables)
    ]


def test_a_finetuned_system_has_the_shapes_and_the_parts_of_its_base(models):
    base, finetuned, dpo = (models.system(name) for name in ("base", "ru", "dpo"))
    assert finetuned.system == base.system == dpo.system
    shapes = [jax.tree.map(lambda x: x.shape, each.policy) for each in (base, finetuned, dpo)]
    assert shapes[0] == shapes[1] == shapes[2]
    assert finetuned.folders["policy"] == "ru" and finetuned.folders["soundstream"] == "codec"
    assert base.system.read([PROMPT])["pieces"].shape == (1, 64)


def test_tokens_have_the_shapes_that_their_system_writes(stages, models):
    expected = {"semantic": (25,), "acoustic": (50, 6), "mulan": (12,)}
    assert models.tokens("tokens") == models.tokens("votes") == expected
    longer = dataclasses.replace(stages["votes"].arguments["config"], clip_seconds=2.0)
    stage = Stage("collect", {**stages["votes"].arguments, "config": longer})
    assert PlannedModels({**stages, "votes": stage}, 1.0).tokens("votes")["semantic"] == (50,)


def test_shipped_models_are_planned_from_their_headers(tmp_path):
    """A finetuned model beside them is planned too. Weights, towers and vocabulary are not read."""
    models = PlannedModels(unpacking(tmp_path), 5.0)
    base, finetuned = (models.system(str(tmp_path / name)) for name in ("policy", "ru"))
    assert finetuned.system == base.system
    assert base.system.sample_rate_hz == 16000
    assert "towers" in models.read(tmp_path / "mulan", MuLanConfig).variables["params"]


def test_a_model_on_disk_is_read_without_its_weights(stages, tmp_path, monkeypatch):
    config = stages["mulan"].arguments["objective"].model
    checkpoint.save_model(tmp_path, config, {"w": np.ones(3)}, {"more": b"1"})
    models = PlannedModels({}, 1.0)
    (tmp_path / "model/variables").rename(tmp_path / "gone")
    model = models.read(tmp_path, MuLanConfig)
    assert model.config == config and model.assets["more"] == b"1"
    with pytest.raises(ValueError, match="holds a MuLanConfig, not a MusicLMConfig"):
        models.read(tmp_path, MusicLMConfig)


def test_a_model_that_no_stage_makes_is_named(stages, models, tmp_path):
    partial = PlannedModels({"r": stages["r"], **unpacking(tmp_path)}, 1.0)
    for place in ("policy", tmp_path / "other"):
        with pytest.raises(ValueError, match="no stage of the run makes a MusicLMConfig in"):
            partial.read(place, MusicLMConfig)
    with pytest.raises(ValueError, match="no stage of the run makes base, and no system in base"):
        partial.system("r")
    with pytest.raises(ValueError, match="makes a MusicLMConfig in codec"):
        models.read("codec", MusicLMConfig)
