"""The mixture: its sum, its units and its checks."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from musicrl_jax.core import checkpoint
from musicrl_jax.rl.rewards import Mixture
from musicrl_jax.systems import folder, tiny
from musicrl_jax.systems.system import Rollout

BATCH = 3


@dataclasses.dataclass(frozen=True)
class Peak:
    """The largest sample: a user's own term."""

    name: str = "peak"
    low: float = 0.0
    high: float = 1.0
    licence: str = "none needed"

    def load(self, read=checkpoint.load_model):
        return checkpoint.Model(None, {}, "5e3d", {})

    def windows(self, model):
        return "all"

    def lineage(self, model):
        return model.json_asset(checkpoint.LINEAGE, {str: str}, default={})

    def read(self, model, prompts):
        return {"length": np.array([len(prompt) for prompt in prompts], np.int32)}

    def score(self, model, variables, rollout, text):
        assert text["length"].shape == rollout.mono.shape[:1]
        return rollout.mono.max(axis=-1)


# --- scores ---


def scored(mixture, wav):
    """Returns scores of clips f32 [B, C, N], and their weighted sum."""
    loaded = mixture.load()
    rollout, texts = Rollout((), None, (), jnp.asarray(wav)), loaded.read(["a tune"] * len(wav))
    scores = loaded.score(loaded.variables, rollout, texts)
    return scores, loaded.total(scores, loaded.units(scores))


def test_the_mixture_is_the_weighted_sum_of_its_terms():
    stereo = np.random.default_rng(0).uniform(size=(BATCH, 2, 100)).astype(np.float32)
    mixture = Mixture((Peak("peak"), Peak("second")), {"peak": 0.25, "second": -2.0})
    scores, total = scored(mixture, stereo)
    peak = stereo.mean(axis=1).max(axis=1)
    np.testing.assert_array_equal(scores["peak"], peak)
    np.testing.assert_allclose(total, -1.75 * peak, rtol=1e-6)
    assert total.dtype == jnp.float32 and total.shape == (BATCH,)


@pytest.mark.exactness(12)
def test_small_differences_between_rewards_survive():
    wav = np.linspace(0.1, 0.9, 9, dtype=np.float32)[:, None, None] * np.ones((9, 1, 4), np.float32)
    _, total = scored(Mixture((Peak(),), {"peak": 1.0}), wav)
    np.testing.assert_allclose(total, np.linspace(0.1, 0.9, 9), atol=1e-6)


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
def test_a_term_with_one_score_cannot_be_normalised(scores):
    loaded = Mixture((Peak(),), {"peak": 1.0}, normalise=True).load()
    with pytest.raises(ValueError, match=r"reward peak has one score for all of \d clips"):
        loaded.units({"peak": np.array(scores)})


def test_a_mixture_describes_its_terms():
    described = Mixture((Peak(),), {"peak": 0.5}).load().describe()
    assert described == {
        "peak": {
            "weight": 0.5,
            "range": ["0.0", "1.0"],
            "windows": "all",
            "licence": "none needed",
            "hash": "5e3d",
        }
    }


# --- models ---


@dataclasses.dataclass(frozen=True)
class Reading(Peak):
    """A term with a model."""

    model: checkpoint.Model = None

    def load(self, read=checkpoint.load_model):
        return self.model


@dataclasses.dataclass(frozen=True)
class Config:
    """Config of a model with a sample rate."""

    sample_rate_hz: int


@pytest.mark.parametrize(
    ("config", "lineage", "complaint"),
    [
        (None, {"codec": "c0", "mulan": "a1"}, None),
        (None, {"codec": "c1"}, "peak reads tokens of codec c1, and the policy's are of c0"),
        (None, {"mulan": "beef"}, "peak reads tokens of mulan beef, and the policy's are of a1"),
        (None, {"another": "beef"}, None),
        (Config(16_000), {}, None),
        (Config(24_000), {}, "peak needs 24000 Hz, and the codec decodes at 16000 Hz"),
    ],
)
def test_a_model_for_another_system_is_refused(config, lineage, complaint):
    assets = {checkpoint.LINEAGE: json.dumps(lineage).encode()}
    model = checkpoint.Model(config, {}, "beef", assets)
    hashes = {"codec": "c0", "mulan": "a1", "semantic": "5e"}
    system = tiny.TinySystem(tiny.TinyConfig())
    loaded = folder.LoadedSystem("tiny", system, {}, {}, {}, {}, hashes, None, None)
    mixture = Mixture((Reading(model=model),), {"peak": 1.0}).load()
    if complaint is None:
        mixture.check_models(loaded)
    else:
        with pytest.raises(ValueError, match=f"the model of reward {complaint}"):
            mixture.check_models(loaded)


# --- ranges and settings ---


@pytest.mark.parametrize("value", [-0.01, 1.01])
def test_a_score_out_of_its_range_is_named(value):
    loaded = Mixture((Peak(),), {"peak": 1.0}).load()
    loaded.check({"peak": np.array([0.0, 0.5, 1.0])})
    loaded.check({"peak": np.array([0.5, np.nan, np.inf, -np.inf])})  # the update skips these
    with pytest.raises(ValueError, match=r"reward peak is .*, outside \[0.0, 1.0\]"):
        loaded.check({"peak": np.array([0.5, value])})


@pytest.mark.parametrize(
    ("terms", "weights", "complaint"),
    [
        ((), {}, r"Mixture\.terms is empty"),
        ((Peak(), Peak()), {"peak": 1.0}, r"Mixture\.terms has a name twice"),
        ((Peak(),), {"peak": np.nan}, r"Mixture\.weights\['peak'\] = nan must be finite"),
        ((Peak(),), {}, r"Mixture\.weights is for"),
        ((Peak(),), {"peek": 1.0}, r"Mixture\.weights is for"),
        ((Peak(),), {"peak": 1.0, "quality": 1.0}, r"Mixture\.weights is for"),
    ],
)
def test_a_wrong_mixture_is_refused(terms, weights, complaint):
    with pytest.raises(ValueError, match=complaint):
        Mixture(terms, weights)
