"""The learner on the tiny system: its first step, its updates, and what leaves it unchanged."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta

from musicrl_jax.core.keys import row_keys
from musicrl_jax.losses.policy_gradient import PolicyGradient
from musicrl_jax.rl.config import RLConfig
from musicrl_jax.rl.learner import Learner
from musicrl_jax.systems.system import Rollout, Sampling
from musicrl_jax.systems.tiny import TinyConfig, TinySystem

SYSTEM = TinySystem(TinyConfig())
BATCH, CLASSES = 32, jnp.zeros(32, jnp.int32)
SECONDS, TOKENS = 0.32, 16  # of a clip
KEY = jax.random.key(1)
PAPER = PolicyGradient()
RISING = jnp.linspace(0, 1, BATCH)  # rewards


@dataclasses.dataclass(frozen=True)
class Adam:
    """An optimiser whose first moments are a tenth of the gradient after one step."""

    def build(self, steps):
        return optax.adam(0.15)


def make_learner(gradient=PAPER, **settings):
    settings = {"kl_strength": 0.02, **settings}
    optimisers = {"policy_optimiser": Adam(), "value_optimiser": Adam()}
    return Learner(
        SYSTEM, RLConfig(100, BATCH, SECONDS, **settings, gradient=gradient, **optimisers)
    )


def make_update(learner):
    """Returns a function (state, anchor, rollout, reward) -> (state, metrics)."""

    def update(state, anchor, rollout, reward):
        return learner.update(state, learner.compute_copy(state, anchor), rollout, reward)

    return update


def sample(policy, classes, key, sampling):
    """Samples clips for prompts of some classes, without their waveforms."""
    sampled = SYSTEM.sample(policy, classes, row_keys(key, BATCH), TOKENS, sampling)
    return Rollout(classes, sampled, (), jnp.zeros((BATCH, 1, 1)))


@jax.jit
def sample_at(policy, classes, key, temperature):
    return sample(policy, classes, key, Sampling(temperature))


@functools.cache
def compiled(gradient, **settings):
    """Returns a learner and its jitted update, which donates the state."""
    learner = make_learner(gradient, **settings)
    return learner, jax.jit(make_update(learner), donate_argnums=0)


def updated(state, anchor, rollout, reward, gradient=PAPER, **settings):
    """Updates a copy of the state."""
    update = compiled(gradient, **settings)[1]
    return update(jax.tree.map(jnp.copy, state), anchor, rollout, reward)


@pytest.fixture(scope="module")
def start():
    """Returns the state before the first step, and the anchor."""
    learner = make_learner()
    state = meta.unbox(jax.jit(learner.create)(jax.random.key(0)))
    base = jax.tree.map(jnp.copy, state.policy)
    return learner.start_from(state, base), base


def first_state(start, learner):
    """Returns the first state of any learner."""
    if learner.learns_values:
        return start[0]
    return start[0].replace(value={}, value_opt=learner.value_transform.init({}))


@pytest.fixture(scope="module")
def rollout(start):
    classes = jax.random.randint(jax.random.key(9), (BATCH,), 0, 4)
    return sample_at(start[0].policy, classes, KEY, jnp.float32(0.99))


def reward_zeros(update, state, anchor, steps):
    """Updates by the share of token 0 as reward: (rewards, KLs, last state)."""
    rewards, kls = [], []
    for step in range(steps):
        key = jax.random.key(100 + step)
        rollout = sample_at(state.policy, CLASSES, key, jnp.float32(0.99))
        reward = (rollout.sampled.tokens == 0).mean(axis=1, dtype=jnp.float32)
        state, metrics = update(state, anchor, rollout, reward)
        rewards.append(float(reward.mean()))
        kls.append(float(metrics["kl"]))
    return rewards, kls, state


# --- the first step ---


@pytest.mark.exactness(6)
def test_kl_is_zero_to_the_bit_before_the_first_step(start, rollout):
    _, metrics = updated(*start, rollout, RISING)
    assert float(metrics["kl"]) == 0.0
    assert float(metrics["sampler_drift"]) < 2e-5


@pytest.mark.exactness(6, 7)
@pytest.mark.parametrize("top_k", [None, 3])
def test_kl_is_zero_at_every_temperature(start, top_k):
    """Sampler and learner give the same log-probs, of the tempered and filtered distribution."""

    @jax.jit
    def step(state, anchor, temperature):
        sampling = Sampling(temperature, top_k)
        rollout = sample(state.policy, CLASSES, KEY, sampling)
        return make_update(make_learner(sampling=sampling))(state, anchor, rollout, RISING)[1]

    for temperature in (0.7, 0.9, 1.3):
        metrics = step(*start, jnp.float32(temperature))
        assert float(metrics["kl"]) == 0.0
        assert float(metrics["sampler_drift"]) < 2e-5


@pytest.mark.exactness(6)
def test_drift_shows_a_temperature_that_differs_from_the_samplers(start):
    rollout = sample_at(start[0].policy, CLASSES, KEY, jnp.float32(0.7))
    _, metrics = updated(*start, rollout, RISING)
    assert float(metrics["sampler_drift"]) > 0.01


@pytest.mark.exactness(6, 9)
def test_in_bfloat16_the_gradient_is_nearly_the_same_and_its_sum_in_float32(start, rollout):
    """The KL is still 0 to the bit, and the drift of sampler and learner is reported."""
    gradients = []
    for settings in ({}, {"dtype": "bfloat16"}):
        after, metrics = updated(*start, rollout, RISING, **settings)
        dtypes = {leaf.dtype for leaf in jax.tree.leaves((after.policy, after.value))}
        assert dtypes == {jnp.dtype("float32")}
        assert float(metrics["kl"]) == 0.0
        moments = jax.tree.leaves(after.policy_opt[0].mu)
        gradients.append(np.concatenate([np.ravel(moment) for moment in moments]))
    exact, rough = gradients
    assert 0 < np.linalg.norm(rough - exact) < 0.1 * np.linalg.norm(exact)
    assert 2e-5 < float(metrics["sampler_drift"]) < 0.1


def test_equal_rewards_that_the_value_predicts_move_nothing(start, rollout):
    """At step 0 the KL's gradient and the advantage are 0, so the policy's gradient is 0."""
    state, anchor = start
    state = state.replace(value={**state.value, "offset": jnp.float32(0.5)})
    _, metrics = updated(state, anchor, rollout, jnp.full(BATCH, 0.5))
    assert float(metrics["policy_norm"]) < 1e-6
    assert float(metrics["value_norm"]) < 1e-6


def test_the_value_starts_at_the_mean_of_the_finite_rewards(start):
    reward = jnp.asarray([0.25, jnp.nan, 0.75, jnp.inf])
    value = make_learner().with_baseline(start[0], reward).value
    assert float(value["offset"]) == 0.5
    np.testing.assert_array_equal(value["after"], start[0].value["after"])


# --- invariances of an update ---


@pytest.mark.exactness(15)
@pytest.mark.parametrize(
    ("gradient", "microbatches"), [(PAPER, 2), (PolicyGradient("group", kl="sampled"), 8)], ids=str
)
def test_accumulated_gradients_are_those_of_the_whole_batch(start, rollout, gradient, microbatches):
    reward = jax.random.uniform(jax.random.key(4), (BATCH,))
    state = first_state(start, make_learner(gradient))
    arguments = state, start[1], rollout, reward, gradient
    one, expected = updated(*arguments)
    other, metrics = updated(*arguments, microbatches=microbatches)
    for opt in ("policy_opt", "value_opt"):
        first, second = (getattr(each, opt)[0].mu for each in (one, other))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=3e-7), first, second)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5), expected, metrics
    )


@pytest.mark.exactness(12)
def test_permuted_clips_give_the_same_update(start, rollout):
    reward = jax.random.uniform(jax.random.key(4), (BATCH,))
    order = jax.random.permutation(jax.random.key(5), BATCH)
    one, _ = updated(*start, rollout, reward)
    other, _ = updated(*start, jax.tree.map(lambda x: x[order], rollout), reward[order])
    # Adam's first step is the sign of the gradient, so that the moments are compared.
    first, second = (state.policy_opt[0].mu for state in (one, other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), first, second)


@pytest.mark.exactness(23)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_reward_that_is_not_finite_skips_the_update_and_is_counted(start, rollout, bad):
    state, anchor = start
    after, metrics = updated(state, anchor, rollout, jnp.ones(BATCH).at[3].set(bad))
    assert (int(after.step), int(after.skipped), float(metrics["skipped"])) == (1, 1, 1.0)
    for name in ("policy", "value", "policy_opt", "value_opt"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))


# --- several updates ---

ADAPTED = PolicyGradient("value", "clipped", "local")
TWICE = {"updates": 2, "kl_target_per_second": 2.0}


@pytest.mark.exactness(23)
def test_a_rollout_whose_updates_are_all_skipped_counts_once_and_moves_no_strength(start, rollout):
    reward = jnp.ones(BATCH).at[3].set(jnp.nan)
    after, _ = updated(*start, rollout, reward, ADAPTED, **TWICE)
    assert (int(after.skipped), float(after.kl_strength)) == (1, float(start[0].kl_strength))


def test_the_strength_follows_the_kls_target(start, rollout):
    """The KL of the first step is 0, below any target: the strength falls by a fiftieth."""
    after, metrics = updated(*start, rollout, jnp.ones(BATCH), ADAPTED, **TWICE)
    assert float(metrics["kl_strength"]) == pytest.approx(0.02)
    assert float(after.kl_strength) == pytest.approx(0.02 * 0.98)
    constant, _ = updated(*start, rollout, jnp.ones(BATCH))
    assert float(constant.kl_strength) == pytest.approx(0.02)


def test_reward_rises_and_the_anchor_stays(start):
    """The reward is the share of token 0, at first about a sixth; only the KL limits it.

    The update takes over the state's memory, which the anchor must not share.
    """
    before = jax.tree.map(np.array, start[1])
    learner, update = compiled(PAPER)
    state = jax.tree.map(jnp.copy, start[0])
    rewards, kls, _ = reward_zeros(update, learner.start_from(state, start[1]), start[1], 15)
    assert rewards[0] < 0.4 and rewards[-1] > 2 * rewards[0]
    # A policy that always plays 0 has a KL of -log p(0) a token.
    assert kls[0] == 0.0 and kls[-1] > 0.3 * TOKENS * np.log(2 * rewards[-1] / (2 * rewards[0]))
    jax.tree.map(np.testing.assert_array_equal, start[1], before)


@pytest.mark.parametrize(
    ("gradient", "settings"),
    [
        (PolicyGradient("leave_one_out"), {}),
        (PolicyGradient("group_std", "clipped", "sampled", group=8), {"updates": 2}),
        (ADAPTED, TWICE),
        (PolicyGradient("best"), {}),
    ],
)
def test_every_choice_raises_the_reward(start, gradient, settings):
    learner, update = compiled(gradient, **settings)
    state = jax.tree.map(jnp.copy, first_state(start, learner))
    rewards, kls, state = reward_zeros(update, state, start[1], 12)
    assert (state.value == {}) == (gradient.baseline != "value")
    assert rewards[-1] > 1.6 * rewards[0] and int(state.step) == 12
    assert settings or kls[0] == 0.0
