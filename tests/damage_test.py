"""Files that are damaged, malformed or no files at all: one sentence that names the file, whoever reads it."""

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

BUNDLE = {
    **{
        "format": bundles.FORMAT,
        "outputs": ["tokens", "wav"],
        "version": "1",
        "jax": "0.10",
        "platforms": ["cpu"],
        "chips": 1,
        "licence": "",
    },
    "functions": {"draw": {"cpu": {"calling_convention": 9}}},
    "arguments": {"draw": {"0/kernel": "draw/0/kernel"}},
    **{
        "sample_rate_hz": 8000,
        "clip_seconds": 0.4,
        "frames": 10,
        "places": 3,
        "text_length": 12,
        "temperature": 1.0,
    },
    **{
        "golden": {"prompts": ["jazz"], "platform": "cpu"},
        "top_k": None,
        "rewards": {},
        "models": {},
        "files": {},
    },
}
TOKENS = {
    "schema": tokens.SCHEMA,
    "models": {"codec": "c0"},
    "layout": {},
    "data": {},
    "counts": {"train": 1},
}
SUMMARY = {"rewards": {}, "kl": {}, "page": "page.html", "identity": {"hashes": {}}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One of each: a model, a pack, a data set, and small files."""
    folder = tmp_path_factory.mktemp("whole")
    weights = {"params": {"kernel": np.ones((3, 5), np.float32), "bias": np.zeros(5, np.float32)}}
    checkpoint.save_model(folder, SoundStreamConfig(levels=3), weights, {"words": b"hello"})
    pack.pack(str(folder / "pack"), {"codec": str(folder)})
    for name, content in {"bundle": BUNDLE, "tokens": TOKENS}.items():
        (folder / name).mkdir()
        (folder / name / MANIFEST).write_text(
            sealed(content) if name == "bundle" else json.dumps(content)
        )
    files.write_json(folder / run.SECONDS, {"codec": 12.5})
    files.write_json(folder / "words.model.json", {"size": 300, "captions": "c0de"})
    (folder / "words.model").write_bytes(b"a model")
    safetensors.numpy.save_file({"a": np.ones(3, np.float32)}, folder / pretrained.WEIGHTS)
    files.write_json(folder / pretrained.SETTINGS, {"layers": 6})
    files.write_json(
        folder / "agreement.json",
        {"panel": "p", "agreement": {"train": 0.7}, "ceiling": {"train": 0.8}},
    )
    files.write_json(folder / "summary.json", SUMMARY)
    np.savez(folder / "kept.npz", a=np.arange(6.0).reshape(2, 3), b=np.array(["words"]))
    return folder


class Captions:
    """The data of a vocabulary."""

    def captions(self, split):
        return ["a tune"]


# What each reader reads, and how.
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
    """Ends a read that waits for ever."""
    signal.alarm(60)
    yield
    signal.alarm(0)


@contextlib.contextmanager
def complaint(name):
    """Holds that one sentence is raised, which names the file."""
    with pytest.raises((ValueError, OSError)) as told:
        yield told
    assert type(told.value) in (
        ValueError,
        OSError,
        FileNotFoundError,
        IsADirectoryError,
        PermissionError,
    )
    assert name in str(told.value) and "\n" not in str(told.value) and len(str(told.value)) < 600


@pytest.fixture
def folder(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copy"))


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("reader", READERS)
def test_garbage_is_named(folder, reader, garbage):
    name, read = READERS[reader]
    (folder / name).write_bytes(GARBAGE[garbage])
    with complaint(Path(name).name):
        read(folder)


@pytest.mark.parametrize(
    "make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/dev/zero", path)], ids="dpz"
)
@pytest.mark.parametrize("reader", READERS)
def test_a_folder_a_pipe_and_a_device_in_a_files_place_are_named(folder, reader, make):
    name, read = READERS[reader]
    (folder / name).unlink()
    make(folder / name)
    with complaint(Path(name).name):
        read(folder)


# (reader, field, what it is changed to, part of the message); None removes it.
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


@pytest.mark.parametrize(("reader", "field", "value", "words"), MALFORMED)
def test_malformed_fields_are_named(folder, reader, field, value, words):
    name, read = READERS[reader]
    content = json.loads((folder / name).read_text())
    content.pop(SEAL, None)
    *outer, last = field.split(".")
    inner = content
    for part in outer:
        inner = inner[part]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    (folder / name).write_text(sealed(content) if reader == "bundle" else json.dumps(content))
    with complaint(Path(name).parts[0]) as told:
        read(folder)
    assert re.search(words, str(told.value))


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


def repacked(folder, header, arrays=None):
    """Writes another header, or other arrays, into the packed codec, as its index then describes it."""
    path, index = folder / "pack/codec.safetensors", folder / "pack/models.json"
    with safetensors.safe_open(path, framework="numpy") as file:
        old = file.metadata()[pack.HEADER]
    written = (
        header.decode() if isinstance(header, bytes) else json.dumps({**json.loads(old), **header})
    )
    arrays = safetensors.numpy.load_file(path) if arrays is None else arrays
    safetensors.numpy.save_file(arrays, path, metadata={pack.HEADER: written})
    described = json.loads(index.read_text())
    described["codec"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    index.write_text(json.dumps(described))


@pytest.mark.parametrize(("header", "words"), HEADERS)
def test_malformed_headers_of_packed_models_are_named(folder, header, words):
    repacked(folder, header)
    with complaint("codec.safetensors") as told:
        pack.load(str(folder / "pack"), "codec")
    assert words in str(told.value)


def test_arrays_within_arrays_are_named(folder):
    for names in (("a", "a/b"), ("a/b", "a")):
        repacked(folder, {}, {name: np.ones(2, np.float32) for name in names})
        with complaint("pack"):
            pack.load(str(folder / "pack"), "codec")


@pytest.mark.parametrize(
    "content", [b"", b"\x08" + bytes(7), b"\xff" * 99, b"\x02" + bytes(7) + b"{}", bytes(4)]
)
def test_what_is_no_safetensors_is_named(folder, content):
    path = folder / pretrained.WEIGHTS
    path.write_bytes(content)
    if content != b"\x02" + bytes(7) + b"{}":  # which is one, without arrays
        with complaint(path.name):
            pretrained.read(str(path))
    packed = folder / "pack/codec.safetensors"
    packed.write_bytes(content)
    index = json.loads((folder / "pack/models.json").read_text())
    index["codec"]["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "pack/models.json").write_text(json.dumps(index))
    with complaint(packed.name):
        pack.load(str(folder / "pack"), "codec")


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_only_regular_files_are_read(tmp_path, make, capsys):
    path = tmp_path / "file"
    make(path)
    readers = {
        "a prompts file": Prompts("", files=(str(path),)).unique,
        "a text": lambda _: files.read_text(path),
        "arrays": lambda _: files.read_arrays(path),
        "a vocabulary": lambda _: pieces.content(str(path)),
        "weights": lambda _: pretrained.read(str(path)),
    }
    for read in readers.values():
        with complaint("file"):
            read("train")
    assert cli.main(["generate", f"--gin_file={path}"]) == 1
    assert capsys.readouterr().err.count("\n") < 5


def test_a_model_whose_arrays_are_no_arrays_is_named(folder):
    """Of a version that did not list its files: Orbax says many things of what it did not write."""
    path = folder / "model" / MANIFEST
    content = json.loads(path.read_text())
    del content["files"], content[SEAL]
    path.write_text(json.dumps(content))
    for file in (folder / "model/variables").rglob("*"):
        if file.is_file():
            file.write_bytes(b"\x00garbage")
    with complaint("model"):
        checkpoint.load_model(folder, SoundStreamConfig)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("garbage", ["nothing", "half", "a list", "no UTF-8"])
def test_a_data_set_whose_descriptions_are_damaged_is_named(tmp_path, name, garbage):
    clip = {"semantic": np.ones(3, int), "acoustic": np.ones((6, 2), int), "mulan": np.ones(2, int)}
    tokens.write_tokens(str(tmp_path), "train", [{**clip, "id": "a", "caption": "b"}], {}, {}, {})
    (tmp_path / "train" / name).write_bytes(GARBAGE[garbage])
    with complaint("train"):
        tokens.read(str(tmp_path), "train")
    with complaint("train"):
        tasks.open_builder(str(tmp_path / "train"), "build it again")


def test_an_asset_that_is_no_json_is_named():
    model = checkpoint.Model(
        TokenLayout(), {}, "c0de" * 8, {"tokens.json": b"{", "anchor.json": b'{"codec": 3}'}
    )
    for name in model.assets:
        with complaint(name):
            model.json_asset(name, {"codec": str})
    assert model.json_asset("missing.json", {}, default={}) == {}
    with complaint("missing.json"):
        model.json_asset("missing.json", {})


@st.composite
def damaged(draw, raw):
    """Some bytes flipped, cut off, put in, or set to NUL."""
    content = bytearray(raw)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "nul"]))
        if kind == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del content[at:]
        elif kind == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=8))
        else:
            content[at : at + 16] = bytes(len(content[at : at + 16]))
    return bytes(content)


RANDOM = {
    **{
        name: READERS[name]
        for name in ("model", "pack", "bundle", "tokens", "seconds", "vocabulary", "tower")
    },
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
    "arrays": ("kept.npz", lambda folder: files.read_arrays(folder / "kept.npz")),
}


@pytest.mark.parametrize("reader", RANDOM)
def test_random_damage_gives_what_was_written_or_one_sentence(folder, reader):
    """Also where a digest does not notice it: never another error, and of arrays never other numbers."""
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
            where = {"model": "model", "pack": "pack", "header": "pack", "tokens": "tokens"}.get(
                reader, Path(name).name
            )
            assert where in str(error) and not isinstance(
                error, UnicodeError | json.JSONDecodeError
            )
            return
        if reader == "arrays":
            np.testing.assert_array_equal(result["a"], np.arange(6.0).reshape(2, 3))
            assert result["b"].tolist() == ["words"]

    check()


def test_what_is_set_aside_is_named_and_nothing_is_lost(tmp_path, capsys):
    path, calls = tmp_path / "a.npz", []
    for content in (b"first", b"second", b""):
        path.write_bytes(content)
        made = files.kept_at(path, lambda: calls.append(1) or {"a": np.arange(3)})
        assert made["a"].tolist() == [0, 1, 2]
    assert len(calls) == 3 and files.kept_at(path, dict)["a"].tolist() == [0, 1, 2]
    aside = [tmp_path / f"a.npz.damaged{ending}" for ending in ("", ".2", ".3")]
    assert [each.read_bytes() for each in aside] == [b"first", b"second", b""]
    out = capsys.readouterr().out.splitlines()
    assert [line.split(";")[-1] for line in out] == [f" set aside as {each.name}" for each in aside]
    assert all(line.startswith(f"{path} is damaged: is no whole .npz") for line in out)
