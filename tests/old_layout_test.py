"""Runs of older versions load: a policy, with its models beside it, and no system.json."""

import functools
import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.linen import meta

from musicrl_jax import pack
from musicrl_jax.core import checkpoint
from musicrl_jax.core.manifest import sealed, write_manifest
from musicrl_jax.models.mulan import MuLan
from musicrl_jax.models.musiclm import MusicLM
from musicrl_jax.models.semantic import SemanticEncoder
from musicrl_jax.models.soundstorm import SoundStorm
from musicrl_jax.models.soundstream import SoundStream
from musicrl_jax.systems import folder
from musicrl_jax.systems.musiclm import MusicLMSystem
from musicrl_jax.systems.player import roll_out
from musicrl_jax.systems.system import Sampling, Weights

# Each model's config as f1186c7 wrote it, and a digest of its arrays' names, dtypes and shapes.
OLD = {
    "codec": (
        '{"kind": "SoundStreamConfig", "sample_rate_hz": 8000, "strides": [8, 5, 4], '
        '"channels": 2, "embed": 4, "levels": 2, "codes": 4, "activation": "elu", '
        '"code_width": null, "companding": true}',
        "d7213aaf92883764",
    ),
    "mulan": (
        '{"kind": "MuLanConfig", "sample_rate_hz": 8000, "window_seconds": 0.4, '
        '"audio": {"kind": "ResNetConfig", "mels": 16, "widths": [4], "blocks": 1}, '
        '"text": {"kind": "BertConfig", "layers": 1, "heads": 2, "embed": 8, "mlp": 8, '
        '"positions": 8, "pieces": 300}, "text_length": 8, "embed": 4, "hidden": 0, "levels": 2, '
        '"codes": 4}',
        "25c4d7553eae1be6",
    ),
    "semantic": (
        '{"kind": "SemanticConfig", "sample_rate_hz": 8000, "mels": 16, '
        '"encoder": {"kind": "ConformerConfig", "layers": 1, "heads": 2, "embed": 8, "mlp": 8, '
        '"kernel": 5}, "layer": 1, "targets": 8, "codes": 5}',
        "963acd8de99673bb",
    ),
    "policy": (
        '{"kind": "MusicLMConfig", "temporal": {"kind": "TransformerConfig", "layers": 2, '
        '"embed": 8, "heads": 2, "mlp": 8, "dropout": 0.0, "relative_buckets": 32, '
        '"relative_distance": 128}, "depth": {"kind": "TransformerConfig", "layers": 1, '
        '"embed": 8, "heads": 2, "mlp": 8, "dropout": 0.0, "relative_buckets": 32, '
        '"relative_distance": 128}, "layout": {"kind": "TokenLayout", "semantic_codes": 5, '
        '"acoustic_codes": 4, "coarse_levels": 1}, "mulan_levels": 2, "mulan_codes": 4}',
        "0703ea56e6b7b9a0",
    ),
    "fine": (
        '{"kind": "SoundStormConfig", "conformer": {"kind": "ConformerConfig", "layers": 1, '
        '"heads": 2, "embed": 8, "mlp": 8, "kernel": 5}, "levels": 2, "coarse_levels": 1, '
        '"codes": 4, "first_passes": 2}',
        "e4dd5d7c97a9ee77",
    ),
}
# Example inputs, for the shapes of the weights.
WAV, TOKENS, CODES = (
    jnp.zeros((1, 8000)),
    jnp.zeros((1, 1, 3), jnp.int32),
    jnp.zeros((1, 4, 2), jnp.int32),
)
MASK, NOISE = jnp.zeros((1, 25), bool), jnp.zeros((1, 25, 64))
MODULES = {
    "codec": ("soundstream", SoundStream, (WAV, jax.random.key(0))),
    "mulan": ("mulan", MuLan, (WAV, jnp.zeros((1, 8), jnp.int32))),
    "semantic": ("semantic", SemanticEncoder, (WAV, MASK, NOISE)),
    "policy": ("policy", MusicLM, (TOKENS, jnp.zeros((1, 2), jnp.int32))),
    "fine": ("soundstorm", SoundStorm, (CODES, CODES > 0, 1)),
}


def write(directory, config, variables, assets):
    """Writes a model as f1186c7 did, and returns its hash."""
    directory.mkdir(parents=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "variables", variables)
    for name, content in assets.items():
        (directory / name).write_bytes(content)
    model_hash = checkpoint.content_hash(variables)
    manifest = {"config": json.loads(config), "hash": model_hash, "assets": sorted(assets)}
    write_manifest(directory, manifest)
    return model_hash


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns the folder of a run and the hash of each of its models."""
    directory, hashes = tmp_path_factory.mktemp("run"), {}
    for name, (part, module, example) in MODULES.items():
        config, digest = OLD[name]
        parsed = checkpoint.config_from_json(MusicLMSystem.PARTS[part], json.loads(config), name)
        shapes = meta.unbox(jax.eval_shape(module(parsed).init, jax.random.key(0), *example))
        leaves = jax.tree_util.tree_leaves_with_path(shapes)
        lines = [f"{jax.tree_util.keystr(path)} {x.dtype} {x.shape}" for path, x in leaves]
        assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == digest, name
        rng = np.random.default_rng(len(hashes))
        variables = jax.tree.map(
            lambda x, rng=rng: rng.normal(size=x.shape).astype(x.dtype), shapes
        )
        assets = {"vocabulary": b"words"} if name == "mulan" else {}
        if name in ("policy", "fine"):
            assets = {"tokens.json": json.dumps(hashes).encode()}
        hashes[name] = write(directory / name / "model", config, variables, assets)
    return directory, hashes


@pytest.fixture
def policy(run, tmp_path):
    """Returns a policy's folder, beside its models, which the test may change."""
    shutil.copytree(run[0], tmp_path / "run")
    return tmp_path / "run/policy"


def parts(hashes):
    """Returns the hashes under the names of a system's parts."""
    return {MODULES[name][0]: hash_ for name, hash_ in hashes.items()}


# --- Loading. ---


def test_an_old_policy_is_a_system_whose_weights_fit_its_models(run):
    loaded = folder.load(str(run[0] / "policy"))
    assert loaded.kind == "musiclm" and loaded.clip_seconds is None
    assert loaded.hashes == {name: parts(run[1])[name] for name in MusicLMSystem.PLAYING}
    assert loaded.lineage == {name: run[1][name] for name in ("codec", "mulan", "semantic")}
    assert checkpoint.content_hash(loaded.system.stored(loaded.policy)) == run[1]["policy"]
    draw = functools.partial(roll_out, loaded.system)
    weights = Weights(loaded.policy, loaded.frozen)
    text = {"pieces": np.ones((2, 8), np.int32)}
    rollout = jax.eval_shape(
        lambda weights, text, keys: draw(
            loaded.system.compute_copy(weights, "float32"),
            text,
            keys,
            loaded.system.length(0.08),
            Sampling(),
        ),
        weights,
        text,
        jax.random.split(jax.random.key(0), 2),
    )
    assert rollout.sampled.tokens.shape == (2, 6) and rollout.wav.shape == (2, 1, 640)
    encoding = folder.load(str(run[0] / "policy"), MusicLMSystem.ENCODING)
    assert encoding.policy is None and set(encoding.frozen) == set(MusicLMSystem.ENCODING)


# --- Packing. ---


def test_an_old_policy_is_packed_as_one_system_with_its_hashes_and_clip_length(
    run, policy, tmp_path
):
    # An older finetuning left the clip length in the identity of its run.
    (policy / "checkpoints").mkdir()
    (policy / "checkpoints/run.json").write_text(sealed({"clip_seconds": 0.4}))
    assert folder.load(str(policy)).clip_seconds == 0.4
    whole = tmp_path / "whole"
    pack.pack(str(whole), system=str(policy), format="system")
    shutil.rmtree(policy.parent)
    moved = whole.rename(tmp_path / "elsewhere")
    assert {path.name for path in moved.iterdir()} == {"system.json", *parts(run[1])}
    loaded = folder.load(str(moved), list(MusicLMSystem.PARTS))
    assert loaded.hashes == parts(run[1]) and loaded.clip_seconds == 0.4
    before = folder.load(str(run[0] / "policy"), list(MusicLMSystem.PARTS))
    jax.tree.map(np.testing.assert_array_equal, loaded.policy, before.policy)
    jax.tree.map(np.testing.assert_array_equal, loaded.frozen, before.frozen)
    assert before.system == loaded.system
    assert not list(tmp_path.glob(".*"))


def test_a_system_is_packed_with_the_models_that_it_refers_to(run, policy, tmp_path):
    system = tmp_path / "base"
    places = {
        MODULES[name][0]: str(policy.parent / name) for name in ("policy", "fine", "codec", "mulan")
    }
    folder.write(system, "musiclm", places)
    pack.pack(str(tmp_path / "whole"), system=str(system), format="system")
    described = folder.describe(str(tmp_path / "whole"))["parts"]
    assert {name: part["hash"] for name, part in described.items()} == {
        name: parts(run[1])[name] for name in places
    }
    assert {part["folder"] for part in described.values()} == {
        str(tmp_path / "whole" / name) for name in places
    }


def full_disk(*_):
    raise OSError("no space left")


def test_a_system_is_packed_whole_or_not_at_all(policy, tmp_path):
    out = tmp_path / "whole"
    shutil.rmtree(policy.parent / "semantic")  # not needed for generation
    shutil.move(policy.parent / "mulan", tmp_path / "mulan")
    with pytest.raises(FileNotFoundError, match=r"no MuLanConfig checkpoint in .*mulan"):
        pack.pack(str(out), system=str(policy), format="system")
    assert not out.exists()
    shutil.move(tmp_path / "mulan", policy.parent / "mulan")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack.systems, "write", full_disk)
        with pytest.raises(OSError, match="no space left"):
            pack.pack(str(out), system=str(policy), format="system")
    assert not out.exists() and not list(tmp_path.glob(".*"))
    pack.pack(str(out), system=str(policy), format="system")
    assert "semantic" not in folder.describe(str(out))["parts"]
    with pytest.raises(
        ValueError, match="whole' is there already: choose another folder, or remove it"
    ):
        pack.pack(str(out), system=str(policy), format="system")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"format": "zip"}, "format='zip' is none of safetensors, system"),
        ({"format": "system"}, "pack.system names the folder that --format=system packs"),
        ({"system": "runs/mine/ru"}, "give the one that belongs to the format"),
        (
            {"format": "system", "system": "a", "models": {"ru": "b"}},
            "give the one that belongs to the format",
        ),
        ({"format": "system", "system": "nowhere"}, "no system in nowhere"),
    ],
)
def test_settings_that_do_not_go_together_are_named(settings, words, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        pack.pack(str(tmp_path / "out"), **settings)
    assert not list(tmp_path.iterdir())
