"""Which models may make music together. Their weights are not looked at here: one number stands for them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from musicrl_jax.core import checkpoint
from musicrl_jax.core.manifest import sealed
from musicrl_jax.models.tokens import TokenLayout
from musicrl_jax.models.conformer import ConformerConfig
from musicrl_jax.models.mulan import MuLanConfig
from musicrl_jax.models.musiclm import MusicLMConfig
from musicrl_jax.models.soundstorm import SoundStormConfig
from musicrl_jax.models.soundstream import SoundStreamConfig
from musicrl_jax.rl import rollout

CONFIGS = {
    "codec": SoundStreamConfig(levels=6, codes=8),
    "mulan": MuLanConfig(levels=3, codes=4),
    "policy": MusicLMConfig(layout=TokenLayout(16, 8, 2), mulan_levels=3, mulan_codes=4),
    "fine": SoundStormConfig(ConformerConfig(), levels=6, coarse_levels=2, codes=8),
}
NAMES = ("policy", "fine", "codec", "mulan")


def save(folder, name, config, number, assets):
    """A model whose only weight is `number` -> its folder, its hash."""
    variables = {"params": {"number": np.float32(number)}}
    return str(folder / name), checkpoint.save_model(folder / name, config, variables, assets)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{name: (folder, hash)} of four models that belong together."""
    folder = tmp_path_factory.mktemp("models")
    words = {"vocabulary": b"words"}
    models = {name: save(folder, name, CONFIGS[name], 1, words) for name in ("codec", "mulan")}
    lineage = {checkpoint.LINEAGE: json.dumps({name: found for name, (_, found) in models.items()}).encode()}
    return models | {name: save(folder, name, CONFIGS[name], 2, lineage) for name in ("policy", "fine")}


def load(models):
    return rollout.load(*(models[name][0] for name in NAMES))


def test_models_that_belong_together_are_loaded(models):
    loaded = load(models)
    assert loaded.hashes == {
        {"fine": "soundstorm", "codec": "soundstream"}.get(name, name): found for name, (_, found) in models.items()
    }
    assert loaded.vocabulary == b"words" and set(loaded.frozen) == {"soundstorm", "soundstream", "mulan"}
    assert loaded.studio.musiclm.config == CONFIGS["policy"]


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        ("policy", {"layout": TokenLayout(16, 9, 2)}, "layout.acoustic_codes is 9, .* have 8"),
        ("policy", {"mulan_levels": 2}, "mulan_levels is 2, .* have 3"),
        ("policy", {"mulan_codes": 5}, "mulan_codes is 5, .* have 4"),
        ("fine", {"levels": 7}, ": levels is 7, .* have 6"),
        ("fine", {"codes": 9}, ": codes is 9, .* have 8"),
        ("fine", {"coarse_levels": 3}, "coarse_levels is 3, .* have 2"),
    ],
)
def test_sizes_that_do_not_fit_are_named(models, tmp_path, name, changes, complaint):
    other = save(tmp_path, name, dataclasses.replace(CONFIGS[name], **changes), 2, {checkpoint.LINEAGE: b"{}"})
    with pytest.raises(ValueError, match=f"{other[0]}.*{complaint}; train it for them"):
        load({**models, name: other})


@pytest.mark.parametrize("name", ["codec", "mulan"])
def test_other_weights_of_the_same_sizes_are_refused(models, tmp_path, name):
    other = save(tmp_path, name, CONFIGS[name], 7, {"vocabulary": b"words"})
    hashes = models[name][1][:12], other[1][:12]
    with pytest.raises(ValueError, match="was trained on tokens of {} {}, not of {}".format(name, *hashes)):
        load({**models, name: other})


@pytest.mark.parametrize("name", ["policy", "fine"])
def test_a_token_model_of_another_lineage_is_refused(models, tmp_path, name):
    lineage = json.dumps({"codec": models["codec"][1], "mulan": "0" * 64}).encode()
    other = save(tmp_path, name, CONFIGS[name], 2, {checkpoint.LINEAGE: lineage})
    with pytest.raises(ValueError, match=f"{other[0]} was trained on tokens of mulan 000000000000, not of"):
        load({**models, name: other})


@pytest.mark.parametrize(("seconds", "frames"), [(0.04, 1), (1.0, 25), (4.0, 100)])
def test_a_clip_holds_whole_frames(models, seconds, frames):
    assert load(models).studio.frames(seconds) == frames


@pytest.mark.parametrize("seconds", [-1.0, 0.0, 0.01, 0.99])
def test_a_clip_of_part_frames_is_refused(models, seconds):
    with pytest.raises(ValueError, match=f"clip_seconds={seconds} must be a multiple of 0.04 s"):
        load(models).studio.frames(seconds)


@pytest.mark.parametrize(
    ("recorded", "seconds"),
    [("asset", 2.5), ("asset and run", 2.5), ("run", 4.0), ("run without it", None), ("nothing", None)],
)
def test_the_length_that_a_policy_was_trained_on_comes_with_it(models, tmp_path, recorded, seconds):
    """From the asset of the model, else from the identity of an older version's run, beside it."""
    assets = {checkpoint.LINEAGE: (Path(models["policy"][0]) / "model" / checkpoint.LINEAGE).read_bytes()}
    if recorded.startswith("asset"):
        assets[checkpoint.CLIP] = b'{"seconds": 2.5}'
    folder, _ = save(tmp_path, "policy", CONFIGS["policy"], 2, assets)
    if "run" in recorded:
        (tmp_path / "policy/checkpoints").mkdir()
        identity = {"seed": 0} if "without" in recorded else {"seed": 0, "clip_seconds": 4.0}
        (tmp_path / "policy/checkpoints/run.json").write_text(sealed(identity))
    assert load(models | {"policy": (folder, "")}).clip_seconds == seconds
