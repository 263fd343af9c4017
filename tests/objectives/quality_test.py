"""Training the quality regressor: labels, ratings, the codec's levels, metrics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kendalltau

from musicrl_jax.core import checkpoint
from musicrl_jax.models import resnet, rewards, soundstream
from musicrl_jax.objectives import degradations
from musicrl_jax.objectives import quality as objective

CONFIG = rewards.QualityConfig(16_000, 1.0, resnet.ResNetConfig(mels=16, widths=(4,), blocks=1))
CODEC = soundstream.SoundStreamConfig(16_000, (4, 4), channels=2, embed=4, levels=3, codes=8)


def clips(count: int = 8) -> np.ndarray:
    return (0.2 * np.random.default_rng(0).normal(size=(count, 8000))).astype(np.float32)


def untrained(config):
    """A codec as it would come from disk."""
    variables = jax.jit(soundstream.SoundStream(config).init)(
        jax.random.key(0), clips(1), jax.random.key(1)
    )
    return objective.Codec(variables, config)


@pytest.fixture(scope="module")
def codec():
    return untrained(CODEC)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(rewards.Quality(CONFIG).init)(jax.random.key(0), clips(1))


@pytest.mark.parametrize(
    ("code_width", "atol"), [(None, 1e-5), (2, 1e-2)]
)  # the second decodes to some thousands
def test_dropped_levels_equal_decoding_fewer(code_width, atol):
    codec, wav = untrained(dataclasses.replace(CODEC, code_width=code_width)), clips(3)
    module = soundstream.SoundStream(codec.config)
    got = jax.jit(objective.through(codec))(wav, jnp.array([0.0, 0.4, 1.0]))
    codes = jax.jit(lambda v, w: module.apply(v, w, method=soundstream.SoundStream.encode))(
        codec.variables, wav
    )
    for row, levels in enumerate((3, 2, 1)):
        alone = module.apply(
            codec.variables, codes[row : row + 1, :, :levels], method=soundstream.SoundStream.decode
        )
        np.testing.assert_allclose(got[row], alone[0], atol=atol)


def test_labels_are_the_pseudo_mos_of_what_is_heard(codec, variables):
    task = objective.QualityObjective(CONFIG, None, "codec")
    key = jax.random.key(5)
    wav = clips()
    loss, (_, metrics) = jax.jit(task.loss)(variables["params"], {}, codec, {"audio": wav}, key)
    damage_key, strength_key = jax.random.split(key)
    strength = jax.random.uniform(strength_key, (8,))
    through = objective.through(codec)
    heard = jax.jit(lambda w, s: degradations.degrade(damage_key, w, s, 16_000, through))(
        wav, strength
    )
    coded = jax.jit(through)(
        heard[4:], jnp.zeros(4)
    )  # the second half then goes through the whole codec
    heard = jnp.concatenate([heard[:4], coded])
    label = np.asarray(jax.jit(degradations.pseudo_mos, static_argnums=2)(wav, heard, 16_000))
    guess = np.asarray(jax.jit(rewards.Quality(CONFIG).apply)(variables, heard))
    assert label[0] == 5
    assert np.all(label[1:] < 5)
    np.testing.assert_allclose(loss, np.mean((guess - label) ** 2), rtol=1e-4)
    np.testing.assert_allclose(metrics["mae"], np.abs(guess - label).mean(), rtol=1e-4)


def test_evaluation_compares_each_clip_with_its_clean_self(codec, variables):
    task = objective.QualityObjective(CONFIG, None, "codec")
    metrics = jax.jit(task.evaluate)(
        variables["params"], {}, codec, {"audio": clips()}, jax.random.key(5)
    )
    assert set(metrics) == {"loss", "mae", "order", "clean_first"}
    assert 0 <= metrics["clean_first"] <= 1
    np.testing.assert_allclose(
        metrics["clean_first"] * 7 % 1, 0, atol=1e-5
    )  # all but the first are damaged


def test_ratings_are_taken_as_they_are(variables):
    task = objective.QualityObjective(CONFIG, None)
    batch = {"audio": clips(), "score": np.linspace(1, 5, 8).astype(np.float32)}
    assert task.frozen() == {}
    task.init(jax.random.key(0), batch)
    loss, (_, metrics) = jax.jit(task.loss)(variables["params"], {}, {}, batch, jax.random.key(5))
    guess = np.asarray(jax.jit(rewards.Quality(CONFIG).apply)(variables, batch["audio"]))
    np.testing.assert_allclose(loss, np.mean((guess - batch["score"]) ** 2), rtol=1e-5)
    assert set(task.evaluate(variables["params"], {}, {}, batch, jax.random.key(5))) == set(metrics)


def test_order_is_kendalls_tau():
    rng = np.random.default_rng(1)
    guess, score = rng.normal(size=30), rng.normal(size=30)
    expected = (kendalltau(guess, score).statistic + 1) / 2
    np.testing.assert_allclose(
        objective.order(jnp.asarray(guess), jnp.asarray(score)), expected, rtol=1e-5
    )
    assert objective.order(jnp.zeros(4), jnp.arange(4.0)) == 0  # equal guesses order nothing


def test_neither_ratings_nor_codec_is_named():
    task = objective.QualityObjective(CONFIG, None)
    with pytest.raises(ValueError, match=r"codec = ''.*inputs\.Ratings"):
        task.init(jax.random.key(0), {"audio": clips()})


def test_codec_comes_from_its_folder(codec, tmp_path):
    checkpoint.save_model(tmp_path / "codec", CODEC, codec.variables)
    found = objective.QualityObjective(CONFIG, None, str(tmp_path / "codec")).frozen()
    jax.tree.map(np.testing.assert_array_equal, found.variables, codec.variables)
    assert found.config == CODEC
    other = rewards.QualityConfig(24_000, 1.0, CONFIG.network)
    with pytest.raises(ValueError, match=r"16000 Hz.*24000"):
        objective.QualityObjective(other, None, str(tmp_path / "codec")).frozen()
    with pytest.raises(FileNotFoundError, match="none"):
        objective.QualityObjective(CONFIG, None, str(tmp_path / "none")).frozen()
