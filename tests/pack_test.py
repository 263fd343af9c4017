"""Packing and unpacking: what comes back, what names it, and what is refused."""

import collections
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from musicrl_jax import pack
from musicrl_jax.core import checkpoint
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
    """What is fetched; a test may change it."""
    fetched = {"audio": {"kernel": TOWERS["audio"]["kernel"].copy()}}
    monkeypatch.setattr(PretrainedTowers, "params", lambda self: fetched)
    return fetched


def weights(scale=1.0):
    return {
        "kernel": (scale * RNG.normal(size=(3, 5))).astype(np.float32),
        "count": np.arange(3, dtype=np.int32),
    }


@pytest.fixture
def run(tmp_path):
    """A codec, a MuLan over fetched towers, and a policy that was trained on their tokens."""
    (tmp_path / "words").write_bytes(b"tokenizer")
    large = {
        "params": weights(),
        "codebooks": {"sums": np.full(3, 1e5, np.float32)},
    }  # more than half precision holds
    codec = checkpoint.save_model(tmp_path / "codec", SoundStreamConfig(levels=3), large)
    heard = {"params": {"towers": TOWERS, "audio_projection": weights()}}
    mulan = checkpoint.save_model(
        tmp_path / "mulan", MuLanConfig(), heard, {"vocabulary": b"tokenizer"}
    )
    lineage = json.dumps({"codec": codec, "mulan": mulan, "semantic": "5e"}).encode()
    checkpoint.save_model(
        tmp_path / "policy", MusicLMConfig(), {"params": weights()}, {"tokens.json": lineage}
    )
    return tmp_path


def packed(run, names=("codec", "mulan", "policy")):
    towers = "musicnn", "minilm", str(run / "words")
    pack.pack(
        str(run / "pack"), {name: str(run / name) for name in names}, "", "safetensors", *towers
    )


def unpacked(run):
    pack.unpack(str(run / "pack"), str(run / "back"), "musicnn", "minilm", str(run / "words"))


def test_what_comes_back_is_what_was_packed_in_half_precision(run):
    packed(run)
    unpacked(run)
    for name, kind in (
        ("codec", SoundStreamConfig),
        ("policy", MusicLMConfig),
        ("mulan", MuLanConfig),
    ):
        before, after = (checkpoint.load_model(run / where / name, kind) for where in (".", "back"))
        assert after.config == before.config and set(after.assets) == set(before.assets)
        one, other = pack._flat(before.variables), pack._flat(after.variables)
        assert list(one) == list(other) and all(
            one[path].dtype == other[path].dtype for path in one
        )
        for path in one:
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
    pack.pack(str(run / "pack"), names, dtype="float32")
    arrays = safetensors.numpy.load_file(
        run / "pack/policy.safetensors"
    )  # as those read it who want the weights alone
    model = checkpoint.load_model(run / "policy", MusicLMConfig)
    np.testing.assert_array_equal(arrays["params/kernel"], model.variables["params"]["kernel"])
    pack.unpack(str(run / "pack"), str(run / "back"))
    for name in names:
        assert checkpoint.model_hash(run / "back" / name) == checkpoint.model_hash(run / name)
    with pytest.raises(ValueError, match="dtype='bfloat16' is none of float16, float32"):
        pack.pack(str(run / "pack"), names, dtype="bfloat16")


def test_weights_that_someone_else_wrote_are_taken_if_they_fit(run):
    """As those do who average models: the header kept, other numbers."""
    file = run / "pack/policy.safetensors"
    pack.pack(
        str(run / "pack"),
        {"policy": str(run / "policy"), "codec": str(run / "codec")},
        dtype="float32",
    )
    arrays = safetensors.numpy.load_file(file)
    with safetensors.safe_open(file, framework="numpy") as packed:
        header = packed.metadata()

    def read(arrays, changed=("policy",), header=header):
        safetensors.numpy.save_file(arrays, file, metadata=header)
        pack.unpack(str(run / "pack"), str(run / "back"), changed=changed)

    doubled = {**arrays, "params/kernel": 2 * arrays["params/kernel"]}
    with pytest.raises(
        ValueError, match=r"if someone wrote other weights into it, name it in unpack\.changed"
    ):
        read(doubled, ())
    for wrong, why in (
        (
            {"params/kernel": np.zeros((5, 3), np.float32)},
            r"params/kernel was packed as float \[3, 5\] and is float \[5",
        ),
        (
            {"params/kernel": doubled["params/kernel"].astype(np.float64)},
            r"and is float64 \[3, 5\]: write it as it was",
        ),
        (
            {"params/kernels": arrays["params/kernel"]},
            r"params/kernels was packed as nothing and is float",
        ),
        (
            {"params/kernel": np.full((3, 5), np.inf, np.float32)},
            "params/kernel has weights that are not finite",
        ),
        (
            # As safetensors writes it; so an averaging of one model with itself, in an array of another layout.
            {"params/kernel": np.asfortranarray(arrays["params/kernel"])},
            r"params/kernel has the numbers that were packed, in another order, .* make every array contiguous",
        ),
    ):
        with pytest.raises(ValueError, match=why):
            read({**doubled, **wrong})
    other = {pack.HEADER: header[pack.HEADER].replace("tokens.json", "../../tokens.json")}
    with pytest.raises(
        ValueError, match="another header than it was packed with: write its metadata as they were"
    ):
        read(doubled, header=other)
    with pytest.raises(ValueError, match="'policies' is none of"):
        read(doubled, ("policies",))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"policy\.safetensors is no whole safetensors file"):
        pack.unpack(str(run / "pack"), str(run / "back"), changed=("policy",))
    for _ in range(2):  # the second time it is there already
        read(doubled)
        model = checkpoint.load_model(run / "back/policy", MusicLMConfig)
        np.testing.assert_array_equal(model.variables["params"]["kernel"], doubled["params/kernel"])
        assert model.hash != checkpoint.model_hash(run / "policy")
        assert (
            model.assets["tokens.json"]
            == checkpoint.load_model(run / "policy", MusicLMConfig).assets["tokens.json"]
        )
    with pytest.raises(ValueError, match="unpack elsewhere"):
        read(arrays)
    index = json.loads((run / "pack/models.json").read_text())
    del index["policy"]["header"]
    (run / "pack/models.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="packed by an older version: pack its model again"):
        read(doubled)


def test_arrays_of_any_memory_layout_are_packed_as_they_are(run):
    """Orbax gives back row-major arrays, but whoever packs a model of their own may not have any."""
    transposed = {
        "params": {"kernel": np.asfortranarray(RNG.normal(size=(3, 5)).astype(np.float32))}
    }
    whole = checkpoint.Model(MusicLMConfig(), transposed, checkpoint.content_hash(transposed), {})
    for dtype in ("float32", "float16"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pack, "_load", lambda _: whole)
            pack.pack(str(run / dtype), {"policy": "a folder"}, dtype=dtype)
        loaded = pack.load(str(run / dtype), "policy").variables["params"]["kernel"]
        np.testing.assert_allclose(loaded, transposed["params"]["kernel"], rtol=2**-11, atol=1e-7)


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "", ".."])
def test_a_pack_of_someone_else_writes_nowhere_else(run, name):
    """The names of models, and of what belongs to one, come from files that anyone may have written."""
    packed(run)
    index = json.loads((run / "pack/models.json").read_text())
    (run / "pack/models.json").write_text(json.dumps({name: index["policy"]}))
    with pytest.raises(ValueError, match=r"which would lead out of the folder"):
        unpacked(run)
    with pytest.raises(ValueError, match=r"which would lead out of the folder"):
        pack.pack(str(run / "mine"), {name: str(run / "policy")})
    assert not (run / "mine").exists()
    with pytest.raises(ValueError, match=r"which would lead out of the folder"):
        checkpoint.save_model(
            run / "other", MusicLMConfig(), {"params": weights()}, {name: b"content"}
        )
    assert not checkpoint.has_model(run / "other") and not (run / "escaped").exists()


def test_the_card_names_every_array_of_what_ships():
    """`{a,b}` in the card's list is either, N a number, and what follows two spaces a remark."""
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
        for name in names:
            assert sum(bool(re.fullmatch(each, name)) for each in described[file.stem]) == 1, (
                file.stem,
                name,
            )
        for each in described[file.stem]:
            assert any(re.fullmatch(each, name) for name in names), (file.stem, each)


def test_the_lineage_names_the_packed_models(run):
    packed(run)
    unpacked(run)
    lineage = json.loads((run / "back/policy/model/tokens.json").read_text())
    assert lineage == {
        "codec": checkpoint.model_hash(run / "back/codec"),
        "mulan": checkpoint.model_hash(run / "back/mulan"),
        "semantic": "5e",
    }
    told = json.loads((run / "pack/models.json").read_text())
    assert (
        told["policy"]["packed_from"]
        == checkpoint.model_hash(run / "policy")
        != told["policy"]["hash"]
    )
    assert told["mulan"]["weights"] == 18  # without the towers
    packed_again = (run / "pack/policy.safetensors").read_bytes()
    packed(run)
    assert (run / "pack/policy.safetensors").read_bytes() == packed_again


def test_done_models_are_left_alone_and_others_refused(run, capsys):
    packed(run)
    unpacked(run)
    capsys.readouterr()
    unpacked(run)
    assert capsys.readouterr().out.count("unpacked already") == 3
    checkpoint.save_model(run / "back/policy", MusicLMConfig(), {"params": weights()})
    with pytest.raises(ValueError, match=r"back/policy holds model \w+, not \w+: unpack elsewhere"):
        unpacked(run)


def test_other_towers_are_refused(run, towers):
    packed(run)
    towers["audio"]["kernel"] += 1
    with pytest.raises(
        ValueError, match=r"towers/audio/kernel is not that of the pretrained towers"
    ):
        packed(run)
    with pytest.raises(ValueError, match="its towers are not those that it was packed without"):
        unpacked(run)
    with pytest.raises(ValueError, match="mulan needs its pretrained towers and their vocabulary"):
        pack.unpack(str(run / "pack"), str(run / "elsewhere"))


def test_without_fetched_towers_all_is_packed(run):
    pack.pack(str(run / "pack"), {"mulan": str(run / "mulan")})
    pack.unpack(str(run / "pack"), str(run / "back"))
    mulan = checkpoint.load_model(run / "back/mulan", MuLanConfig)
    assert mulan.assets == {"vocabulary": b"tokenizer"} and "towers" in mulan.variables["params"]


@pytest.mark.parametrize("place", [10, -1])
def test_a_changed_byte_is_named(run, place):
    path = run / "pack/policy.safetensors"
    packed(run)
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ValueError,
        match=r"policy\.safetensors has the sha256 \w+, not \w+: if it is damaged, restore it",
    ):
        unpacked(run)


def test_what_is_missing_is_named(run):
    with pytest.raises(FileNotFoundError, match=r"has no models\.json"):
        unpacked(run)
    packed(run)
    (run / "pack/policy.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"policy\.safetensors is missing"):
        unpacked(run)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*nothing"):
        packed(run, names=("nothing",))


def test_a_model_of_no_known_kind_is_refused(run):
    checkpoint.save_model(run / "odd", QualityConfig(), {"params": weights()})
    manifest = run / "odd/model/manifest.json"
    manifest.write_text(manifest.read_text().replace("QualityConfig", "OddConfig"))
    with pytest.raises(
        ValueError, match="odd/model is a OddConfig, which is none of MuLanConfig, MusicLMConfig"
    ):
        packed(run, names=("odd",))


def test_an_empty_pack_is_refused(run):
    with pytest.raises(ValueError, match=r"pack.models is empty: name a model and its folder"):
        pack.pack(str(run / "mine"), {})
    assert not (run / "mine").exists()


def test_what_ships_is_small_whole_and_described():
    """The models of the demo: every file is the one in the index and can be read, the card names its hash, and all fit
    into 24 MB.
    """
    told, card = json.loads((SHIPPED / pack.INDEX).read_text()), (SHIPPED / "README.md").read_text()
    files = sorted(SHIPPED.glob("*.safetensors"))
    assert [path.stem for path in files] == sorted(told)
    assert sum(path.stat().st_size for path in files) <= 24e6
    for path in files:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == told[path.stem]["sha256"]
        assert pack._read(path, told[path.stem], changed=False)[1]
        assert f"`{path.name}`" in card and told[path.stem]["hash"][:12] in card
