"""The mixture: its sum, its checks, and the two terms against NumPy on what their models say."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta

from musicrl_jax.core import checkpoint
from musicrl_jax.models.tokens import TokenLayout
from musicrl_jax.models.bert import BertConfig
from musicrl_jax.models.mulan import MuLan, MuLanConfig
from musicrl_jax.models.musiclm import MusicLMConfig
from musicrl_jax.models.resnet import ResNetConfig
from musicrl_jax.models.rewards import Preference, PreferenceConfig, Quality, QualityConfig
from musicrl_jax.models.transformer import TransformerConfig
from musicrl_jax.rl.rewards import AcousticQuality, Mixture, TextAdherence, UserPreference
from musicrl_jax.rl.rollout import Rollout

BATCH, SAMPLES = 3, 8000
TOWER = ResNetConfig(mels=16, widths=(4, 8), blocks=1)


@dataclasses.dataclass(frozen=True)
class Peak:
    """The largest sample: a user's own term."""

    name: str = "peak"
    low: float = 0.0
    high: float = 1.0
    licence: str = "none needed"

    def load(self):
        return checkpoint.Model(None, {}, "5e3d", {})

    def windows(self, model):
        return "all"

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
    scores = loaded.score(loaded.variables, rolled(wav))
    total = loaded.total(scores, loaded.units(scores))
    peak = np.asarray(wav).max(axis=1)
    np.testing.assert_array_equal(scores["peak"], peak)
    np.testing.assert_allclose(total, -1.75 * peak, rtol=1e-6)
    assert total.dtype == jnp.float32 and total.shape == (BATCH,)


@pytest.mark.exactness(12)
def test_small_differences_between_rewards_survive():
    wav = jnp.linspace(0.1, 0.9, 9)[:, None] * jnp.ones((9, 4))
    loaded = Mixture((Peak(),), {"peak": 1.0}).load()
    scores = loaded.score(loaded.variables, rolled(wav))
    np.testing.assert_allclose(loaded.total(scores, loaded.units(scores)), np.linspace(0.1, 0.9, 9), atol=1e-6)


def test_normalised_terms_count_alike_whatever_their_scale():
    terms = Peak("loud", high=np.inf), Peak("soft")
    loaded = Mixture(terms, {"loud": 1.0, "soft": 2.0}, normalise=True).load()
    peak = np.array([0.1, 0.4, 0.3], np.float32)
    base = {"loud": 1000 * np.array([*peak, np.nan]), "soft": peak + 5}
    units = loaded.units(base)
    assert units["loud"] == pytest.approx((1000 * peak.mean(), 1000 * peak.std()), rel=1e-5)
    scores = {"loud": jnp.asarray(1000 * peak), "soft": jnp.asarray(peak + 5)}
    expected = 3 * (peak - peak.mean()) / peak.std()
    np.testing.assert_allclose(loaded.total(scores, units), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scores", [[0.5, 0.5, 0.5], [0.5, np.nan], [np.inf, np.nan]])
def test_a_term_that_never_moves_cannot_be_normalised(scores):
    loaded = Mixture((Peak(),), {"peak": 1.0}, normalise=True).load()
    with pytest.raises(ValueError, match=r"reward peak is the same for all of \d clips of the base"):
        loaded.units({"peak": np.array(scores)})


def test_a_mixture_declares_what_its_terms_are():
    declared = Mixture((Peak(),), {"peak": 0.5}).load().describe()
    assert declared == {
        "peak": {"weight": 0.5, "range": ["0.0", "1.0"], "windows": "all", "licence": "none needed", "hash": "5e3d"}
    }


def rows(x, starts, length):
    """The windows of a clip that NumPy cuts: x [B, N, ...] -> a list of [B, length, ...]."""
    return [np.asarray(x)[:, start : start + length] for start in starts]


# Samples of a clip and where its windows of 0.25 s begin: MusicRL's 3 x 10 s, scaled; some that overlap; and one.
@pytest.mark.exactness(18)
@pytest.mark.parametrize(
    ("samples", "starts"), [(12_000, [0, 4000, 8000]), (10_000, [0, 3000, 6000]), (4000, [0]), (3200, [0])]
)
def test_text_adherence_is_the_mean_of_the_windows_cosines(wav, samples, starts):
    text_tower = BertConfig(layers=1, heads=2, embed=16, mlp=32, positions=8, pieces=40)
    config = MuLanConfig(16_000, 0.25, TOWER, text_tower, text_length=8, embed=4, levels=2, codes=4)
    text = jnp.array([[3, 4, 0], [5, 6, 7], [8, 0, 0]], jnp.int32)
    wav = jnp.tile(wav, (1, 2))[:, :samples]
    variables = meta.unbox(MuLan(config).init(jax.random.key(1), wav, text))
    parts = [MuLan(config).apply(variables, part, text)[:2] for part in rows(wav, starts, 4000)]
    cosines = []
    for audio, prompt in np.asarray(parts, np.float64):
        cosines.append((audio * prompt).sum(1) / np.linalg.norm(audio, axis=1) / np.linalg.norm(prompt, axis=1))
    scores = TextAdherence("unread", "").score(config, variables, rolled(wav, parts[0][1]))
    np.testing.assert_allclose(scores, np.mean(cosines, axis=0), atol=1e-6)


# Shorter than two windows they overlap; up to one there is one.
@pytest.mark.exactness(18)
@pytest.mark.parametrize(("samples", "starts"), [(8000, [0, 4000]), (5000, [0, 1000]), (4000, [0]), (3200, [0])])
def test_acoustic_quality_is_that_of_the_first_and_the_last_window(wav, samples, starts):
    config = QualityConfig(sample_rate_hz=16_000, window_seconds=0.25, network=TOWER)
    wav = wav[:, :samples]
    variables = meta.unbox(Quality(config).init(jax.random.key(2), wav))
    mos = np.mean([Quality(config).apply(variables, part) for part in rows(wav, starts, 4000)], axis=0)
    scores = AcousticQuality("unread", "").score(config, variables, rolled(wav))
    np.testing.assert_allclose(scores, (mos - 1) / 4, rtol=1e-6)
    assert (np.asarray(scores) > 0).all() and (np.asarray(scores) < 1).all()


@pytest.mark.exactness(18)
@pytest.mark.parametrize(("frames", "starts"), [(20, [0, 10]), (13, [0, 3]), (10, [0]), (7, [0])])
def test_user_preference_is_that_of_the_first_and_the_last_window(frames, starts):
    size = TransformerConfig(1, 8, 2, 8, dropout=0.0)
    config = PreferenceConfig(MusicLMConfig(size, size, TokenLayout(6, 6, 1), 2, 4), window_seconds=0.4)
    tokens = jax.random.randint(jax.random.key(3), (BATCH, frames, 3), 0, 6)
    mulan = jax.random.randint(jax.random.key(4), (BATCH, 2), 0, 4)
    variables = meta.unbox(Preference(config).init(jax.random.key(5), tokens, mulan))
    kernel = jax.random.normal(jax.random.key(6), variables["params"]["score"]["kernel"].shape)  # starts at 0
    variables["params"]["score"]["kernel"] = kernel
    expected = np.mean([Preference(config).apply(variables, part, mulan) for part in rows(tokens, starts, 10)], axis=0)
    rollout = rolled(jnp.zeros((BATCH, 8))).replace(tokens=tokens, mulan=mulan)
    scores = UserPreference("unread", "").score(config, variables, rollout)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
    assert np.std(scores) > 1e-3


@dataclasses.dataclass(frozen=True)
class Reading(Peak):
    """A term whose model belongs to others, or hears at a rate."""

    model: checkpoint.Model = None

    def load(self):
        return self.model


@pytest.mark.parametrize(
    ("config", "read", "complaint"),
    [
        (None, {"codec": "c0", "mulan": "a1"}, None),
        (None, {"codec": "c1"}, "reward peak works with codec c1, and the policy speaks the tokens of c0"),
        (MuLanConfig(16_000), {}, "reward peak works with mulan beef, and the policy speaks the tokens of a1"),
        (QualityConfig(16_000), {}, None),
        (QualityConfig(24_000), {}, "reward peak hears at 24000 Hz, and the codec decodes at 16000 Hz"),
    ],
)
def test_a_model_of_others_is_refused(config, read, complaint):
    model = checkpoint.Model(config, {}, "beef", {"tokens.json": json.dumps(read).encode()})
    studio = types.SimpleNamespace(sample_rate_hz=16_000)
    loaded = types.SimpleNamespace(studio=studio, lineage=b'{"codec": "c0", "mulan": "a1", "semantic": "5e"}')
    mixture = Mixture((Reading(model=model),), {"peak": 1.0}).load()
    if complaint is None:
        mixture.check_models(loaded)
    else:
        with pytest.raises(ValueError, match=complaint):
            mixture.check_models(loaded)


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


def test_a_mixture_of_nothing_or_of_no_number_is_refused():
    with pytest.raises(ValueError, match=r"Mixture\.terms is empty"):
        Mixture((), {})
    with pytest.raises(ValueError, match=r"Mixture\.weights\['peak'\] = nan must be finite"):
        Mixture((Peak(),), {"peak": np.nan})


@pytest.mark.parametrize("weights", [{}, {"peek": 1.0}, {"peak": 1.0, "quality": 1.0}])
def test_weights_that_are_not_the_terms_are_refused(weights):
    with pytest.raises(ValueError, match=r"Mixture\.weights is for"):
        Mixture((Peak(),), weights)
