"""Training MuLan: the loss falls below chance, the quantizer is fitted, the vocabulary stored."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sentencepiece
from flax import linen as nn

from musicrl_jax.core import sharding
from musicrl_jax.models import rvq
from musicrl_jax.models.bert import BertConfig
from musicrl_jax.models.mulan import MuLan, MuLanConfig
from musicrl_jax.models.resnet import ResNetConfig
from musicrl_jax.objectives.mulan import MuLanObjective

CAPTIONS = [f"a {word} tone" for word in ("low", "middling", "high", "shrill")]
CONFIG = MuLanConfig(
    sample_rate_hz=16_000,
    window_seconds=1.0,
    audio=ResNetConfig(mels=16, widths=(8,), blocks=1),
    text=BertConfig(layers=1, heads=2, embed=16, mlp=32, positions=24, pieces=400),
    text_length=24,
    embed=8,
    levels=2,
    codes=4,
)


# --- data and training ---


def tones() -> np.ndarray:
    """Returns two clips for each caption, [8, 8000]."""
    time = np.arange(8000) / 16_000
    hz = np.repeat([200.0, 600.0, 1800.0, 5400.0], 2) * np.tile([1.0, 1.05], 4)
    return (0.3 * np.sin(2 * np.pi * hz[:, None] * time)).astype(np.float32)


class Captioned:
    """Eight clips in one batch."""

    def __init__(self, vocabulary):
        processor = sentencepiece.SentencePieceProcessor(model_file=vocabulary)
        self.text = np.zeros((8, 24), np.int32)
        for row, caption in zip(self.text, np.repeat(CAPTIONS, 2), strict=True):
            pieces = processor.encode(str(caption))
            row[: len(pieces)] = pieces

    def batches(self, split, batch_size, seed, start_step=0, epochs=None):
        return iter([{"audio": tones(), "text": self.text}])

    def count(self, split):
        return 8


@pytest.fixture(scope="module")
def trained(vocabulary):
    """Returns (objective, final variables, metrics of the first and the last of 150 steps)."""
    task = MuLanObjective(CONFIG, Captioned(vocabulary), vocabulary)
    batch = next(task.data.batches("train", 8, 0))
    variables = nn.unbox(jax.jit(task.init)(jax.random.key(0), batch))
    params, state = variables["params"], {"rvq": variables["rvq"]}

    @jax.jit
    def step(params):
        gradient = jax.value_and_grad(task.loss, has_aux=True)
        (_, (_, metrics)), slope = gradient(params, state, {}, batch, jax.random.key(0))
        norm = optax.tree.norm(slope)
        return jax.tree.map(lambda p, g: p - 0.1 * g / norm, params, slope), metrics

    history = []
    for _ in range(150):
        params, metrics = step(params)
        history.append(metrics)
    done = task.finish({"params": params, **state}, {}, lambda: iter([batch]))
    return task, done, history[0], history[-1]


apply = jax.jit(MuLan(CONFIG).apply, static_argnames="method")


def mean_square(x):
    return np.square(x).sum(axis=-1).mean()


def test_the_loss_falls_below_chance(trained):
    _, _, first, last = trained
    np.testing.assert_allclose(first["chance"], np.log(8), rtol=1e-6)
    assert first["loss"] > 1.0
    assert last["loss"] < 0.2
    assert last["recall_1"] == 1


# --- the finished model ---


def test_quantizer_is_fitted_to_audio_embeddings(trained):
    _, done, _, _ = trained
    embedding = apply(done, tones(), method=MuLan.embed_audio)
    codebooks, codes = done["rvq"]["codebooks"], apply(done, embedding, method=MuLan.quantize)
    np.testing.assert_allclose(codebooks, rvq.fit(jax.random.key(0), embedding, 2, 4), atol=1e-5)
    assert codes.shape == (8, 2) and len(np.unique(codes[:, 0])) == 4
    for code in range(4):
        mean = embedding[codes[:, 0] == code].mean(axis=0)
        np.testing.assert_allclose(codebooks[0, code], mean, atol=1e-5)
    errors = [mean_square(embedding - rvq.dequantize(codebooks[:n], codes[:, :n])) for n in (1, 2)]
    assert (
        errors[1] < errors[0] < 0.5 * mean_square(embedding - embedding.mean(axis=0, keepdims=True))
    )


def test_clips_and_their_caption_get_one_code(trained):
    """K-means starts at a clip of each caption: a random start may separate a caption's clips."""
    task, done, _, _ = trained
    embedding = apply(done, tones(), method=MuLan.embed_audio)
    start = jnp.stack([embedding[::2], (embedding[::2] - embedding[1::2]) / 2])
    fitted = {**done, "rvq": {"codebooks": rvq.fit(jax.random.key(0), embedding, 2, 4, start)}}
    codes = apply(fitted, embedding, method=MuLan.quantize)
    np.testing.assert_array_equal(codes[::2, 0], codes[1::2, 0])
    assert len(np.unique(codes[:, 0])) == 4
    assert mean_square(embedding - rvq.dequantize(fitted["rvq"]["codebooks"], codes)) < 0.05
    text = apply(done, jnp.asarray(task.data.text), method=MuLan.embed_text)
    text_codes = apply(fitted, text, method=MuLan.quantize)
    np.testing.assert_array_equal(text_codes[:, 0], codes[:, 0])


# --- checks and meshes ---


def test_more_codes_than_clips_is_named(trained):
    task, done, _, _ = trained
    greedy = dataclasses.replace(task, model=dataclasses.replace(CONFIG, codes=9))
    with pytest.raises(ValueError, match=r"codes = 9.*8 training clips"):
        greedy.finish(done, {}, lambda: task.data.batches("train", 8, 0, epochs=1))


def test_the_vocabulary_is_stored_and_must_fit(trained, tmp_path):
    task, _, _, _ = trained
    content = task.assets()["vocabulary"]
    assert sentencepiece.SentencePieceProcessor(model_proto=content).decode([5]) is not None
    model = MuLanConfig(text=BertConfig(pieces=100))
    small = MuLanObjective(model, task.data, task.vocabulary)
    batch = next(task.data.batches("train", 8, 0))
    with pytest.raises(ValueError, match=r"BertConfig\.pieces = 100"):
        small.check(batch)
    with pytest.raises(ValueError, match=r"Clips\.vocabulary"):
        task.check({"audio": batch["audio"]})
    lost = MuLanObjective(CONFIG, task.data, str(tmp_path / "none.model"))
    with pytest.raises(FileNotFoundError, match=r"none\.model"):
        lost.check(batch)


def test_random_towers_are_reported(trained, capsys):
    assert trained[0].frozen() == {}
    assert "MuLan's towers start from random weights" in capsys.readouterr().out


def test_negatives_are_those_of_the_whole_mesh(trained):
    """Loss and gradient are equal on one device and on eight, which hold one clip each."""
    task, done, _, _ = trained
    batch = next(task.data.batches("train", 8, 0))
    params, state = done["params"], {"rvq": done["rvq"]}
    results = []
    for devices in (1, 8):
        mesh = sharding.make_mesh(devices=jax.devices()[:devices])
        arrays = sharding.put_batch(mesh, batch)
        assert len(arrays["audio"].sharding.device_set) == devices
        with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
            step = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
            replicated = jax.device_put(params, sharding.replicated(mesh))
            (loss, _), slope = step(replicated, state, {}, arrays, jax.random.key(0))
            results.append(jax.device_get((loss, slope)))
    (one, first), (many, second) = results
    np.testing.assert_allclose(one, many, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), first, second)
