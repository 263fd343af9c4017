"""Packing and unpacking: what a model comes back as, its hashes, and what is refused."""

import collections
import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from musicrl_jax import pack
from musicrl_jax.core import checkpoint, tensors
from musicrl_jax.models.mulan import MuLanConfig
from musicrl_jax.models.musiclm import MusicLMConfig
from musicrl_jax.models.rewards import QualityConfig
from musicrl_jax.models.soundstream import SoundStreamConfig
from musicrl_jax.objectives.mulan_projections import PretrainedTowers

SHIPPED = Path(__file__).parents[1] / "data/pretrained/demo"
RNG = np.random.default_rng(0)
TOWERS = {"audio": {"kernel": RNG.normal(size=(4, 2)).astype(np.float32)}}


@pytest.fixture(autouse=True)
def towers(monkeypatch):
    """Returns the fetched towers; a test may change them."""
    copy = {"audio": {"kernel": TOWERS["audio"]["kernel"].copy()}}
    monkeypatch.setattr(PretrainedTowers, "params", lambda self: copy)
    return copy


def weights(scale=1.0):
    return {
        "kernel": (scale * RNG.normal(size=(3, 5))).astype(np.float32),
        "count": np.arange(3, dtype=np.int32),
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Returns a folder of a codec, MuLan and policy that belong together, packed and unpacked."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "words").write_bytes(b"tokenizer")
    # The codebooks are larger than half precision holds.
    large = {"params": weights(), "codebooks": {"sums": np.full(3, 1e5, np.float32)}}
    codec = checkpoint.save_model(folder / "codec", SoundStreamConfig(levels=3), large)
    variables = {"params": {"towers": TOWERS, "audio_projection": weights()}}
    vocabulary = {"vocabulary": b"tokenizer"}
    mulan = checkpoint.save_model(folder / "mulan", MuLanConfig(), variables, vocabulary)
    lineage = json.dumps({"codec": codec, "mulan": mulan, "semantic": "5e"}).encode()
    assets = {"tokens.json": lineage}
    checkpoint.save_model(folder / "policy", MusicLMConfig(), {"params": weights()}, assets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PretrainedTowers, "params", lambda self: TOWERS)
        pack_all(folder)
        unpack_all(folder)
    return folder


@pytest.fixture
def run(models, tmp_path):
    """Returns a copy of the models, with their pack and what was unpacked from it."""
    return Path(shutil.copytree(models, tmp_path / "run"))


def pack_all(run, names=("codec", "mulan", "policy")):
    towers = "musicnn", "minilm", str(run / "words")
    folders = {name: str(run / name) for name in names}
    pack.pack(str(run / "pack"), folders, "", "safetensors", *towers)


def unpack_all(run):
    pack.unpack(str(run / "pack"), str(run / "back"), "musicnn", "minilm", str(run / "words"))


def test_a_model_comes_back_in_half_precision(run):
    kinds = {"codec": SoundStreamConfig, "policy": MusicLMConfig, "mulan": MuLanConfig}
    for name, kind in kinds.items():
        before, after = (checkpoint.load_model(run / where / name, kind) for where in (".", "back"))
        assert after.config == before.config and set(after.assets) == set(before.assets)
        one, other = pack._flat(before.variables), pack._flat(after.variables)
        assert list(one) == list(other)
        for path in one:
            assert one[path].dtype == other[path].dtype
            np.testing.assert_allclose(other[path], one[path], rtol=2**-11, atol=1e-7)
    mulan = checkpoint.load_model(run / "back/mulan", MuLanConfig)
    np.testing.assert_array_equal(
        mulan.variables["params"]["towers"]["audio"]["kernel"], TOWERS["audio"]["kernel"]
    )
    assert mulan.assets == {"vocabulary": b"tokenizer"}
    codec = checkpoint.load_model(run / "back/codec", SoundStreamConfig)
    np.testing.assert_array_equal(codec.variables["codebooks"]["sums"], np.full(3, 1e5))


def test_in_single_precision_a_model_stays_the_same(run):
    names = {name: str(run / name) for name in ("codec", "policy")}
    pack.pack(str(run / "exact"), names, dtype="float32")
    arrays = safetensors.numpy.load_file(run / "exact/policy.safetensors")
    model = checkpoint.load_model(run / "policy", MusicLMConfig)
    np.testing.assert_array_equal(arrays["params/kernel"], model.variables["params"]["kernel"])
    pack.unpack(str(run / "exact"), str(run / "again"))
    for name in names:
        assert checkpoint.model_hash(run / "again" / name) == checkpoint.model_hash(run / name)
    with pytest.raises(ValueError, match="dtype='bfloat16' is none of float16, float32"):
        pack.pack(str(run / "exact"), names, dtype="bfloat16")


def test_weights_that_someone_else_wrote_are_accepted_if_they_fit(run):
    """As when people average models: the same header, other numbers."""
    file, back = run / "exact/policy.safetensors", run / "again"
    folders = {name: str(run / name) for name in ("policy", "codec")}
    pack.pack(str(run / "exact"), folders, dtype="float32")
    arrays = safetensors.numpy.load_file(file)
    header = tensors.read_metadata(file)

    def unpack(arrays, changed=("policy",), header=header):
        safetensors.numpy.save_file(arrays, file, metadata=header)
        pack.unpack(str(run / "exact"), str(back), changed=changed)

    # What does not fit.
    kernel = arrays["params/kernel"]
    doubled = {**arrays, "params/kernel": 2 * kernel}
    with pytest.raises(ValueError, match=r"wrote other weights into it, name it in unpack\.ch"):
        unpack(doubled, ())
    wrong = {
        r"params/kernel was packed as float \[3, 5\] and is float \[5": np.zeros((5, 3), "f"),
        r"and is float64 \[3, 5\]: write it as it was": 2 * kernel.astype(np.float64),
        "params/kernel has weights that are not finite": np.full((3, 5), np.inf, np.float32),
        # An average of one model with itself, in an array of another memory layout.
        "params/kernel has the numbers .*, in another order, .* contiguous": np.asfortranarray(
            kernel
        ),
    }
    for words, array in wrong.items():
        with pytest.raises(ValueError, match=words):
            unpack({**doubled, "params/kernel": array})
    with pytest.raises(ValueError, match="params/kernels was packed as nothing and is float"):
        unpack({**doubled, "params/kernels": kernel})
    other = {pack.HEADER: header[pack.HEADER].replace("tokens.json", "../../tokens.json")}
    with pytest.raises(ValueError, match="another header than it was packed with: write its"):
        unpack(doubled, header=other)
    with pytest.raises(ValueError, match="'policies' is none of"):
        unpack(doubled, ("policies",))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"policy\.safetensors is no whole safetensors file"):
        pack.unpack(str(run / "exact"), str(back), changed=("policy",))

    # Weights that fit; the second time they are unpacked already.
    old = checkpoint.load_model(run / "policy", MusicLMConfig)
    for _ in range(2):
        unpack(doubled)
        model = checkpoint.load_model(back / "policy", MusicLMConfig)
        np.testing.assert_array_equal(model.variables["params"]["kernel"], doubled["params/kernel"])
        assert model.hash != old.hash and model.assets == old.assets
    with pytest.raises(ValueError, match="unpack elsewhere"):
        unpack(arrays)

    # A pack of an older version.
    index = json.loads((run / "exact/models.json").read_text())
    del index["policy"]["header"]
    (run / "exact/models.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="packed by an older version: pack its model again"):
        unpack(doubled)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_arrays_of_any_memory_layout_are_packed(tmp_path, monkeypatch, dtype):
    """Orbax returns row-major arrays, but those of other people's models may be transposed."""
    kernel = np.asfortranarray(RNG.normal(size=(3, 5)).astype(np.float32))
    variables = {"params": {"kernel": kernel}}
    model = checkpoint.Model(MusicLMConfig(), variables, checkpoint.content_hash(variables), {})
    monkeypatch.setattr(pack, "_load", lambda _: model)
    pack.pack(str(tmp_path), {"policy": "a folder"}, dtype=dtype)
    loaded = pack.load(str(tmp_path), "policy").variables["params"]["kernel"]
    np.testing.assert_allclose(loaded, kernel, rtol=2**-11, atol=1e-7)


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "", ".."])
def test_a_pack_of_someone_else_writes_nowhere_else(run, name):
    """Anyone may have written the names of models and of their assets."""
    index = json.loads((run / "pack/models.json").read_text())
    (run / "pack/models.json").write_text(json.dumps({name: index["policy"]}))
    with pytest.raises(ValueError, match=r"which would lead out of the folder"):
        unpack_all(run)
    with pytest.raises(ValueError, match=r"which would lead out of the folder"):
        pack.pack(str(run / "mine"), {name: str(run / "policy")})
    assert not (run / "mine").exists()
    with pytest.raises(ValueError, match=r"which would lead out of the folder"):
        checkpoint.save_model(
            run / "other", MusicLMConfig(), {"params": weights()}, {name: b"content"}
        )
    assert not checkpoint.has_model(run / "other") and not list(run.parent.rglob("escaped"))


def test_the_card_names_every_array_of_what_ships():
    """In the card's list `{a,b}` is either, N a number, and two spaces begin a remark."""
    described = collections.defaultdict(list)
    for line in (SHIPPED / "README.md").read_text().split("```")[1].splitlines()[1:]:
        if not line.startswith(" "):
            models = line.split(", ")
            continue
        name = re.escape(line.strip().partition("  ")[0]).replace("N", r"\d+")
        name = re.sub(r"\\{(.*?)\\}", lambda either: f"(?:{either[1].replace(',', '|')})", name)
        for model in models:
            described[model].append(name)
    files = sorted(SHIPPED.glob("*.safetensors"))
    assert [file.stem for file in files] == sorted(described)
    for file in files:
        with safetensors.safe_open(file, framework="numpy") as arrays:
            names = list(arrays.keys())
        patterns = described[file.stem]
        for name in names:
            matches = [each for each in patterns if re.fullmatch(each, name)]
            assert len(matches) == 1, (file.stem, name)
        for each in patterns:
            assert any(re.fullmatch(each, name) for name in names), (file.stem, each)


def test_the_lineage_names_the_packed_models(run):
    lineage = json.loads((run / "back/policy/model/tokens.json").read_text())
    assert lineage == {
        "codec": checkpoint.model_hash(run / "back/codec"),
        "mulan": checkpoint.model_hash(run / "back/mulan"),
        "semantic": "5e",
    }
    index = json.loads((run / "pack/models.json").read_text())
    original = checkpoint.model_hash(run / "policy")
    assert index["policy"]["packed_from"] == original != index["policy"]["hash"]
    assert index["mulan"]["weights"] == 18  # without the towers
    content = (run / "pack/policy.safetensors").read_bytes()
    pack_all(run)
    assert (run / "pack/policy.safetensors").read_bytes() == content


def test_unpacked_models_are_left_alone_and_others_refused(run, capsys):
    unpack_all(run)
    assert capsys.readouterr().out.count("unpacked already") == 3
    checkpoint.save_model(run / "back/policy", MusicLMConfig(), {"params": weights()})
    with pytest.raises(ValueError, match=r"back/policy holds model \w+, not \w+: unpack elsewhere"):
        unpack_all(run)


def test_other_towers_are_refused(run, towers):
    shutil.rmtree(run / "back")
    towers["audio"]["kernel"] += 1
    words = "towers/audio/kernel is not that of the pretrained towers"
    with pytest.raises(ValueError, match=words):
        pack_all(run)
    with pytest.raises(ValueError, match="its towers are not those that it was packed without"):
        unpack_all(run)
    with pytest.raises(ValueError, match="mulan needs its pretrained towers and their vocabulary"):
        pack.unpack(str(run / "pack"), str(run / "elsewhere"))


def test_towers_that_were_not_fetched_are_packed(run):
    pack.pack(str(run / "mine"), {"mulan": str(run / "mulan")})
    pack.unpack(str(run / "mine"), str(run / "again"))
    mulan = checkpoint.load_model(run / "again/mulan", MuLanConfig)
    assert mulan.assets == {"vocabulary": b"tokenizer"} and "towers" in mulan.variables["params"]


@pytest.mark.parametrize("place", [10, -1])
def test_a_changed_byte_is_named(run, place):
    path = run / "pack/policy.safetensors"
    shutil.rmtree(run / "back")
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ValueError,
        match=r"policy\.safetensors has the sha256 \w+, not \w+: if it is damaged, restore it",
    ):
        unpack_all(run)


def test_a_missing_file_or_model_is_named(run):
    shutil.rmtree(run / "back")
    (run / "pack/policy.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"policy\.safetensors is missing"):
        unpack_all(run)
    (run / "pack/models.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no models\.json"):
        unpack_all(run)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*nothing"):
        pack_all(run, names=("nothing",))


def test_a_model_of_an_unknown_kind_is_refused(run):
    checkpoint.save_model(run / "odd", QualityConfig(), {"params": weights()})
    manifest = run / "odd/model/manifest.json"
    manifest.write_text(manifest.read_text().replace("QualityConfig", "OddConfig"))
    words = "odd/model is a OddConfig, which is none of MuLanConfig, MusicLMConfig"
    with pytest.raises(ValueError, match=words):
        pack_all(run, names=("odd",))


def test_an_empty_pack_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"pack.models is empty: name a model and its folder"):
        pack.pack(str(tmp_path / "mine"), {})
    assert not (tmp_path / "mine").exists()


def test_the_shipped_models_are_small_whole_and_described():
    """Files match the index, the card names their hashes, and all fit into 24 MB."""
    index = json.loads((SHIPPED / pack.INDEX).read_text())
    card = (SHIPPED / "README.md").read_text()
    files = sorted(SHIPPED.glob("*.safetensors"))
    assert [path.stem for path in files] == sorted(index)
    assert sum(path.stat().st_size for path in files) <= 24e6
    for path in files:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == index[path.stem]["sha256"]
        assert pack._read(path, index[path.stem], changed=False)[1]
        assert f"`{path.name}`" in card and index[path.stem]["hash"][:12] in card
