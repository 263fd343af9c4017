"""The mixture: its sum, its units and its checks, on clips of the tiny system."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musicrl_jax.core import checkpoint
from musicrl_jax.core.keys import row_keys
from musicrl_jax.rl.rewards import Mixture
from musicrl_jax.systems import folder, tiny
from musicrl_jax.systems.player import roll_out
from musicrl_jax.systems.system import Rollout, Sampling, Weights

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


def rolled(wav):
    """A rollout of which its sound alone matters."""
    return Rollout((), None, (), wav[:, None])


def texts(loaded, count=BATCH):
    return loaded.read(["a tune"] * count)


@pytest.fixture(scope="module")
def rollout(tmp_path_factory):
    """Three clips of the tiny system in stereo."""
    loaded = folder.load(tiny.write(tmp_path_factory.mktemp("base"), tiny.TinyConfig(channels=2)))
    text = loaded.system.read(["a tune", "a song", "a hymn"])
    keys = row_keys(jax.random.key(0), BATCH)
    weights = jax.device_put(Weights(loaded.policy, loaded.frozen))
    return roll_out(loaded.system, weights, text, keys, 8, Sampling())


def test_the_mixture_is_the_weighted_sum_of_its_terms(rollout):
    terms = Peak("peak"), Peak("second")
    loaded = Mixture(terms, {"peak": 0.25, "second": -2.0}).load()
    scores = loaded.score(loaded.variables, rollout, texts(loaded))
    total = loaded.total(scores, loaded.units(scores))
    peak = np.asarray(rollout.wav).mean(axis=1).max(axis=1)
    np.testing.assert_array_equal(scores["peak"], peak)
    np.testing.assert_allclose(total, -1.75 * peak, rtol=1e-6)
    assert total.dtype == jnp.float32 and total.shape == (BATCH,)


@pytest.mark.exactness(12)
def test_small_differences_between_rewards_survive():
    wav = jnp.linspace(0.1, 0.9, 9)[:, None] * jnp.ones((9, 4))
    loaded = Mixture((Peak(),), {"peak": 1.0}).load()
    scores = loaded.score(loaded.variables, rolled(wav), texts(loaded, 9))
    np.testing.assert_allclose(
        loaded.total(scores, loaded.units(scores)), np.linspace(0.1, 0.9, 9), atol=1e-6
    )


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
    with pytest.raises(
        ValueError, match=r"reward peak is the same for all of \d clips of the base"
    ):
        loaded.units({"peak": np.array(scores)})


def test_a_mixture_declares_what_its_terms_are():
    declared = Mixture((Peak(),), {"peak": 0.5}).load().describe()
    assert declared == {
        "peak": {
            "weight": 0.5,
            "range": ["0.0", "1.0"],
            "windows": "all",
            "licence": "none needed",
            "hash": "5e3d",
        }
    }


@dataclasses.dataclass(frozen=True)
class Reading(Peak):
    """A term whose model belongs to others, or hears at a rate."""

    model: checkpoint.Model = None

    def load(self, read=checkpoint.load_model):
        return self.model


@dataclasses.dataclass(frozen=True)
class Hearing:
    """Config of a model that hears at a rate."""

    sample_rate_hz: int


@pytest.mark.parametrize(
    ("config", "lineage", "complaint"),
    [
        (None, {"codec": "c0", "mulan": "a1"}, None),
        (None, {"codec": "c1"}, "peak works with codec c1, and the policy speaks the tokens of c0"),
        (None, {"mulan": "beef"}, "peak works with mulan beef, and the policy speaks .* of a1"),
        (None, {"another": "beef"}, None),
        (Hearing(16_000), {}, None),
        (Hearing(24_000), {}, "peak hears at 24000 Hz, and the codec decodes at 16000 Hz"),
    ],
)
def test_a_model_of_others_is_refused(config, lineage, complaint):
    assets = {checkpoint.LINEAGE: json.dumps(lineage).encode()}
    model = checkpoint.Model(config, {}, "beef", assets)
    spoken = {"codec": "c0", "mulan": "a1", "semantic": "5e"}
    system = tiny.TinySystem(tiny.TinyConfig())
    loaded = folder.LoadedSystem("tiny", system, {}, {}, {}, {}, spoken, None, None)
    mixture = Mixture((Reading(model=model),), {"peak": 1.0}).load()
    if complaint is None:
        mixture.check_models(loaded)
    else:
        with pytest.raises(ValueError, match=f"the model of reward {complaint}"):
            mixture.check_models(loaded)


@pytest.mark.parametrize("value", [-0.01, 1.01])
def test_a_score_out_of_its_range_is_named(value):
    loaded = Mixture((Peak(),), {"peak": 1.0}).load()
    loaded.check({"peak": np.array([0.0, 0.5, 1.0])})
    with pytest.raises(ValueError, match=r"reward peak is .*, outside \[0.0, 1.0\]"):
        loaded.check({"peak": np.array([0.5, value])})


def test_a_score_that_is_not_finite_is_left_to_the_update():
    Mixture((Peak(),), {"peak": 1.0}).load().check(
        {"peak": np.array([0.5, np.nan, np.inf, -np.inf])}
    )


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
