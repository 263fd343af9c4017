"""Systems on disk: their file, their parts, and damaged or foreign folders."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest

from musicrl_jax.core import checkpoint
from musicrl_jax.core.manifest import sealed
from musicrl_jax.systems import folder, tiny
from musicrl_jax.systems.tiny import TinyConfig, TinySystem


@pytest.fixture
def base(tmp_path):
    """Writes a tiny system: run/base, run/base/policy and run/base/decoder."""
    return tiny.write(tmp_path / "run/base")


def described(directory):
    return json.loads((directory / folder.FILE).read_text())


def test_a_file_has_the_kind_and_the_relative_folders_and_hashes_of_parts(base, tmp_path):
    assert described(tmp_path / "run/base") == {
        "format": 1,
        "kind": "tiny",
        "parts": {
            name: {"folder": name, "hash": checkpoint.model_hash(f"{base}/{name}")}
            for name in ("decoder", "policy")
        },
    }
    loaded = folder.load(base)
    assert loaded.system == TinySystem(TinyConfig()) and loaded.kind == "tiny"
    assert set(loaded.policy) == {"after", "prompt"} and set(loaded.frozen) == {"decoder"}
    assert loaded.clip_seconds is None and loaded.lineage == {}


def test_a_run_may_move(base, tmp_path, monkeypatch):
    """A finetuned system has its own policy, and refers to the decoder of the base."""
    loaded = folder.load(base)
    policy = {name: weight + np.float32(1) for name, weight in loaded.policy.items()}
    assets = {checkpoint.CLIP: b'{"seconds": 2.0}'}
    folder.save_policy(tmp_path / "run/r", loaded, policy, assets)
    parts = described(tmp_path / "run/r")["parts"]
    assert {name: part["folder"] for name, part in parts.items()} == {
        "policy": ".",
        "decoder": os.path.join("..", "base", "decoder"),
    }
    os.rename(tmp_path / "run", tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved/r")
    (tmp_path / "link").symlink_to(tmp_path / "moved/r")
    for place in (".", "../r", str(tmp_path / "moved/r"), str(tmp_path / "link")):
        again = folder.load(place)
        np.testing.assert_array_equal(again.policy["after"], policy["after"])
        assert again.hashes["decoder"] == loaded.hashes["decoder"]
        assert again.clip_seconds == 2.0


def test_weights_with_another_hash_are_refused(base, tmp_path):
    other = tiny.write(tmp_path / "other", seed=1)
    shutil.rmtree(f"{base}/policy")
    shutil.copytree(f"{other}/policy", f"{base}/policy")
    ours, theirs = (
        described(tmp_path / name)["parts"]["policy"]["hash"][:12] for name in ("run/base", "other")
    )
    with pytest.raises(ValueError, match=f"the part policy in .* is {theirs}, not {ours}: restore"):
        folder.load(base)


def test_a_missing_part_is_named(base, tmp_path):
    folder.write(tmp_path / "lonely", "tiny", {"policy": f"{base}/policy"})
    with pytest.raises(
        ValueError, match="lonely has no part 'decoder', only policy: add its folder"
    ):
        folder.load(str(tmp_path / "lonely"))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*nowhere"):
        folder.write(tmp_path / "lost", "tiny", {"policy": str(tmp_path / "nowhere")})
    shutil.rmtree(f"{base}/decoder")
    with pytest.raises(FileNotFoundError, match=r"no TinyConfig checkpoint in .*decoder"):
        folder.load(base)


def test_parts_for_encoding_are_loaded_alone(base):
    shutil.rmtree(f"{base}/policy")
    loaded = folder.load(base, TinySystem.ENCODING)
    assert loaded.policy is None and loaded.config is None and set(loaded.hashes) == {"decoder"}


def test_parts_of_different_sizes_are_named(base, tmp_path):
    other = tiny.write(tmp_path / "other", TinyConfig(codes=8))
    parts = {"policy": f"{base}/policy", "decoder": f"{other}/decoder"}
    folder.write(tmp_path / "mixed", "tiny", parts)
    with pytest.raises(
        ValueError, match=r"mixed: the part decoder has TinyConfig\(codes=8, .*, not"
    ):
        folder.load(str(tmp_path / "mixed"))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "is not JSON"),
        ('{"format": 1, "kind": "tiny"}', "parts"),
        ('{"format": 1, "kind": "tiny", "parts": {"policy": "."}}', "parts"),
        ('{"format": 2, "kind": "tiny", "parts": {}}', "has format 2, not 1: update musicrl-jax"),
        ('{"format": 1, "kind": "organ", "parts": {}}', "kind 'organ', which is none of .*musiclm"),
    ],
)
def test_a_damaged_file_and_an_unknown_kind_are_refused(tmp_path, content, complaint):
    (tmp_path / folder.FILE).write_text(content)
    with pytest.raises(ValueError, match=complaint):
        folder.load(str(tmp_path))


def test_a_folder_without_a_system_says_what_to_name(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no system in .*: name a folder with a system\.json"
    ):
        folder.describe(str(tmp_path))


def test_a_kind_is_registered_by_its_class(base, tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "KINDS", dict(folder.KINDS))

    @folder.register("organ")
    @dataclasses.dataclass(frozen=True)
    class Organ(TinySystem):
        pass

    folder.write(tmp_path / "organ", "organ", {name: f"{base}/{name}" for name in Organ.PLAYING})
    assert type(folder.load(str(tmp_path / "organ")).system) is Organ


@pytest.fixture
def older(tmp_path):
    """Writes a policy and its neighbours as older versions did, without a system.json."""
    for name in ("policy", *folder.BESIDE.values()):
        checkpoint.save_model(tmp_path / "run" / name, TinyConfig(), {"params": {}})
    return tmp_path / "run"


def test_a_policy_with_its_neighbours_is_a_musiclm(older, tmp_path, monkeypatch):
    """The policy's folder is a path, '.', or a link into the folder with the neighbours."""
    (tmp_path / "link").symlink_to(older / "policy")
    monkeypatch.chdir(older / "policy")
    for place in (str(older / "policy"), ".", str(tmp_path / "link")):
        places = {name: str(older / beside) for name, beside in folder.BESIDE.items()}
        places["policy"] = place
        description = folder.describe(place)
        assert description["kind"] == "musiclm"
        assert description["parts"] == {
            name: {"folder": path, "hash": ""} for name, path in places.items()
        }


@pytest.mark.parametrize(
    ("recorded", "seconds"),
    [
        ("asset", 2.5),
        ("asset and run", 2.5),
        ("run", 4.0),
        ("run without it", None),
        ("nothing", None),
    ],
)
def test_the_length_of_training_clips_is_loaded(base, tmp_path, recorded, seconds):
    """It is in an asset of the model, or in the identity of an older version's run."""
    model = checkpoint.load_model(f"{base}/policy", TinyConfig)
    assets = {checkpoint.CLIP: b'{"seconds": 2.5}'} if recorded.startswith("asset") else {}
    checkpoint.save_model(f"{base}/policy", model.config, model.variables, assets)
    if "run" in recorded:
        (tmp_path / "run/base/policy/checkpoints").mkdir()
        identity = {"seed": 0} if "without" in recorded else {"seed": 0, "clip_seconds": 4.0}
        (tmp_path / "run/base/policy/checkpoints/run.json").write_text(sealed(identity))
    assert folder.load(base).clip_seconds == seconds
