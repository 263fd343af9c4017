"""The models' outputs for extreme sound, and the tokens that `encode` writes."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_musiclm

from musicrl_jax.assemble import assemble
from musicrl_jax.core import checkpoint, sharding
from musicrl_jax.encode import encode
from musicrl_jax.inputs.tokens import read, read_manifest
from musicrl_jax.models.mulan import MuLan
from musicrl_jax.models.rewards import Quality
from musicrl_jax.models.semantic import SemanticEncoder
from musicrl_jax.models.soundstream import SoundStream
from musicrl_jax.systems import tiny

CONFIGS = tiny_musiclm.CONFIGS
CODEC, SEMANTIC = SoundStream(CONFIGS["soundstream"]), SemanticEncoder(CONFIGS["semantic"])
MULAN, QUALITY = MuLan(CONFIGS["mulan"]), Quality(CONFIGS["quality"])
MODELS = ("soundstream", "semantic", "mulan", "quality")
RATE_HZ, FRAME = 24_000, 960  # a frame of the policy, 40 ms, is two of the codec
SAMPLES = 10 * FRAME
RANDOM = np.random.default_rng(0)
TIME = np.arange(SAMPLES)
EXTREMES = {
    "silence": np.zeros(SAMPLES),
    "full scale": np.ones(SAMPLES),
    "a square": np.sign(np.sin(TIME * 0.173)),
    "clipped noise": np.clip(100 * RANDOM.normal(size=SAMPLES), -1, 1),
    "half the rate": (-1.0) ** TIME,
    "a click": np.eye(1, SAMPLES, 3000)[0],
    "the last bit": np.eye(1, SAMPLES, 10)[0] / 32768,
    "ten times too loud": 10 * RANDOM.normal(size=SAMPLES),
    "music then nothing": np.where(TIME < 3000, np.sin(TIME * 0.1), 0.0),
}
WAVS = np.stack(list(EXTREMES.values())).astype(np.float32)
CODES = {"acoustic": 7, "semantic": 5, "mulan": 4}


@jax.jit
def run_models(variables, wav):
    """Returns the outputs of the four models for wav [B, N]."""
    acoustic = CODEC.apply(variables["soundstream"], wav, method="encode")
    embedding = MULAN.apply(variables["mulan"], wav, method="embed_audio")
    return {
        "acoustic": acoustic,
        "decoded": CODEC.apply(variables["soundstream"], acoustic, method="decode"),
        "semantic": SEMANTIC.apply(variables["semantic"], wav, method="tokens"),
        "embedding": embedding,
        "mulan": MULAN.apply(variables["mulan"], embedding, method="quantize"),
        "quality": QUALITY.apply(variables["quality"], wav),
    }


@pytest.fixture(scope="module")
def variables():
    return {name: tiny_musiclm.model(name).variables for name in MODELS}


@pytest.fixture(scope="module")
def outputs(variables):
    """Returns the models' outputs for the extremes, in one batch."""
    return jax.device_get(run_models(variables, WAVS))


def check(outputs):
    """Checks that outputs are finite, and that codes and scores are in their range."""
    for name, codes in CODES.items():
        assert outputs[name].dtype == np.int32, name
        assert outputs[name].min() >= 0 and outputs[name].max() < codes, name
    assert np.isfinite(outputs["decoded"]).all()
    np.testing.assert_allclose(np.linalg.norm(outputs["embedding"], axis=-1), 1.0, rtol=1e-4)
    assert outputs["quality"].min() >= 1.0 and outputs["quality"].max() <= 5.0


def test_extreme_sound_has_finite_embeddings_and_valid_codes(outputs):
    check(outputs)
    assert outputs["semantic"].shape == (len(WAVS), 10)
    assert outputs["acoustic"].shape == (len(WAVS), 20, 4)


def test_one_frame_is_enough(variables):
    wav = 0.1 * RANDOM.normal(size=(1, FRAME)).astype(np.float32)
    one = jax.device_get(run_models(variables, wav))
    check(one)
    assert one["semantic"].shape == (1, 1) and one["acoustic"].shape == (1, 2, 4)
    assert one["decoded"].shape == (1, FRAME)


def test_sound_that_is_not_finite_has_no_codes(variables, outputs):
    """Its codes are -1, as far as it reaches; the other clips of the batch do not change."""
    wav = WAVS.copy()
    wav[2, 2000], wav[3, 2000] = np.nan, np.inf
    broken = jax.device_get(run_models(variables, wav))
    for name in CODES:
        others = [0, 1, *range(4, len(wav))]
        np.testing.assert_array_equal(broken[name][others], outputs[name][others])
    frames = 2000 // 480  # the codec is causal: the frames before the sample are valid
    for clip in (2, 3):
        acoustic = broken["acoustic"][clip]
        np.testing.assert_array_equal(acoustic[:frames], outputs["acoustic"][clip, :frames])
        assert (acoustic[frames] == -1).all()
        assert (broken["semantic"][clip] == -1).all() and (broken["mulan"][clip] == -1).all()
        assert np.isnan(broken["quality"][clip])


@dataclasses.dataclass(frozen=True)
class FakeClips:
    """A data set of one split that keeps its sound in memory."""

    split: str
    wavs: dict = dataclasses.field(metadata=checkpoint.NO_IDENTITY)
    with_captions: bool = False

    def splits(self):
        return [self.split]

    def count(self, split):
        return len(self.wavs)

    def batches(self, split, batch_size, seed, epochs):
        assert (split, epochs, self.with_captions) == (self.split, 1, True)
        names, wavs = np.array(list(self.wavs), object), np.stack(list(self.wavs.values()))
        for start in range(0, len(names), batch_size):
            part = slice(start, start + batch_size)
            yield {"audio": wavs[part], "id": names[part], "caption": names[part]}


EXTREME_CLIPS = FakeClips("test", dict(zip(EXTREMES, WAVS, strict=True)))


def save(folder, **changes):
    """Writes a system of the three models that encode, and returns its folder."""
    parts = {name: tiny_musiclm.save(folder, name) for name in MODELS[:3]}
    parts |= {name: tiny_musiclm.save(folder, name, variables=changes[name]) for name in changes}
    assemble(str(folder / "tokenizer"), parts)
    return str(folder / "tokenizer")


def test_the_models_tokens_of_each_clip_are_written(tmp_path, outputs, capsys):
    """Batches of eight on eight devices have the tokens of one batch of nine on one device."""
    system = save(tmp_path)
    encode(EXTREME_CLIPS, system, str(tmp_path / "tokens"), batch_size=4)
    rows = list(read(str(tmp_path / "tokens"), "test")[0])
    for name in ("id", "caption"):
        assert [row[name].decode() for row in rows] == list(EXTREMES)
    for name in CODES:
        np.testing.assert_array_equal(np.stack([row[name] for row in rows]), outputs[name])
    manifest = read_manifest(str(tmp_path / "tokens"))
    models = {"codec": "soundstream", "semantic": "semantic", "mulan": "mulan"}
    assert manifest["models"] == {
        name: checkpoint.model_hash(tmp_path / part) for name, part in models.items()
    }
    assert manifest["layout"] == {
        "sample_rate_hz": RATE_HZ,
        "acoustic_levels": 4,
        "acoustic_codes": 7,
        "semantic_codes": 5,
        "mulan_levels": 3,
        "mulan_codes": 4,
    }
    assert manifest["counts"] == {"test": 9}
    encode(EXTREME_CLIPS, system, str(tmp_path / "tokens"), batch_size=4)
    assert "test encoded already" in capsys.readouterr().out


def test_a_model_with_nan_output_is_named_with_the_clip(tmp_path, variables):
    nan = jax.tree.map(lambda w: np.full_like(w, np.nan), variables["mulan"]["params"])
    system = save(tmp_path, mulan={**variables["mulan"], "params": nan})
    complaint = r"clip 'silence' of 'test' has no mulan tokens: .*; train that model again"
    with pytest.raises(ValueError, match=complaint):
        encode(EXTREME_CLIPS, system, str(tmp_path / "tokens"), batch_size=4)
    assert not (tmp_path / "tokens" / "test").exists()


# --- clips of the tiny system's tones ---

TONES = np.random.default_rng(3).integers(0, 6, (11, 10))


def encode_tones(folder):
    """Encodes eleven clips, three or more at a time, and returns the folder of their tokens."""
    if not (folder / "system").exists():
        tiny.write(folder / "system")
    hz = tiny.FIRST_HZ + 100 * np.repeat(TONES, 320, axis=1)  # [11, N], at 16 kHz
    wavs = np.sin(2 * np.pi * hz * np.arange(hz.shape[1]) / 16_000).astype(np.float32)
    clips = FakeClips("train", {f"tune {number}": wav for number, wav in enumerate(wavs)})
    encode(clips, str(folder / "system"), str(folder / "tokens"), batch_size=3)
    return folder / "tokens"


def test_each_device_encodes_its_own_rows(tmp_path, monkeypatch):
    tiny.write(tmp_path / "system")
    mesh, fetch, shares = sharding.make_mesh(devices=jax.devices()[:4]), sharding.fetch, []
    monkeypatch.setattr(sharding, "make_mesh", lambda: mesh)

    def count_rows(tree):
        shares.extend(len(shard.data) for shard in tree["tokens"].addressable_shards)
        return fetch(tree)

    monkeypatch.setattr(sharding, "fetch", count_rows)
    rows, _ = read(str(encode_tones(tmp_path)), "train")
    np.testing.assert_array_equal(np.stack([row["tokens"] for row in rows]), TONES)
    assert shares == [1] * 4 * 3  # three batches of four


def test_a_system_that_cannot_encode_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny.TinySystem, "ENCODING", ())
    complaint = "is of kind 'tiny', which cannot encode sound: name another system"
    with pytest.raises(ValueError, match=complaint):
        encode_tones(tmp_path)
