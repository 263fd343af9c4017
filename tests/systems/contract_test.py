"""Every registered system keeps the contract of `systems/system.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_musiclm
from flax.core import meta
from scipy.special import rel_entr
from scipy.stats import kstest

from musicrl_jax.core import sharding
from musicrl_jax.core.keys import row_keys
from musicrl_jax.systems import folder, tiny
from musicrl_jax.systems.musiclm import MuLanCondition
from musicrl_jax.systems.player import roll_out
from musicrl_jax.systems.sampling import Beginning, Sampling
from musicrl_jax.systems.system import Weights

BATCH, FRAMES = 4, 5
SAMPLINGS = (Sampling(0.9), Sampling(1.3, top_k=3))
# The condition of each system for four prompts.
CONDITIONS = {
    "tiny": jnp.arange(4, dtype=jnp.int32),
    "musiclm": MuLanCondition(
        jnp.full((4, 8), 8**-0.5),
        jnp.array([[0, 1, 2], [3, 2, 1], [0, 0, 0], [2, 3, 3]], jnp.int32),
    ),
}


class Case:
    """A system, the weights of two policies, and clips of the first one with their scores."""

    def __init__(self, kind, directory):
        if kind == "tiny":
            loaded = folder.load(tiny.write(directory / kind))
            self.system, self.policy, self.frozen = loaded.system, loaded.policy, loaded.frozen
        else:
            models = tiny_musiclm.models()
            self.system = folder.system_class(kind, "the test").from_models(models)
            self.policy = self.system.restored(models.pop("policy").variables)
            self.frozen = {name: model.variables for name, model in models.items()}
        noise = np.random.default_rng(5)
        self.other = jax.tree.map(
            lambda x: x + 0.1 * noise.standard_normal(x.shape, np.float32), self.policy
        )
        self.condition, self.keys = CONDITIONS[kind], row_keys(jax.random.key(2), BATCH)
        self.length = FRAMES * self.system.frame_tokens
        self._sample = jax.jit(
            lambda policy, condition, keys, beginning, sampling: self.system.sample(
                policy, condition, keys, self.length, sampling, beginning
            ),
            static_argnums=4,
        )
        self._score = jax.jit(self._distributions, static_argnums=4)
        self.scores = {
            sampling: self.score(self.sample(sampling), sampling) for sampling in SAMPLINGS
        }

    def sample(self, sampling=SAMPLINGS[0], rows=slice(None), beginning=None):
        """Samples some of the clips, by default without a beginning."""
        if beginning is None:
            count = len(self.keys[rows])
            nothing = np.zeros((count, self.length), np.int32), np.zeros(count, np.int32)
            beginning = Beginning(*nothing)
        copy = self.system.compute_copy(Weights(self.policy, {}), "float32").policy
        condition, keys = jax.tree.map(lambda x: x[rows], (self.condition, self.keys))
        return jax.device_get(self._sample(copy, condition, keys, beginning, sampling))

    def score(self, sampled, sampling=SAMPLINGS[0]):
        """Returns tokens with their log-probs and both policies' distributions and KL, by name."""
        arguments = self.policy, self.other, self.condition, sampled, sampling
        return {"sampled": sampled, **jax.device_get(self._score(*arguments))}

    def _distributions(self, policy, other, *arguments):
        system = self.system
        return {
            "ours": system.distributions(policy, *arguments),
            "theirs": system.distributions(other, *arguments),
            "log_probs": system.log_probs(policy, *arguments),
            "kl": system.kl(policy, other, *arguments),
            "no_kl": system.kl(policy, policy, *arguments),
        }


@pytest.fixture(scope="module", params=CONDITIONS)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("systems"))


def test_every_shipped_system_is_tested():
    shipped = set()
    for kind, place in folder.KINDS.items():
        if getattr(place, "__module__", str(place)).startswith("musicrl_jax.systems"):
            shipped.add(kind)
    assert set(CONDITIONS) == shipped


@pytest.mark.exactness(8)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_scored_log_probs_are_those_of_sampling(case, sampling):
    scores = case.scores[sampling]
    sampled = scores["sampled"]
    assert sampled.tokens.shape == (BATCH, case.length) and sampled.tokens.dtype == np.int32
    assert sampled.log_probs.dtype == scores["log_probs"].dtype == np.float32
    np.testing.assert_allclose(scores["log_probs"], sampled.log_probs, atol=2e-5)
    assert np.ptp(sampled.log_probs) > 0.1 and len(np.unique(sampled.tokens)) > 2
    if sampling.top_k is None:
        assert sampled.allowed is None
    else:
        assert (sampled.allowed.sum(axis=-1) == sampling.top_k).all()
        chosen = np.take_along_axis(sampled.allowed, sampled.tokens[..., None], axis=-1)
        assert chosen.all()


def quantiles(scores, tokens, rng):
    """Returns each token's place in the cumulative distribution, uniform if it is sampled of it."""
    probabilities = np.exp(scores.astype(np.float64))
    ends = np.cumsum(probabilities, axis=-1)
    end = np.take_along_axis(ends, tokens[..., None], axis=-1)[..., 0]
    share = np.take_along_axis(probabilities, tokens[..., None], axis=-1)[..., 0]
    return end - share * rng.random(tokens.shape)


@pytest.mark.exactness(24)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_tokens_of_every_place_have_the_scored_frequencies(case, sampling):
    clips = 2048
    condition = jax.tree.map(lambda x: np.repeat(x, clips // BATCH, axis=0), case.condition)
    copy = case.system.compute_copy(Weights(case.policy, {}), "float32").policy
    keys = row_keys(jax.random.key(3), clips)
    sampled = jax.jit(case.system.sample, static_argnums=(3, 4))(
        copy, condition, keys, case.length, sampling
    )
    scores = jax.jit(case.system.distributions, static_argnums=3)(
        case.policy, condition, sampled, sampling
    )
    scores, tokens = np.asarray(scores), np.asarray(sampled.tokens)
    rng = np.random.default_rng(4)

    def p_values(scores):
        return kstest(quantiles(scores, tokens, rng), "uniform", axis=0).pvalue

    # The least of S values; then those of another temperature.
    assert p_values(scores).min() > 0.01 / case.length
    colder = np.where(np.isfinite(scores), 3 * scores, -np.inf)
    colder -= np.logaddexp.reduce(colder, axis=-1, keepdims=True)
    assert p_values(colder).min() < 1e-3 / case.length


@pytest.mark.exactness(7)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_distributions_sum_to_one_over_the_allowed_tokens(case, sampling):
    scores = case.scores[sampling]
    sampled = scores["sampled"]
    for name in ("ours", "theirs"):
        probabilities = np.exp(scores[name].astype(np.float64))
        np.testing.assert_allclose(probabilities.sum(axis=-1), 1, atol=1e-5)
        if sampled.allowed is not None:
            assert (probabilities[~sampled.allowed] == 0).all()
    of_tokens = np.take_along_axis(scores["ours"], sampled.tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(of_tokens, scores["log_probs"], atol=1e-5)


@pytest.mark.exactness(6, 7)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_kl_is_exactly_zero_against_itself_and_else_as_enumerated(case, sampling):
    scores = case.scores[sampling]
    np.testing.assert_array_equal(scores["no_kl"], 0)
    ours, theirs = (np.exp(scores[name].astype(np.float64)) for name in ("ours", "theirs"))
    enumerated = rel_entr(ours, theirs).sum(axis=-1)
    np.testing.assert_allclose(scores["kl"], enumerated, rtol=1e-3, atol=1e-6)
    assert enumerated.max() > 1e-3


@pytest.mark.exactness(11)
def test_a_row_does_not_depend_on_its_batch(case):
    alone = case.sample(rows=slice(1, 2))
    together = case.scores[SAMPLINGS[0]]["sampled"]
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[1])
    np.testing.assert_allclose(alone.log_probs[0], together.log_probs[1], atol=1e-5)


def test_a_clip_continues_its_beginning(case):
    """Of the beginnings of 0, 1, 3 and all frames, two have a part of a frame, which is ignored."""
    plain, depth = case.scores[SAMPLINGS[0]]["sampled"], case.system.frame_tokens
    frames = np.array([0, 1, 3, FRAMES])
    first = np.roll(plain.tokens.reshape(BATCH, FRAMES, depth), 1, axis=(0, 1))
    first = first.reshape(BATCH, -1)
    lengths = (frames * depth + np.array([1, 1, 0, 0])).astype(np.int32)
    sampled = case.sample(beginning=Beginning(first, lengths))
    np.testing.assert_array_equal(sampled.tokens[0], plain.tokens[0])
    for row, count in enumerate(frames * depth):
        np.testing.assert_array_equal(sampled.tokens[row, :count], first[row, :count])
    # The other tokens are sampled given the beginning.
    log_probs = case.score(sampled)["log_probs"]
    new = np.arange(case.length) >= (frames * depth)[:, None]
    np.testing.assert_allclose(log_probs[new], sampled.log_probs[new], atol=2e-5)
    assert (sampled.tokens != first)[new].any()


def test_a_rollout_is_as_long_as_the_clip_and_has_the_arrays_of_encoded_sound(case):
    system, text = case.system, case.system.read(["a slow jig"] * BATCH)

    def arrays(policy, frozen, text, keys):
        weights = system.compute_copy(Weights(policy, frozen), "float32")
        rollout = roll_out(system, weights, text, keys, case.length, SAMPLINGS[0])
        sound = system.sound(frozen, rollout.sampled.tokens, keys)
        encoded = system.encode(frozen, rollout.mono)
        return rollout.wav, sound, system.features(rollout), encoded

    arguments = case.policy, case.frozen, text, case.keys
    wav, sound, features, encoded = jax.eval_shape(arrays, *arguments)
    samples = round(FRAMES * system.frame_seconds * system.sample_rate_hz)
    assert (wav.shape, wav.dtype) == ((BATCH, system.channels, samples), jnp.float32)
    assert sound == wav
    assert features == encoded and all(x.dtype == jnp.int32 for x in features.values())
    assert system.data_layout()


def test_a_system_uses_its_own_parts(case):
    system = case.system
    assert set(system.USES) == {"condition", "codes", "decode"}
    used = set().union(*system.USES.values())
    assert used <= set(system.PLAYING) and set(system.ENCODING) <= set(system.PARTS)


def test_stored_and_restored_are_inverse(case):
    back = case.system.restored(case.system.stored(case.policy))
    jax.tree.map(np.testing.assert_array_equal, back, case.policy)


def test_initial_weights_have_the_shapes_of_loaded_ones_and_are_sharded(case):
    mesh = sharding.make_mesh(2, 2)
    shapes, shardings = sharding.shapes_and_shardings(mesh, case.system.init, jax.random.key(0))
    jax.tree.map(
        lambda new, old: np.testing.assert_equal(new.shape, old.shape), shapes, case.policy
    )
    axes = {axis for leaf in jax.tree.leaves(shardings) for axis in leaf.spec}
    assert {"fsdp", "tensor"} <= axes


def test_values_depend_on_earlier_tokens_alone_and_move_with_their_mean(case):
    system, sampled = case.system, case.scores[SAMPLINGS[0]]["sampled"]
    shapes = meta.unbox(jax.eval_shape(system.init_values, jax.random.key(0)))
    noise = np.random.default_rng(3)
    values = jax.tree.map(lambda x: 0.3 * noise.standard_normal(x.shape, np.float32), shapes)
    values = system.start_values(values, case.policy)
    value = jax.jit(system.values)
    before = np.asarray(value(values, case.condition, sampled.tokens))
    assert before.shape == sampled.tokens.shape and before.dtype == np.float32
    place = 2 * system.frame_tokens
    changed = sampled.tokens.copy()
    changed[:, place] = (changed[:, place] + 1) % 5
    after = np.asarray(value(values, case.condition, changed))
    np.testing.assert_array_equal(after[:, : place + 1], before[:, : place + 1])
    assert np.abs(after - before)[:, place + 1].max() > 1e-4
    high, low = (
        value(system.centre_values(values, jnp.float32(mean)), case.condition, sampled.tokens)
        for mean in (7, 3)
    )
    np.testing.assert_allclose(high - low, 4, rtol=1e-5)


def test_prompts_are_read_on_the_host_and_empty_ones_refused(case):
    text = case.system.read(["a slow jig", "a fast air"])
    assert {array.shape[0] for array in text.values()} == {2}
    with pytest.raises(ValueError, match="prompt ' ' is empty"):
        case.system.read([" "])


@pytest.mark.parametrize(("seconds", "frames"), [(0.04, 1), (1.0, 25), (4.0, 100)])
def test_a_clip_holds_whole_frames(case, seconds, frames):
    assert case.system.length(seconds) == frames * case.system.frame_tokens


@pytest.mark.parametrize("seconds", [-1.0, 0.0, 0.01, 0.99])
def test_a_clip_of_part_frames_is_refused(case, seconds):
    with pytest.raises(ValueError, match=f"clip_seconds={seconds} must be a multiple of 0.04 s"):
        case.system.length(seconds)
