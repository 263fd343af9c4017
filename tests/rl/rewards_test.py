"""The mixture: its sum, its checks, and the two terms against NumPy on what their models say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta

from musicrl_jax.core import checkpoint
from musicrl_jax.models.bert import BertConfig
from musicrl_jax.models.mulan import MuLan, MuLanConfig
from musicrl_jax.models.resnet import ResNetConfig
from musicrl_jax.models.rewards import Quality, QualityConfig
from musicrl_jax.rl.rewards import AcousticQuality, Mixture, TextAdherence
from musicrl_jax.rl.rollout import Rollout

BATCH, SAMPLES = 3, 8000
TOWER = ResNetConfig(mels=16, widths=(4, 8), blocks=1)


@dataclasses.dataclass(frozen=True)
class Peak:
    """The largest sample: a user's own term."""

    name: str = "peak"
    low: float = 0.0
    high: float = 1.0

    def load(self):
        return checkpoint.Model(None, {}, "none", {})

    def score(self, model, variables, rollout):
        return rollout.wav.max(axis=-1)


def rolled(wav, embedding=None):
    zeros = jnp.zeros((len(wav), 1), jnp.int32)
    embedding = jnp.zeros((len(wav), 4)) if embedding is None else embedding
    return Rollout(
        zeros, embedding, zeros, zeros[:, :, None], jnp.zeros((len(wav), 1, 1)), None, zeros[:, :, None], wav
    )


@pytest.fixture(scope="module")
def wav():
    return jnp.asarray(np.random.default_rng(0).uniform(-0.5, 0.5, (BATCH, SAMPLES)).astype(np.float32))


def test_the_mixture_is_the_weighted_sum_of_its_terms(wav):
    terms = Peak("peak"), Peak("second")
    loaded = Mixture(terms, {"peak": 0.25, "second": -2.0}).load()
    total, scores = loaded.score(loaded.variables, rolled(wav))
    peak = np.asarray(wav).max(axis=1)
    np.testing.assert_array_equal(scores["peak"], peak)
    np.testing.assert_allclose(total, -1.75 * peak, rtol=1e-6)
    assert total.dtype == jnp.float32 and total.shape == (BATCH,)


def test_small_differences_between_rewards_survive():
    wav = jnp.linspace(0.1, 0.9, 9)[:, None] * jnp.ones((9, 4))
    loaded = Mixture((Peak(),), {"peak": 1.0}).load()
    total, _ = loaded.score(loaded.variables, rolled(wav))
    np.testing.assert_allclose(total, np.linspace(0.1, 0.9, 9), atol=1e-6)


def test_text_adherence_is_the_cosine_of_prompt_and_clip(wav):
    text_tower = BertConfig(layers=1, heads=2, embed=16, mlp=32, positions=8, pieces=40)
    config = MuLanConfig(16_000, 10.0, TOWER, text_tower, text_length=8, embed=4, levels=2, codes=4)
    text = jnp.array([[3, 4, 0], [5, 6, 7], [8, 0, 0]], jnp.int32)
    variables = meta.unbox(MuLan(config).init(jax.random.key(1), wav, text))
    audio, prompt, _ = MuLan(config).apply(variables, wav, text)
    scores = TextAdherence("unread").score(config, variables, rolled(wav, prompt))
    audio, prompt = np.asarray(audio, np.float64), np.asarray(prompt, np.float64)
    cosine = (audio * prompt).sum(1) / np.linalg.norm(audio, axis=1) / np.linalg.norm(prompt, axis=1)
    np.testing.assert_allclose(scores, cosine, atol=1e-6)


def test_acoustic_quality_takes_one_to_five_to_zero_to_one(wav):
    config = QualityConfig(sample_rate_hz=16_000, window_seconds=0.25, network=TOWER)
    variables = meta.unbox(Quality(config).init(jax.random.key(2), wav))
    mos = np.asarray(Quality(config).apply(variables, wav))
    scores = AcousticQuality("unread").score(config, variables, rolled(wav))
    np.testing.assert_allclose(scores, (mos - 1) / 4, rtol=1e-6)
    assert (np.asarray(scores) > 0).all() and (np.asarray(scores) < 1).all()


@pytest.mark.parametrize("value", [-0.01, 1.01])
def test_a_score_out_of_its_range_is_named(value):
    loaded = Mixture((Peak(),), {"peak": 1.0}).load()
    loaded.check({"peak": np.array([0.0, 0.5, 1.0])})
    with pytest.raises(ValueError, match=r"reward peak is .*, outside \[0.0, 1.0\]"):
        loaded.check({"peak": np.array([0.5, value])})


def test_a_score_that_is_not_finite_is_left_to_the_update():
    Mixture((Peak(),), {"peak": 1.0}).load().check({"peak": np.array([0.5, np.nan, np.inf, -np.inf])})


def test_a_term_named_twice_is_refused():
    with pytest.raises(ValueError, match="names a reward twice"):
        Mixture((Peak(), Peak()), {"peak": 1.0})


@pytest.mark.parametrize("weights", [{}, {"peek": 1.0}, {"peak": 1.0, "quality": 1.0}])
def test_weights_that_are_not_the_terms_are_refused(weights):
    with pytest.raises(ValueError, match=r"Mixture\.weights is for"):
        Mixture((Peak(),), weights)
