"""Training MuLan: the loss leaves chance behind, the quantizer is fitted, the vocabulary travels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sentencepiece
from flax import linen as nn

from musicrl_jax.core import sharding
from musicrl_jax.models import bert, mulan, resnet, rvq
from musicrl_jax.objectives import mulan as objective

CAPTIONS = [f"a {word} tone" for word in ("low", "middling", "high", "shrill")]
CONFIG = mulan.MuLanConfig(
    sample_rate_hz=16_000,
    window_seconds=1.0,
    audio=resnet.ResNetConfig(mels=16, widths=(8,), blocks=1),
    text=bert.BertConfig(layers=1, heads=2, embed=16, mlp=32, positions=24, pieces=400),
    text_length=24,
    embed=8,
    levels=2,
    codes=4,
)


def tones() -> np.ndarray:
    """Two clips for each caption, [8, 8000]."""
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
    """(objective, variables after 150 steps and finish, metrics of the first and the last step)."""
    task = objective.MuLanObjective(CONFIG, Captioned(vocabulary), vocabulary)
    batch = next(task.data.batches("train", 8, 0))
    variables = nn.unbox(jax.jit(task.init)(jax.random.key(0), batch))
    params, state = variables["params"], {"rvq": variables["rvq"]}

    @jax.jit
    def step(params):
        gradient = jax.value_and_grad(task.loss, has_aux=True)
        (_, (_, metrics)), slope = gradient(params, state, {}, batch, jax.random.key(0))
        norm = optax.tree.norm(slope)
        return jax.tree.map(lambda p, g: p - 0.1 * g / norm, params, slope), metrics

    seen = []
    for _ in range(150):
        params, metrics = step(params)
        seen.append(metrics)
    done = task.finish(
        {"params": params, **state}, {}, lambda: task.data.batches("train", 8, 0, epochs=1)
    )
    return task, done, seen[0], seen[-1]


use = jax.jit(mulan.MuLan(CONFIG).apply, static_argnames="method")


def mean_square(x):
    return np.square(x).sum(axis=-1).mean()


def test_leaves_chance_behind(trained):
    _, _, first, last = trained
    np.testing.assert_allclose(first["chance"], np.log(8), rtol=1e-6)
    assert first["loss"] > 1.0
    assert last["loss"] < 0.2
    assert last["recall_1"] == 1


def test_quantizer_is_fitted_to_audio_embeddings(trained):
    _, done, _, _ = trained
    embedding = use(done, tones(), method=mulan.MuLan.embed_audio)
    codebooks, codes = done["rvq"]["codebooks"], use(done, embedding, method=mulan.MuLan.quantize)
    np.testing.assert_allclose(codebooks, rvq.fit(jax.random.key(0), embedding, 2, 4), atol=1e-5)
    assert codes.shape == (8, 2) and len(np.unique(codes[:, 0])) == 4
    for code in range(4):
        np.testing.assert_allclose(
            codebooks[0, code], embedding[codes[:, 0] == code].mean(axis=0), atol=1e-5
        )
    left = [mean_square(embedding - rvq.dequantize(codebooks[:n], codes[:, :n])) for n in (1, 2)]
    assert left[1] < left[0] < 0.5 * mean_square(embedding - embedding.mean(axis=0, keepdims=True))


def test_clips_and_their_caption_get_one_code(trained):
    """From a start with a clip of each caption: a random one, as of two clips each here, may part a caption's clips."""
    task, done, _, _ = trained
    embedding = use(done, tones(), method=mulan.MuLan.embed_audio)
    start = jnp.stack([embedding[::2], (embedding[::2] - embedding[1::2]) / 2])
    fitted = {**done, "rvq": {"codebooks": rvq.fit(jax.random.key(0), embedding, 2, 4, start)}}
    codes = use(fitted, embedding, method=mulan.MuLan.quantize)
    np.testing.assert_array_equal(codes[::2, 0], codes[1::2, 0])
    assert len(np.unique(codes[:, 0])) == 4
    assert mean_square(embedding - rvq.dequantize(fitted["rvq"]["codebooks"], codes)) < 0.05
    text = use(done, jnp.asarray(task.data.text), method=mulan.MuLan.embed_text)
    np.testing.assert_array_equal(use(fitted, text, method=mulan.MuLan.quantize)[:, 0], codes[:, 0])


def test_more_codes_than_clips_is_named(trained):
    task, done, _, _ = trained
    greedy = dataclasses.replace(task, model=dataclasses.replace(CONFIG, codes=9))
    with pytest.raises(ValueError, match=r"codes = 9.*8 training clips"):
        greedy.finish(done, {}, lambda: task.data.batches("train", 8, 0, epochs=1))


def test_the_vocabulary_travels_and_must_fit(trained, tmp_path):
    task, _, _, _ = trained
    content = task.assets()["vocabulary"]
    assert sentencepiece.SentencePieceProcessor(model_proto=content).decode([5]) is not None
    small = objective.MuLanObjective(
        mulan.MuLanConfig(text=bert.BertConfig(pieces=100)), task.data, task.vocabulary
    )
    batch = next(task.data.batches("train", 8, 0))
    with pytest.raises(ValueError, match=r"BertConfig\.pieces = 100"):
        small.check(batch)
    with pytest.raises(ValueError, match=r"Clips\.vocabulary"):
        task.check({"audio": batch["audio"]})
    lost = objective.MuLanObjective(CONFIG, task.data, str(tmp_path / "none.model"))
    with pytest.raises(FileNotFoundError, match=r"none\.model"):
        lost.check(batch)


def test_towers_trained_from_nothing_are_said_to_be(trained, capsys):
    assert trained[0].frozen() == {}
    assert "MuLan's towers are trained from nothing" in capsys.readouterr().out


def test_the_batch_is_the_whole_meshes(trained):
    """Loss and gradient on one device and on eight, where each holds one clip and knows no negatives of its own."""
    task, done, _, _ = trained
    batch = next(task.data.batches("train", 8, 0))
    params, state = done["params"], {"rvq": done["rvq"]}
    found = []
    for devices in (1, 8):
        mesh = jax.sharding.Mesh(
            np.array(jax.devices()[:devices]).reshape(devices, 1, 1), ("data", "fsdp", "tensor")
        )
        arrays = sharding.put_batch(mesh, batch)
        assert len(arrays["audio"].sharding.device_set) == devices
        with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
            step = jax.jit(
                jax.value_and_grad(lambda p, b: task.loss(p, state, {}, b, jax.random.key(0))[0])
            )
            found.append(
                jax.device_get(step(jax.device_put(params, sharding.replicated(mesh)), arrays))
            )
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found[0][1], found[1][1])
