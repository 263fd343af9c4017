"""Training the quality regressor: labels, ratings, the codec's levels, metrics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kendalltau

from musicrl_jax.core import checkpoint
from musicrl_jax.models.resnet import ResNetConfig
from musicrl_jax.models.rewards import Quality, QualityConfig
from musicrl_jax.models.soundstream import SoundStream, SoundStreamConfig
from musicrl_jax.objectives import degradations
from musicrl_jax.objectives.quality import Codec, QualityObjective, order

CONFIG = QualityConfig(16_000, 0.25, ResNetConfig(mels=16, widths=(4,), blocks=1))
CODEC = SoundStreamConfig(16_000, (4, 4), channels=2, embed=4, levels=3, codes=8)
KEY = jax.random.key(5)
WAV = (0.2 * np.random.default_rng(0).normal(size=(8, 4000))).astype(np.float32)
RATED = {"audio": WAV, "score": np.linspace(1, 5, 8).astype(np.float32)}
PSEUDO = QualityObjective(CONFIG, None, "codec")

score = jax.jit(Quality(CONFIG).apply)


# --- models ---


def random_codec(config):
    keys = jax.random.key(0), jax.random.key(1)
    return Codec(jax.jit(SoundStream(config).init)(keys[0], WAV[:1], keys[1]), config)


@pytest.fixture(scope="module")
def codec():
    return random_codec(CODEC)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(Quality(CONFIG).init)(jax.random.key(0), WAV[:1])


@pytest.fixture(scope="module")
def results(codec, variables):
    """Returns the loss of damaged clips, its metrics and those of the evaluation."""

    @jax.jit
    def compute(*arguments):
        loss, (_, metrics) = PSEUDO.loss(*arguments)
        return loss, metrics, PSEUDO.evaluate(*arguments)

    return compute(variables["params"], {}, codec, {"audio": WAV}, KEY)


# --- labels ---


# The second codec decodes to some thousands.
@pytest.mark.parametrize(("code_width", "atol"), [(None, 1e-5), (2, 1e-2)])
def test_dropped_levels_equal_decoding_fewer(codec, code_width, atol):
    if code_width is not None:
        codec = random_codec(dataclasses.replace(CODEC, code_width=code_width))
    module = SoundStream(codec.config)

    @jax.jit
    def decode_fewer(variables, wav):
        codes = module.apply(variables, wav, method=SoundStream.encode)
        decode = [
            module.apply(variables, codes[row : row + 1, :, :levels], method=SoundStream.decode)
            for row, levels in enumerate((3, 2, 1))
        ]
        return jnp.concatenate(decode)

    fewer = decode_fewer(codec.variables, WAV[:3])
    dropped = jax.jit(codec.reconstruct)(WAV[:3], jnp.array([0.0, 0.4, 1.0]))
    np.testing.assert_allclose(dropped, fewer, atol=atol)


def test_labels_are_the_pseudo_mos_of_the_damaged_clips(codec, variables, results):
    @jax.jit
    def labelled(codec, wav):
        damage_key, strength_key = jax.random.split(KEY)
        strength = jax.random.uniform(strength_key, (8,))
        damaged = degradations.degrade(damage_key, wav, strength, 16_000, codec.reconstruct)
        # The second half then goes through the whole codec.
        decoded = codec.reconstruct(damaged[4:], jnp.zeros(4))
        damaged = jnp.concatenate([damaged[:4], decoded])
        return damaged, degradations.pseudo_mos(wav, damaged, 16_000)

    loss, metrics, _ = results
    damaged, label = labelled(codec, WAV)
    prediction, label = np.asarray(score(variables, damaged)), np.asarray(label)
    assert label[0] == 5 and np.all(label[1:] < 5)
    np.testing.assert_allclose(loss, np.mean((prediction - label) ** 2), rtol=1e-4)
    np.testing.assert_allclose(metrics["mae"], np.abs(prediction - label).mean(), rtol=1e-4)


def test_evaluation_compares_each_clip_with_its_clean_version(results):
    metrics = results[2]
    assert set(metrics) == {"loss", "mae", "order", "clean_first"}
    assert 0 <= metrics["clean_first"] <= 1
    # All clips but the first are damaged.
    np.testing.assert_allclose(metrics["clean_first"] * 7 % 1, 0, atol=1e-5)


# --- ratings, metrics and the codec ---


def test_ratings_are_used_unchanged(variables):
    objective = QualityObjective(CONFIG, None)
    assert objective.frozen() == {}
    jax.eval_shape(objective.init, KEY, RATED)
    arguments = variables["params"], {}, {}, RATED, KEY
    loss, (_, metrics) = jax.jit(objective.loss)(*arguments)
    prediction = np.asarray(score(variables, WAV))
    np.testing.assert_allclose(loss, np.mean((prediction - RATED["score"]) ** 2), rtol=1e-5)
    assert set(jax.eval_shape(objective.evaluate, *arguments)) == set(metrics)


def test_order_is_kendalls_tau():
    prediction, truth = np.random.default_rng(1).normal(size=(2, 30))
    expected = (kendalltau(prediction, truth).statistic + 1) / 2
    np.testing.assert_allclose(
        order(jnp.asarray(prediction), jnp.asarray(truth)), expected, rtol=1e-5
    )
    assert order(jnp.zeros(4), jnp.arange(4.0)) == 0  # equal predictions order nothing


def test_neither_ratings_nor_codec_is_an_error():
    with pytest.raises(ValueError, match=r"codec = ''.*inputs\.Ratings"):
        QualityObjective(CONFIG, None).init(KEY, {"audio": WAV})


def test_the_codec_is_read_from_its_folder(codec, tmp_path):
    folder = str(tmp_path / "codec")
    checkpoint.save_model(folder, CODEC, codec.variables)
    loaded = QualityObjective(CONFIG, None, folder).frozen()
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, codec.variables)
    assert loaded.config == CODEC
    with pytest.raises(ValueError, match=r"16000 Hz.*24000"):
        other = dataclasses.replace(CONFIG, sample_rate_hz=24_000)
        QualityObjective(other, None, folder).frozen()
    with pytest.raises(FileNotFoundError, match="none"):
        QualityObjective(CONFIG, None, str(tmp_path / "none")).frozen()
