"""MuLan on frozen towers: outputs are computed once, and the loss is that of the whole model."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn

from musicrl_jax.core import checkpoint
from musicrl_jax.inputs import order, pieces
from musicrl_jax.losses.optimiser import Optimiser
from musicrl_jax.models import bert, musicnn
from musicrl_jax.models.mulan import MuLan, MuLanConfig, Towers
from musicrl_jax.objectives.mulan_projections import (
    MuLanProjectionsObjective,
    PretrainedTowers,
    TowerOutputs,
)
from musicrl_jax.train import train

CAPTIONS = [f"a {word} tone" for word in ("low", "middling", "high", "shrill")]
AUDIO = musicnn.MusicnnConfig(timbral=3, temporal=2, middle=4)
TEXT = bert.BertConfig(layers=2, heads=2, embed=8, mlp=12, positions=24, pieces=275)
MODEL = MuLanConfig(
    16_000, 0.25, AUDIO, TEXT, text_length=24, embed=8, hidden=16, levels=2, codes=4
)
COUNTS = {"one": {"train": 12, "validation": 8}, "two": {"train": 5}}
KEY = jax.random.key(0)
apply_mulan = jax.jit(MuLan(MODEL).apply, static_argnames="method")
apply_towers = jax.jit(Towers(MODEL).apply, static_argnames="method")


# --- clips, weights and the objective ---


@dataclasses.dataclass(frozen=True)
class Tones:
    """Replaces `inputs.Clips`: clips of half a second; clip n of a set has caption n mod 4."""

    vocabulary: str
    datasets: dict = dataclasses.field(default_factory=lambda: {"one": 2.0, "two": 1.0})
    passes: list = dataclasses.field(default_factory=list, metadata=checkpoint.NO_IDENTITY)

    def records(self, name):
        return COUNTS[name]

    def splits(self):
        return ["train", "validation"]

    def count(self, split):
        return sum(COUNTS[name].get(split, 0) for name in self.datasets)

    def captions(self, split):
        captions = []
        for name in self.datasets:
            captions += (CAPTIONS * 3)[: COUNTS[name].get(split, 0)]
        return captions

    def whole(self, name, split):
        """Returns all clips of a split of one set, in a batch."""
        count = COUNTS[name][split]
        return next(dataclasses.replace(self, datasets={name: 1.0}).batches(split, count, 0))

    def batches(self, split, batch_size, seed, start_step=0, epochs=None, rows=None):
        (name,) = self.datasets
        self.passes.append((name, split))
        numbers = order.shuffled(seed, 0, np.arange(COUNTS[name][split]), COUNTS[name][split])
        for first in range(0, len(numbers), batch_size):
            chosen = numbers[first : first + batch_size]
            hz = np.array([200, 600, 1800, 5400])[chosen % 4]
            hz = hz * (1 + 0.01 * chosen + 0.1 * (name == "two"))
            wav = 0.3 * np.sin(2 * np.pi * hz[:, None] * np.arange(8000) / 16_000)
            captions = [CAPTIONS[n % 4] for n in chosen]
            text = pieces.encode(pieces.content(self.vocabulary), captions, 24)
            yield {"audio": wav.astype(np.float32), "text": text}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Returns (path of musicnn's file, path of BERT's, the same weights as trees)."""
    folder = tmp_path_factory.mktemp("weights")
    rng = np.random.default_rng(0)

    # The text tower.
    shapes = {
        "embeddings.word_embeddings.weight": (275, 8),
        "embeddings.position_embeddings.weight": (24, 8),
        "embeddings.token_type_embeddings.weight": (2, 8),
    }
    sizes = {
        "intermediate.dense": (12, 8),
        "output.dense": (8, 12),
        "attention.output.dense": (8, 8),
    }
    sizes |= {f"attention.self.{name}": (8, 8) for name in ("query", "key", "value")}
    norms = ["embeddings"]
    for layer in ("encoder.layer.0", "encoder.layer.1"):
        norms += [f"{layer}.attention.output", f"{layer}.output"]
        for name, shape in sizes.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.LayerNorm.weight": (8,), f"{name}.LayerNorm.bias": (8,)}
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    safetensors.numpy.save_file(tensors, folder / "text.safetensors")
    (folder / "config.json").write_text('{"num_attention_heads": 2}')

    # The audio tower.
    timbral, temporal = [(7, 38, 3), (7, 67, 3)], [(128, 1, 2), (64, 1, 2), (32, 1, 2)]
    kernels = [*timbral, *temporal, (7, 12, 4), (7, 4, 4), (7, 4, 4)]
    filters = {}
    for number, (frames, bands, width) in enumerate(kernels):
        name = f"conv2d_{number}" if number else "conv2d"
        filters[f"{name}/kernel"] = rng.normal(size=(frames, bands, 1, width)).astype(np.float32)
        filters[f"{name}/bias"] = np.zeros(width, np.float32)
    for number, width in enumerate([1, *(width for _, _, width in kernels), 48]):
        name = f"batch_normalization_{number}" if number else "batch_normalization"
        for part in ("gamma", "beta", "moving_mean", "moving_variance"):
            filters[f"{name}/{part}"] = rng.uniform(0.5, 1, size=width).astype(np.float32)
    safetensors.numpy.save_file(filters, folder / "audio.safetensors")

    trees = {"audio": musicnn.params(AUDIO, filters, ""), "text": bert.params(TEXT, tensors, "")}
    return str(folder / "audio.safetensors"), str(folder / "text.safetensors"), trees


@pytest.fixture
def task(vocabulary, weights, tmp_path):
    towers = PretrainedTowers(MODEL, *weights[:2])
    outputs = TowerOutputs(Tones(vocabulary), towers, str(tmp_path / "heard"))
    return MuLanProjectionsObjective(MODEL, outputs, vocabulary)


def test_another_vocabulary_than_the_text_towers_is_refused(task):
    larger = dataclasses.replace(MODEL, text=dataclasses.replace(TEXT, pieces=276))
    towers = dataclasses.replace(task.data.towers, model=larger)
    data = dataclasses.replace(task.data, towers=towers)
    other = MuLanProjectionsObjective(larger, data, task.vocabulary)
    with pytest.raises(ValueError, match="has 275 pieces, and the pretrained text tower reads 276"):
        other.check({"audio": None, "text": None})


def test_a_batch_larger_than_a_split_is_refused(task):
    complaint = "batch_size 18 is more than the 17 clips of split 'train'"
    with pytest.raises(ValueError, match=complaint):
        next(task.data.batches("train", 18, seed=0))


# --- outputs of the towers ---


def test_outputs_are_computed_once_and_are_the_towers(task, weights):
    data = task.data
    batches = list(data.batches("train", 5, seed=3, epochs=2))
    assert [len(batch["text"]) for batch in batches] == [5, 5, 5, 5, 5, 5, 4]
    assert data.clips.passes == [("one", "train"), ("two", "train")]
    outputs = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    assert outputs["audio"].shape == (34, 2, 48)
    # Two epochs have each clip twice, with the outputs of the towers themselves.
    rows, counts = np.unique(outputs["audio"].reshape(34, -1), axis=0, return_counts=True)
    assert len(rows) == 17 and (counts == 2).all()
    variables, whole = {"params": weights[2]}, data.clips.whole("two", "train")
    audio = np.asarray(apply_towers(variables, whole["audio"], method=Towers.audio_features))
    texts = np.asarray(apply_towers(variables, whole["text"], method=Towers.text_features))
    for clip, text, ids in zip(audio, texts, whole["text"], strict=True):
        at = np.abs(outputs["audio"] - clip).max(axis=(1, 2)).argmin()
        np.testing.assert_allclose(outputs["audio"][at], clip, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(outputs["text"][at], text, atol=1e-5)
        np.testing.assert_array_equal(outputs["pieces"][at], ids)


def test_batches_are_a_pure_function_of_seed_and_step_at_the_sets_rates(task):
    stream = task.data.batches("train", 6, seed=1)
    first = [next(stream) for _ in range(5)]
    again = next(task.data.batches("train", 6, seed=1, start_step=4))
    for name, value in again.items():
        np.testing.assert_array_equal(first[4][name], value)
    two = {row.tobytes() for row in task.data.read("two", "train")["audio"]}
    rows = np.concatenate([batch["audio"] for batch in first])
    assert sum(row.tobytes() in two for row in rows) == 10  # a third of 30


def test_outputs_of_other_weights_are_computed_again(task, weights, tmp_path):
    list(task.data.batches("validation", 8, seed=0, epochs=1))
    other = tmp_path / "other.safetensors"
    tensors = safetensors.numpy.load_file(weights[0])
    safetensors.numpy.save_file({name: 1.1 * tensor for name, tensor in tensors.items()}, other)
    towers = dataclasses.replace(task.data.towers, audio_weights=str(other))
    list(dataclasses.replace(task.data, towers=towers).batches("validation", 8, seed=0, epochs=1))
    assert task.data.clips.passes == [("one", "validation")] * 2
    assert len(list((tmp_path / "heard").iterdir())) == 2


# --- training ---


def test_the_loss_is_that_of_the_whole_model_and_moves_projections_alone(task, weights):
    batch = next(task.data.batches("validation", 8, seed=0, epochs=1))
    variables = nn.unbox(jax.jit(task.init)(KEY, batch))
    params, state = variables["params"], {"rvq": variables["rvq"]}
    whole = {"params": {**params, "towers": weights[2]}, **state}
    assert set(params) == {"audio_projection", "text_projection", "log_temperature"}
    metrics = jax.jit(task.evaluate)(params, state, {}, batch, KEY)
    clips = task.data.clips.whole("one", "validation")
    outputs = apply_mulan(whole, clips["audio"], clips["text"])
    audio, text, temperature = (np.asarray(part, np.float64) for part in outputs)
    logits = audio @ text.T / temperature
    same = (clips["text"][:, None] == clips["text"][None]).all(axis=-1) & ~np.eye(8, dtype=bool)
    logits[same] = -1e9
    by_row, by_column = (np.log(np.exp(logits).sum(axis)) for axis in (1, 0))
    expected = (by_row + by_column - 2 * np.diag(logits)).mean() / 2
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)
    loss = jax.jit(task.loss)
    noisy = [float(loss(params, state, {}, batch, jax.random.key(n))[0]) for n in (0, 0, 1)]
    assert noisy[0] == noisy[1] != noisy[2] and noisy[0] != metrics["loss"]


def test_a_run_writes_a_whole_mulan_and_resumes(task, weights, tmp_path, capsys):
    arguments = {"steps": 30, "batch_size": 8, "optimiser": Optimiser(1e-2, 1), "save_every": 20}
    metrics = train(task, str(tmp_path / "run"), **arguments)
    assert "frozen" in capsys.readouterr().out
    assert metrics["loss"] < metrics["chance"]
    model = checkpoint.load_model(tmp_path / "run", MuLanConfig)
    assert model.config == MODEL and isinstance(model.config.audio, musicnn.MusicnnConfig)
    text_tower = model.variables["params"]["towers"]["text"]
    jax.tree.map(np.testing.assert_array_equal, text_tower, weights[2]["text"])
    clips = task.data.clips.whole("one", "train")
    for name, method in (("audio", MuLan.embed_audio), ("text", MuLan.embed_text)):
        embedding = apply_mulan(model.variables, clips[name], method=method)
        codes = np.asarray(apply_mulan(model.variables, embedding, method=MuLan.quantize))
        assert codes.shape == (12, 2) and (codes >= 0).all() and (codes < 4).all()
        assert name == "text" or len(np.unique(codes[:, 0])) == 4
    codebooks = model.variables["rvq"]["codebooks"]
    assert codebooks.shape == (2, 4, 8) and codebooks.any()
    # The folder belongs to this run, whether or not the outputs were computed before.
    assert train(task, str(tmp_path / "run"), **arguments) == {}
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["chance"] == pytest.approx(np.log(8))


def test_weights_that_do_not_fit_are_named(task, weights):
    other_text = dataclasses.replace(MODEL, text=bert.BertConfig())
    for changes, complaint in (
        ({"model": MuLanConfig()}, "set MuLanConfig.audio to a MusicnnConfig"),
        ({"model": other_text}, r"holds a BertConfig\(layers=2, .*: set MuLanCo"),
        ({"text_weights": "/no/file"}, "weights '/no/file' are no file"),
        (
            {"text_weights": weights[0]},
            r"audio.safetensors has no tensor embeddings",
        ),
        (
            {"audio_weights": weights[1]},
            r"text.safetensors has no tensor batch_norm",
        ),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=complaint):
            dataclasses.replace(task.data.towers, **changes).params()
    other = dataclasses.replace(task, model=dataclasses.replace(MODEL, embed=9))
    with pytest.raises(ValueError, match="make them equal"):
        other.check({"audio": jnp.zeros((1, 2, 48)), "text": jnp.zeros((1, 8))})
