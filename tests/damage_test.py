"""Every reader answers a damaged, malformed or missing file with one sentence that names it."""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import signal
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors.numpy

from musicrl_jax import cli, collect, evaluate, pack, run
from musicrl_jax.core import checkpoint, files
from musicrl_jax.core.manifest import MANIFEST, SEAL, sealed
from musicrl_jax.inputs import pieces, pretrained, tasks, tokens, vocabulary
from musicrl_jax.inputs.prompts import Prompts
from musicrl_jax.models.soundstream import SoundStreamConfig
from musicrl_jax.models.tokens import TokenLayout
from musicrl_jax.serving import bundle as bundles

# --- Whole files and their readers. ---

BUNDLE = {
    "format": bundles.FORMAT,
    "outputs": ["tokens", "wav"],
    "version": "1",
    "jax": "0.10",
    "platforms": ["cpu"],
    "chips": 1,
    "licence": "",
    "functions": {"draw": {"cpu": {"calling_convention": 9}}},
    "arguments": {"draw": {"0/kernel": "draw/0/kernel"}},
    "sample_rate_hz": 8000,
    "clip_seconds": 0.4,
    "frames": 10,
    "places": 3,
    "text_length": 12,
    "temperature": 1.0,
    "golden": {"prompts": ["jazz"], "platform": "cpu"},
    "top_k": None,
    "rewards": {},
    "models": {},
    "files": {},
}
TOKENS = {
    "schema": tokens.SCHEMA,
    "models": {"codec": "c0"},
    "layout": {},
    "data": {},
    "counts": {"train": 1},
}
SUMMARY = {"rewards": {}, "kl": {}, "page": "page.html", "identity": {"hashes": {}}}


AGREEMENT = {"panel": "p", "agreement": {"train": 0.7}, "ceiling": {"train": 0.8}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Writes a model, a pack, the manifests of a bundle and a data set, and small files."""
    folder = tmp_path_factory.mktemp("whole")
    weights = {"params": {"kernel": np.ones((3, 5), np.float32), "bias": np.zeros(5, np.float32)}}
    checkpoint.save_model(folder, SoundStreamConfig(levels=3), weights, {"words": b"hello"})
    pack.pack(str(folder / "pack"), {"codec": str(folder)})
    files.write_text(folder / "bundle" / MANIFEST, sealed(BUNDLE))
    for name, content in {
        f"tokens/{MANIFEST}": TOKENS,
        run.SECONDS: {"codec": 12.5},
        "words.model.json": {"size": 300, "captions": "c0de"},
        pretrained.SETTINGS: {"layers": 6},
        "agreement.json": AGREEMENT,
        "summary.json": SUMMARY,
    }.items():
        files.write_json(folder / name, content)
    (folder / "words.model").write_bytes(b"a model")
    safetensors.numpy.save_file({"a": np.ones(3, np.float32)}, folder / pretrained.WEIGHTS)
    np.savez(folder / "cached.npz", a=np.arange(6.0).reshape(2, 3), b=np.array(["words"]))
    return folder


class Captions:
    """The data of a vocabulary, in place of a data set."""

    def captions(self, split):
        return ["a tune"]


# {reader: (file, function that reads it)}.
READERS = {
    "model": (
        "model/manifest.json",
        lambda folder: checkpoint.load_model(folder, SoundStreamConfig),
    ),
    "model's hash": ("model/manifest.json", checkpoint.model_hash),
    "model to pack": (
        "model/manifest.json",
        lambda folder: pack.pack(f"{folder}/other", {"a": str(folder)}),
    ),
    "pack": ("pack/models.json", lambda folder: pack.unpack(str(folder / "pack"), f"{folder}/out")),
    "bundle": ("bundle/manifest.json", lambda folder: bundles._read_manifest(folder / "bundle")),
    "tokens": ("tokens/manifest.json", lambda folder: tokens.read_manifest(str(folder / "tokens"))),
    "seconds": (run.SECONDS, lambda folder: run.read_seconds(str(folder))),
    "vocabulary": (
        "words.model.json",
        lambda folder: vocabulary.build(Captions(), str(folder / "words.model"), 300),
    ),
    "tower": (
        pretrained.SETTINGS,
        lambda folder: pretrained.read(str(folder / pretrained.WEIGHTS)),
    ),
}
# Contents that are no JSON of the expected kind.
GARBAGE = {
    "nothing": b"",
    "half": b'{"config": {"ki',
    "a list": b"[]",
    "null": b"null",
    "a number": b"3",
    "NUL bytes": bytes(100),
    "no UTF-8": b'{"a": "\xff\xfe"}',
    "deep": b"[" * 100_000,
    "a long number": b'{"a": ' + b"9" * 5000 + b"}",
    "half a pair": rb'{"a": "\ud800"}',
}


@pytest.fixture(autouse=True)
def in_time():
    """Ends a read that never returns."""
    signal.alarm(60)
    yield
    signal.alarm(0)


ERRORS = ValueError, OSError, FileNotFoundError, IsADirectoryError, PermissionError


@contextlib.contextmanager
def complaint(name, words=""):
    """Asserts that the block raises one sentence, which names the file and matches `words`."""
    with pytest.raises((ValueError, OSError)) as raised:
        yield
    message = str(raised.value)
    assert type(raised.value) in ERRORS
    assert name in message and "\n" not in message and len(message) < 600
    assert re.search(words, message)


@pytest.fixture
def folder(whole, tmp_path):
    """Returns a copy of the folder, which the test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


@pytest.mark.parametrize("reader", READERS)
def test_garbage_is_named(folder, reader):
    name, read = READERS[reader]
    for garbage in GARBAGE.values():
        (folder / name).write_bytes(garbage)
        with complaint(Path(name).name):
            read(folder)


@pytest.mark.parametrize("reader", READERS)
def test_a_folder_a_pipe_and_a_device_in_its_place_are_named(folder, reader):
    name, read = READERS[reader]
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path), os.mkdir):
        (folder / name).unlink()
        make(folder / name)
        with complaint(Path(name).name):
            read(folder)


# --- Malformed fields. ---

# (reader, field, its new value or None to remove it, words of the message).
MALFORMED = [
    ("model", "config", 3, "config is 3"),
    ("model", "config", None, "config is missing"),
    ("model", "config.kind", "Other", "holds a Other"),
    ("model", "config.kind", 3, "config.kind is 3"),
    ("model", "config.levels", "three", "SoundStreamConfig.levels is .three"),
    ("model", "config.levels", 2.5, "SoundStreamConfig.levels is 2.5"),
    ("model", "config.levels", {"kind": "Other"}, "SoundStreamConfig.levels is"),
    ("model", "config.levels", [1], "SoundStreamConfig.levels is"),
    ("model", "config.levels", True, "SoundStreamConfig.levels is true"),
    ("model", "config.levels", None, "fields .'levels'. of SoundStreamConfig do not match"),
    ("model", "config.strides", 4, "SoundStreamConfig.strides is 4"),
    ("model", "config.strides", ["a", "b"], r"SoundStreamConfig.strides\[0\] is"),
    ("model", "hash", None, "hash is missing"),
    ("model", "hash", ["a"], "hash is"),
    ("model", "hash", "00", "its arrays hash to"),
    ("model", "assets", None, "assets is missing"),
    ("model", "assets", {"words": 1}, "assets is"),
    ("model", "assets", [3], r"assets\[0\] is 3"),
    ("model", "assets", ["../secret"], "would lead out of the folder"),
    ("model", "assets", ["lost"], "its asset lost is missing"),
    ("model", "files", 7, "files is 7"),
    ("model", "files", {"words": 5}, "files.words is 5"),
    ("model", "files", {"words": []}, "says .. of words"),
    ("model", "files", {"words": [5, "00"]}, "has the sha256"),
    ("model", "files", {"../secret": [5, "00"]}, "secret is missing"),
    ("model's hash", "hash", {}, "hash is"),
    ("model to pack", "config.kind", None, "config.kind is missing"),
    ("model to pack", "config.kind", "Other", "is a Other"),
    ("pack", "codec", 3, "codec is 3"),
    ("pack", "codec.kind", None, "codec.kind is missing"),
    ("pack", "codec.kind", "Other", "which is none of"),
    ("pack", "codec.hash", None, "codec.hash is missing"),
    ("pack", "codec.sha256", 5, "codec.sha256 is 5"),
    ("pack", "codec.sha256", "00", "has the sha256"),
    ("bundle", "format", 3, "is of format 3"),
    ("bundle", "files", None, "files is missing"),
    ("bundle", "files", {"bundle.py": 3}, "files.bundle.py is 3"),
    ("bundle", "platforms", "cpu", "platforms is"),
    ("bundle", "platforms", ["cpu", "tpu"], "no function 'draw' for tpu"),
    ("bundle", "functions", {}, "lacks 'draw'"),
    ("bundle", "functions", {"draw": {"cpu": 9}}, "functions.draw.cpu is 9"),
    ("bundle", "arguments", {}, "or the arguments of a function"),
    ("bundle", "frames", "ten", "frames is"),
    ("bundle", "golden.prompts", [3], r"golden.prompts\[0\] is 3"),
    ("bundle", "temperature", None, "temperature is missing"),
    ("tokens", "schema", None, "schema is missing"),
    ("tokens", "schema", "0.1", "have schema 0.1, not"),
    ("tokens", "models", ["c0"], "models is"),
    ("tokens", "counts", None, "counts is missing"),
    ("tokens", "counts", {"train": "many"}, "counts.train is"),
    ("seconds", "codec", "long", "codec is"),
    ("seconds", "codec", True, "codec is true"),
    ("vocabulary", "size", None, "size is missing"),
    ("vocabulary", "captions", 3, "captions is 3"),
]


@pytest.mark.parametrize("reader", dict.fromkeys(case[0] for case in MALFORMED))
def test_malformed_fields_are_named(folder, reader):
    name, read = READERS[reader]
    whole = (folder / name).read_text()
    for _, field, value, words in (case for case in MALFORMED if case[0] == reader):
        # The manifest with the field changed.
        content = json.loads(whole)
        content.pop(SEAL, None)
        *outer, last = field.split(".")
        inner = content
        for part in outer:
            inner = inner[part]
        inner[last] = value
        if value is None:
            del inner[last]
        text = sealed(content) if reader == "bundle" else json.dumps(content)
        (folder / name).write_text(text)
        with complaint(Path(name).parts[0], words):
            read(folder)


# --- Packed models. ---

HEADERS = [
    (b"{", "is not JSON"),
    (b"[]", "must be of type dict"),
    ({"format": "2"}, "is of format '2'"),
    ({"config": None}, "config is null"),
    ({"config": {"kind": "SoundStreamConfig"}}, "do not match this version"),
    ({"assets": {"words": "%%%"}}, "the asset words is no base64"),
    ({"assets": {"../words": ""}}, "would lead out of the folder"),
    ({"shapes": []}, "shapes is"),
]


def describe_pack(folder):
    """Writes the sha256 of the packed codec into the index of its pack."""
    index = folder / "pack/models.json"
    content = json.loads(index.read_text())
    packed = (folder / "pack/codec.safetensors").read_bytes()
    content["codec"]["sha256"] = hashlib.sha256(packed).hexdigest()
    index.write_text(json.dumps(content))


def repack(folder, header, arrays=None):
    """Writes the packed codec with another header or other arrays, and its index."""
    path = folder / "pack/codec.safetensors"
    with safetensors.safe_open(path, framework="numpy") as file:
        old = json.loads(file.metadata()[pack.HEADER])
    text = header.decode() if isinstance(header, bytes) else json.dumps({**old, **header})
    arrays = safetensors.numpy.load_file(path) if arrays is None else arrays
    safetensors.numpy.save_file(arrays, path, metadata={pack.HEADER: text})
    describe_pack(folder)


@pytest.mark.parametrize(("header", "words"), HEADERS)
def test_malformed_headers_of_packed_models_are_named(folder, header, words):
    repack(folder, header)
    with complaint("codec.safetensors", re.escape(words)):
        pack.load(str(folder / "pack"), "codec")


def test_arrays_within_arrays_are_named(folder):
    for names in (("a", "a/b"), ("a/b", "a")):
        repack(folder, {}, {name: np.ones(2, np.float32) for name in names})
        with complaint("pack"):
            pack.load(str(folder / "pack"), "codec")


def test_files_that_are_no_safetensors_are_named(folder):
    no_arrays = b"\x02" + bytes(7) + b"{}"  # which is valid
    weights, packed = folder / pretrained.WEIGHTS, folder / "pack/codec.safetensors"
    for content in (b"", b"\x08" + bytes(7), b"\xff" * 99, no_arrays, bytes(4)):
        weights.write_bytes(content)
        packed.write_bytes(content)
        describe_pack(folder)
        with complaint(packed.name):
            pack.load(str(folder / "pack"), "codec")
        if content != no_arrays:
            with complaint(weights.name):
                pretrained.read(str(weights))


# --- Other files. ---


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_only_regular_files_are_read(tmp_path, make, capsys):
    path = tmp_path / "file"
    make(path)
    readers = (
        Prompts("", files=(str(path),)).unique,
        lambda _: files.read_text(path),
        lambda _: files.read_arrays(path),
        lambda _: pieces.content(str(path)),
        lambda _: pretrained.read(str(path)),
    )
    for read in readers:
        with complaint("file"):
            read("train")
    assert cli.main(["generate", f"--gin_file={path}"]) == 1
    assert capsys.readouterr().err.count("\n") < 5


def test_a_model_with_garbage_for_arrays_is_named(folder):
    """Without a list of files, as in an older version, Orbax reads them and raises any error."""
    path = folder / "model" / MANIFEST
    content = json.loads(path.read_text())
    del content["files"], content[SEAL]
    path.write_text(json.dumps(content))
    for file in (folder / "model/variables").rglob("*"):
        if file.is_file():
            file.write_bytes(b"\x00garbage")
    with complaint("model"):
        checkpoint.load_model(folder, SoundStreamConfig)


def test_a_data_set_with_damaged_descriptions_is_named(tmp_path):
    clip = {"semantic": np.ones(3, int), "acoustic": np.ones((6, 2), int), "mulan": np.ones(2, int)}
    tokens.write_tokens(str(tmp_path), "train", [{**clip, "id": "a", "caption": "b"}], {}, {}, {})
    for name in ("dataset_info.json", "features.json"):
        path = tmp_path / "train" / name
        whole = path.read_bytes()
        for garbage in ("nothing", "half", "a list", "no UTF-8"):
            path.write_bytes(GARBAGE[garbage])
            with complaint("train"):
                tokens.read(str(tmp_path), "train")
            with complaint("train"):
                tasks.open_builder(str(tmp_path / "train"), "build it again")
        path.write_bytes(whole)


def test_an_asset_that_is_no_json_is_named():
    assets = {"tokens.json": b"{", "anchor.json": b'{"codec": 3}'}
    model = checkpoint.Model(TokenLayout(), {}, "c0de" * 8, assets)
    for name in model.assets:
        with complaint(name):
            model.json_asset(name, {"codec": str})
    assert model.json_asset("missing.json", {}, default={}) == {}
    with complaint("missing.json"):
        model.json_asset("missing.json", {})


# --- Random damage. ---


@st.composite
def damaged(draw, raw):
    """Draws `raw` with some bytes flipped, cut off, inserted or set to NUL."""
    content = bytearray(raw)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "nul"]))
        if kind == "flip" and content:
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del content[place:]
        elif kind == "insert":
            content[place:place] = draw(st.binary(min_size=1, max_size=8))
        else:
            content[place : place + 16] = bytes(len(content[place : place + 16]))
    return bytes(content)


RANDOM = {
    **{name: READERS[name] for name in READERS if name not in ("model's hash", "model to pack")},
    "header": (
        "pack/codec.safetensors",
        lambda folder: pack.load(str(folder / "pack"), "codec", changed=True),
    ),
    "weights": (
        pretrained.WEIGHTS,
        lambda folder: pretrained.read(str(folder / pretrained.WEIGHTS)),
    ),
    "agreement": (
        "agreement.json",
        lambda folder: collect._read_figures(folder / "agreement.json"),
    ),
    "summary": ("summary.json", lambda folder: evaluate._summary(folder / "summary.json")),
    "arrays": ("cached.npz", lambda folder: files.read_arrays(folder / "cached.npz")),
}


@pytest.mark.parametrize("reader", RANDOM)
def test_random_damage_is_harmless_or_named(folder, reader):
    """Also if no digest detects it: never another error, and never other numbers."""
    name, read = RANDOM[reader]
    raw = (folder / name).read_bytes()

    @hypothesis.settings(max_examples=15, deadline=None, database=None, derandomize=True)
    @hypothesis.given(damaged(raw))
    def check(content):
        (folder / name).write_bytes(content)
        shutil.rmtree(folder / "out", ignore_errors=True)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                result = read(folder)
        except (ValueError, OSError) as error:
            assert Path(name).parts[0] in str(error)
            assert not isinstance(error, UnicodeError | json.JSONDecodeError)
            return
        if reader == "arrays":
            np.testing.assert_array_equal(result["a"], np.arange(6.0).reshape(2, 3))
            assert result["b"].tolist() == ["words"]

    check()


def test_a_damaged_file_is_set_aside_and_none_is_overwritten(tmp_path, capsys):
    path, calls = tmp_path / "a.npz", []

    def compute():
        calls.append(1)
        return {"a": np.arange(3)}

    for content in (b"first", b"second", b""):
        path.write_bytes(content)
        assert files.cached_at(path, compute)["a"].tolist() == [0, 1, 2]
    assert len(calls) == 3 and files.cached_at(path, dict)["a"].tolist() == [0, 1, 2]
    aside = [tmp_path / f"a.npz.damaged{ending}" for ending in ("", ".2", ".3")]
    assert [each.read_bytes() for each in aside] == [b"first", b"second", b""]
    out = capsys.readouterr().out.splitlines()
    assert [line.split(";")[-1] for line in out] == [f" set aside as {each.name}" for each in aside]
    assert all(line.startswith(f"{path} is damaged: is no whole .npz") for line in out)
