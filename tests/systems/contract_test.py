"""What every registered system promises to RL: see `systems/system.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_musiclm
from flax.core import meta
from scipy.special import rel_entr

from musicrl_jax.core import sharding
from musicrl_jax.core.keys import row_keys
from musicrl_jax.systems import folder, tiny
from musicrl_jax.systems.musiclm import MuLanCondition
from musicrl_jax.systems.system import Beginning, Rollout, SampledTokens, Sampling, Weights

BATCH, FRAMES = 4, 5
SAMPLINGS = (Sampling(0.9), Sampling(1.3, top_k=3))
# What a system's condition is for four prompts.
CONDITIONS = {
    "tiny": jnp.arange(4, dtype=jnp.int32),
    "musiclm": MuLanCondition(
        jnp.full((4, 8), 8**-0.5),
        jnp.array([[0, 1, 2], [3, 2, 1], [0, 0, 0], [2, 3, 3]], jnp.int32),
    ),
}


class Case:
    """A system with the weights of two policies, and the tokens that the first one samples."""

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
        self.log_probs = jax.jit(self.system.log_probs, static_argnums=3)
        self.scores = {sampling: self._score(sampling) for sampling in SAMPLINGS}

    def sample(self, rows=slice(None), sampling=SAMPLINGS[0], beginning=None):
        """Samples some of the clips."""
        copy = self.system.compute_copy(Weights(self.policy, {}), "float32").policy
        condition, keys = jax.tree.map(lambda x: x[rows], (self.condition, self.keys))
        return jax.device_get(self._sample(copy, condition, keys, beginning, sampling))

    def _score(self, sampling):
        """Returns all that the contract says of the tokens, by name."""
        nothing = np.zeros((BATCH, self.length), np.int32), np.zeros(BATCH, np.int32)
        system = self.system
        sampled = self.sample(sampling=sampling, beginning=Beginning(*nothing))

        def scores(policy, other, condition, sampled):
            arguments = condition, sampled, sampling
            return {
                "ours": system.distributions(policy, *arguments),
                "theirs": system.distributions(other, *arguments),
                "kl": system.kl(policy, other, *arguments),
                "no_kl": system.kl(policy, policy, *arguments),
            }

        found = jax.jit(scores)(self.policy, self.other, self.condition, sampled)
        log_probs = self.log_probs(self.policy, self.condition, sampled, sampling)
        return jax.device_get({"sampled": sampled, "log_probs": log_probs, **found})


@pytest.fixture(scope="module", params=CONDITIONS)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("systems"))


def test_every_shipped_system_is_tested():
    shipped = {
        kind
        for kind, place in folder.KINDS.items()
        if getattr(place, "__module__", str(place)).startswith("musicrl_jax.systems")
    }
    assert set(CONDITIONS) == shipped


@pytest.mark.exactness(8)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_log_probs_are_those_of_sampling(case, sampling):
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


@pytest.mark.exactness(7)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_distributions_are_distributions_over_what_is_allowed(case, sampling):
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
def test_kl_is_zero_to_the_bit_against_itself_and_else_that_of_enumeration(case, sampling):
    scores = case.scores[sampling]
    np.testing.assert_array_equal(scores["no_kl"], 0)
    ours, theirs = (np.exp(scores[name].astype(np.float64)) for name in ("ours", "theirs"))
    enumerated = rel_entr(ours, theirs).sum(axis=-1)
    np.testing.assert_allclose(scores["kl"], enumerated, rtol=1e-3, atol=1e-6)
    assert enumerated.max() > 1e-3


@pytest.mark.exactness(11)
def test_a_row_does_not_depend_on_its_batch(case):
    alone = case.sample(slice(1, 2))
    together = case.scores[SAMPLINGS[0]]["sampled"]
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[1])
    np.testing.assert_allclose(alone.log_probs[0], together.log_probs[1], atol=1e-5)


def test_a_beginning_stays_and_the_rest_goes_on(case):
    """After 0, 1, 3 and all frames; a part of a frame does not count."""
    plain, depth = case.scores[SAMPLINGS[0]]["sampled"], case.system.frame_tokens
    frames = np.array([0, 1, 3, FRAMES])
    given = np.roll(plain.tokens.reshape(BATCH, FRAMES, depth), 1, axis=(0, 1))
    given = given.reshape(BATCH, -1)
    lengths = (frames * depth + np.array([1, 1, 0, 0])).astype(np.int32)
    sampled = case.sample(beginning=Beginning(given, lengths))
    np.testing.assert_array_equal(sampled.tokens[0], plain.tokens[0])
    for row, count in enumerate(frames * depth):
        np.testing.assert_array_equal(sampled.tokens[row, :count], given[row, :count])
    # What comes after the beginning is sampled given it.
    scored = case.log_probs(case.policy, case.condition, sampled, SAMPLINGS[0])
    new = np.arange(case.length) >= (frames * depth)[:, None]
    np.testing.assert_allclose(np.asarray(scored)[new], sampled.log_probs[new], atol=2e-5)
    assert (sampled.tokens != given)[new].any()


def test_sound_is_as_long_as_the_clip(case):
    system, tokens = case.system, jax.ShapeDtypeStruct((BATCH, case.length), jnp.int32)
    wav = jax.eval_shape(system.sound, case.frozen, tokens, case.keys)
    samples = round(FRAMES * system.frame_seconds * system.sample_rate_hz)
    assert (wav.shape, wav.dtype) == ((BATCH, system.channels, samples), jnp.float32)
    assert set(system.USES) == {"condition", "codes", "decode"}
    assert {part for parts in system.USES.values() for part in parts} <= set(system.PLAYING)


def test_drawn_clips_have_the_arrays_of_encoded_ones(case):
    system, text = case.system, case.system.read(["a slow jig"] * BATCH)

    def arrays(frozen, text, tokens, keys):
        sampled = SampledTokens(tokens, jnp.zeros(tokens.shape), None)
        condition = system.condition(frozen, text)
        codes = system.codes(frozen, tokens, keys)
        wav = system.decode(frozen, codes)
        rollout = Rollout(condition, sampled, codes, wav)
        return system.features(rollout), system.encode(frozen, rollout.mono)

    tokens = jax.ShapeDtypeStruct((BATCH, case.length), jnp.int32)
    drawn, encoded = jax.eval_shape(arrays, case.frozen, text, tokens, case.keys)
    assert drawn == encoded and all(x.dtype == jnp.int32 for x in drawn.values())
    assert set(system.ENCODING) <= set(system.PARTS) and system.data_layout()


def test_stored_and_restored_are_inverse(case):
    back = case.system.restored(case.system.stored(case.policy))
    jax.tree.map(np.testing.assert_array_equal, back, case.policy)


def test_new_weights_have_the_shapes_of_loaded_ones_and_are_split_by_name(case):
    mesh = sharding.make_mesh(2, 2)
    shapes, shardings = sharding.shapes_and_shardings(mesh, case.system.init, jax.random.key(0))
    jax.tree.map(
        lambda new, old: np.testing.assert_equal(new.shape, old.shape), shapes, case.policy
    )
    axes = {axis for leaf in jax.tree.leaves(shardings) for axis in leaf.spec}
    assert {"fsdp", "tensor"} <= axes


def test_values_see_the_past_alone_and_move_with_their_mean(case):
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
