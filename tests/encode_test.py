"""What the models make of extreme sound, and the tokens that `encode` writes of clips."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import linen as nn

from musicrl_jax.assemble import assemble
from musicrl_jax.core import checkpoint, sharding
from musicrl_jax.encode import encode
from musicrl_jax.inputs.tokens import read, read_manifest
from musicrl_jax.models.bert import BertConfig
from musicrl_jax.models.conformer import ConformerConfig
from musicrl_jax.models.mulan import MuLan, MuLanConfig
from musicrl_jax.models.resnet import ResNetConfig
from musicrl_jax.models.rewards import Quality, QualityConfig
from musicrl_jax.models.semantic import SemanticConfig, SemanticEncoder
from musicrl_jax.models.soundstream import SoundStream, SoundStreamConfig
from musicrl_jax.systems import tiny
from musicrl_jax.systems.musiclm import VOCABULARY

RATE_HZ = 16000
FRAME = 640  # samples in a policy frame, 40 ms
RESNET = ResNetConfig(mels=16, widths=(8, 16), blocks=1)
CODEC = SoundStream(
    SoundStreamConfig(RATE_HZ, (8, 5, 4, 2), channels=4, embed=8, levels=3, codes=16)
)
SEMANTIC = SemanticEncoder(
    SemanticConfig(RATE_HZ, 16, ConformerConfig(2, 2, 16, 32, 5), layer=1, targets=32, codes=12)
)
MULAN = MuLan(
    MuLanConfig(
        RATE_HZ, audio=RESNET, text=BertConfig(1, 2, 16, 32, 64, 50), embed=8, levels=4, codes=6
    )
)
QUALITY = Quality(QualityConfig(RATE_HZ, network=RESNET))
HEARD = 10 * FRAME
RANDOM = np.random.default_rng(0)
EXTREMES = {
    "silence": np.zeros(HEARD),
    "full scale": np.ones(HEARD),
    "a square": np.sign(np.sin(np.arange(HEARD) * 0.173)),
    "clipped noise": np.clip(100 * RANDOM.normal(size=HEARD), -1, 1),
    "half the rate": (-1.0) ** np.arange(HEARD),
    "a click": np.eye(1, HEARD, 3000)[0],
    "the last bit": np.eye(1, HEARD, 10)[0] / 32768,
    "ten times too loud": 10 * RANDOM.normal(size=HEARD),
    "music then nothing": np.where(np.arange(HEARD) < 3000, np.sin(np.arange(HEARD) * 0.1), 0.0),
}


def random_weights(module, seed, *inputs):
    """Small random numbers for all that a module holds, scales and deviations 1: quicker than to compile its init."""
    shapes = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs))
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name in ("scale", "std") or not np.issubdtype(leaf.dtype, np.floating):
            return np.ones(leaf.shape, leaf.dtype)
        return 0.3 * random.normal(size=leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def variables():
    """Random weights of all four models."""
    wav, frames = np.zeros((1, HEARD), np.float32), HEARD // FRAME
    mask, noise = np.zeros((1, frames), bool), np.zeros((1, frames, 64), np.float32)
    return {
        "codec": random_weights(CODEC, 0, wav, jax.random.key(0)),
        "semantic": random_weights(SEMANTIC, 1, wav, mask, noise),
        "mulan": random_weights(MULAN, 2, wav, np.ones((1, 4), np.int32)),
        "quality": random_weights(QUALITY, 3, wav),
    }


@jax.jit
def hear(variables, wav):
    """All that the four models say of wav [B, N]."""
    acoustic = CODEC.apply(variables["codec"], wav, method="encode")
    embedding = MULAN.apply(variables["mulan"], wav, method="embed_audio")
    return {
        "acoustic": acoustic,
        "decoded": CODEC.apply(variables["codec"], acoustic, method="decode"),
        "semantic": SEMANTIC.apply(variables["semantic"], wav, method="tokens"),
        "embedding": embedding,
        "mulan": MULAN.apply(variables["mulan"], embedding, method="quantize"),
        "quality": QUALITY.apply(variables["quality"], wav),
    }


CODES = {"acoustic": 16, "semantic": 12, "mulan": 6}


def check(heard):
    """Numbers are finite, embeddings of length 1, codes in their range and scores on their scale."""
    for name, codes in CODES.items():
        assert (
            heard[name].dtype == np.int32 and heard[name].min() >= 0 and heard[name].max() < codes
        ), name
    assert np.isfinite(heard["decoded"]).all()
    np.testing.assert_allclose(np.linalg.norm(heard["embedding"], axis=-1), 1.0, rtol=1e-4)
    assert heard["quality"].min() >= 1.0 and heard["quality"].max() <= 5.0


@pytest.fixture(scope="module")
def heard(variables):
    """What the models say of the extremes, together in one batch."""
    return jax.device_get(hear(variables, np.stack(list(EXTREMES.values())).astype(np.float32)))


def test_extreme_sound_has_finite_embeddings_and_valid_codes(heard):
    check(heard)
    assert heard["semantic"].shape == (len(EXTREMES), 10) and heard["acoustic"].shape == (
        len(EXTREMES),
        20,
        3,
    )


def test_one_frame_is_enough(variables):
    one = jax.device_get(hear(variables, 0.1 * RANDOM.normal(size=(1, FRAME)).astype(np.float32)))
    check(one)
    assert (
        one["semantic"].shape == (1, 1)
        and one["acoustic"].shape == (1, 2, 3)
        and one["decoded"].shape == (1, FRAME)
    )


def test_what_is_not_finite_is_never_a_code(variables, heard):
    """-1 stands for it, as far as it reaches, and in the other clips of the batch nothing changes."""
    wav = np.stack(list(EXTREMES.values())).astype(np.float32)
    wav[2, 5000], wav[3, 5000] = np.nan, np.inf
    broken = jax.device_get(hear(variables, wav))
    for name in CODES:
        others = [0, 1, *range(4, len(wav))]
        np.testing.assert_array_equal(broken[name][others], heard[name][others])
    for clip in (2, 3):
        frames = 5000 // 320  # of the causal codec those before the sample are whole
        np.testing.assert_array_equal(
            broken["acoustic"][clip, :frames], heard["acoustic"][clip, :frames]
        )
        assert (broken["acoustic"][clip, frames] == -1).all()
        assert (broken["semantic"][clip] == -1).all() and (broken["mulan"][clip] == -1).all()
        assert np.isnan(broken["quality"][clip])


@dataclasses.dataclass(frozen=True)
class SomeClips:
    """The extremes as a data set of one split."""

    sample_rate_hz: int = RATE_HZ
    with_captions: bool = False

    def splits(self):
        return ["test"]

    def count(self, split):
        return len(EXTREMES)

    def batches(self, split, batch_size, seed, epochs):
        assert (split, epochs, self.with_captions) == ("test", 1, True)
        wav, names = (
            np.stack(list(EXTREMES.values())).astype(np.float32),
            np.array(list(EXTREMES), object),
        )
        for at in range(0, len(wav), batch_size):
            part = slice(at, at + batch_size)
            yield {"audio": wav[part], "id": names[part], "caption": names[part]}


def save(folder, variables):
    """Folder of the system of the three models."""
    modules = {"soundstream": CODEC, "semantic": SEMANTIC, "mulan": MULAN}
    for name, module in modules.items():
        assets = {VOCABULARY: b"words"} if name == "mulan" else {}
        checkpoint.save_model(folder / name, module.config, variables[name], assets)
    assemble(str(folder / "tokenizer"), {name: str(folder / name) for name in modules})
    return str(folder / "tokenizer")


def test_tokens_are_what_the_models_say_of_each_clip(tmp_path, variables, heard, capsys):
    """Nine clips in batches of four, which become eight on eight devices, against all of them at once on one."""
    system = save(tmp_path, {**variables, "soundstream": variables["codec"]})
    encode(SomeClips(), system, str(tmp_path / "tokens"), batch_size=4)
    rows = list(read(str(tmp_path / "tokens"), "test")[0])
    assert (
        [row["id"].decode() for row in rows]
        == [row["caption"].decode() for row in rows]
        == list(EXTREMES)
    )
    for name in CODES:
        np.testing.assert_array_equal(np.stack([row[name] for row in rows]), heard[name])
    manifest = read_manifest(str(tmp_path / "tokens"))
    folders = {"codec": "soundstream", "semantic": "semantic", "mulan": "mulan"}
    assert manifest["models"] == {
        name: checkpoint.model_hash(tmp_path / part) for name, part in folders.items()
    }
    assert manifest["layout"] == {
        "sample_rate_hz": RATE_HZ,
        **{
            "acoustic_levels": 3,
            "acoustic_codes": 16,
            "semantic_codes": 12,
            "mulan_levels": 4,
            "mulan_codes": 6,
        },
    }
    assert manifest["counts"] == {"test": 9}
    encode(SomeClips(), system, str(tmp_path / "tokens"), batch_size=4)
    assert "test encoded already" in capsys.readouterr().out


@dataclasses.dataclass(frozen=True)
class Tunes:
    """Eleven clips of ten tones of the tiny system's."""

    with_captions: bool = False

    def splits(self):
        return ["train"]

    def count(self, split):
        return 11

    def batches(self, split, batch_size, seed, epochs):
        hz = tiny.FIRST_HZ + 100 * np.repeat(tune(), SAMPLES, axis=1)  # [11, N]
        wav = np.sin(2 * np.pi * hz * np.arange(10 * SAMPLES) / RATE_HZ).astype(np.float32)
        names = np.array([f"tune {i}" for i in range(11)], object)
        for at in range(0, 11, batch_size):
            part = slice(at, at + batch_size)
            yield {"audio": wav[part], "id": names[part], "caption": names[part]}


SAMPLES = 320  # of a tone


def tune():
    return np.random.default_rng(3).integers(0, 6, (11, 10))


def tunes_encoded(folder):
    """Encodes them by three, or as many more as the devices want, and returns the folder of the tokens."""
    if not (folder / "system").exists():
        tiny.write(folder / "system")
    encode(Tunes(), str(folder / "system"), str(folder / "tokens"), batch_size=3)
    return folder / "tokens"


def test_each_device_encodes_its_own_rows(tmp_path, monkeypatch):
    tiny.write(tmp_path / "system")
    mesh, fetch, shares = sharding.make_mesh(devices=jax.devices()[:4]), sharding.fetch, []
    monkeypatch.setattr(sharding, "make_mesh", lambda: mesh)

    def watched(tree):
        shares.extend(len(shard.data) for shard in tree["tokens"].addressable_shards)
        return fetch(tree)

    monkeypatch.setattr(sharding, "fetch", watched)
    rows, _ = read(str(tunes_encoded(tmp_path)), "train")
    np.testing.assert_array_equal(np.stack([row["tokens"] for row in rows]), tune())
    assert shares == [1] * 4 * 3  # three batches of four


def test_a_model_that_computes_no_numbers_is_told_by_clip_and_token(tmp_path, variables):
    weights = jax.tree.map(lambda w: np.full_like(w, np.nan), variables["mulan"]["params"])
    broken = {"mulan": {**variables["mulan"], "params": weights}, "soundstream": variables["codec"]}
    system = save(tmp_path, {**variables, **broken})
    with pytest.raises(
        ValueError,
        match=r"clip 'silence' of 'test' has no mulan tokens: .*; train that model again",
    ):
        encode(SomeClips(), system, str(tmp_path / "tokens"), batch_size=4)
    assert not (tmp_path / "tokens" / "test").exists()


def test_a_system_that_cannot_encode_is_refused(tmp_path, monkeypatch):
    tiny.write(tmp_path / "system")
    monkeypatch.setattr(tiny.TinySystem, "ENCODING", ())
    with pytest.raises(
        ValueError, match="is of kind 'tiny', which cannot encode sound: name another system"
    ):
        encode(Tunes(), str(tmp_path / "system"), str(tmp_path / "tokens"))
