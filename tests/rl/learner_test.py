"""The learner on the tiny system: what its first step must be, and what must not move it."""

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
SAMPLING = Sampling()


@dataclasses.dataclass(frozen=True)
class Adam:
    """An optimiser whose first moments are a tenth of the gradient after one step."""

    def build(self, steps):
        return optax.adam(0.15)


OPTIMISERS = {"policy_optimiser": Adam(), "value_optimiser": Adam()}


@pytest.fixture(scope="module")
def learner():
    return a_learner(PolicyGradient())


def a_learner(gradient, **settings):
    settings = {"kl_strength": 0.02, "sampling": SAMPLING, **settings}
    config = RLConfig(100, BATCH, SECONDS, **settings, gradient=gradient, **OPTIMISERS)
    return Learner(SYSTEM, config)


@pytest.fixture(scope="module")
def start(learner):
    state = meta.unbox(jax.jit(learner.create)(jax.random.key(0)))
    base = jax.tree.map(jnp.copy, state.policy)
    return learner.started(state, base), base


@pytest.fixture(scope="module")
def steps(learner):
    return jax.jit(lambda *given: drawn(*given, SAMPLING)), jax.jit(updated(learner))


def updated(learner):
    """Returns a function (state, anchor, rollout, reward) -> what an update makes of them."""
    return lambda state, anchor, *given: learner.update(
        state, learner.compute_copy(state, anchor), *given
    )


def drawn(policy, classes, key, sampling):
    """Draws clips of prompts of some classes, without their sound."""
    sampled = SYSTEM.sample(policy, classes, row_keys(key, BATCH), TOKENS, sampling)
    return Rollout(classes, sampled, (), jnp.zeros((BATCH, 1, 1)))


def zeros_played(draw, update, state, anchor, steps):
    """Updates for a reward that is the share of 0 among the tokens -> (rewards, KLs, the last state)."""
    rewards, kls = [], []
    for step in range(steps):
        rollout = draw(state.policy, CLASSES, jax.random.key(100 + step))
        reward = (rollout.sampled.tokens == 0).mean(axis=1, dtype=jnp.float32)
        state, metrics = update(state, anchor, rollout, reward)
        rewards.append(float(reward.mean()))
        kls.append(float(metrics["kl"]))
    return rewards, kls, state


@pytest.fixture(scope="module")
def rollout(start, steps):
    classes = jax.random.randint(jax.random.key(9), (BATCH,), 0, 4)
    return steps[0](start[0].policy, classes, jax.random.key(1))


@pytest.mark.exactness(6)
def test_kl_is_zero_to_the_bit_before_the_first_step(start, steps, rollout):
    _, metrics = steps[1](*start, rollout, jnp.linspace(0, 1, BATCH))
    assert float(metrics["kl"]) == 0.0
    assert float(metrics["sampler_drift"]) < 2e-5


@pytest.mark.exactness(6, 7)
@pytest.mark.parametrize(
    "sampling",
    [Sampling(0.7), Sampling(0.9), Sampling(1.3), Sampling(0.9, top_k=3)],
    ids=lambda s: f"{s}",
)
def test_it_is_zero_however_the_clips_are_drawn(start, sampling):
    """And the log-probs of the sampler are the learner's: both are of the tempered, filtered distribution."""
    state, anchor = start
    other = a_learner(PolicyGradient(), sampling=sampling)

    def step(state, anchor):
        rollout = drawn(state.policy, CLASSES, jax.random.key(1), sampling)
        return updated(other)(state, anchor, rollout, jnp.linspace(0, 1, BATCH))[1]

    metrics = jax.jit(step)(state, anchor)
    assert float(metrics["kl"]) == 0.0
    assert float(metrics["sampler_drift"]) < 2e-5


@pytest.mark.exactness(6)
def test_scoring_at_another_temperature_than_sampling_is_caught(learner, start):
    """By the drift between sampler and learner, of which a run keeps a record."""
    state, anchor = start
    rollout = drawn(state.policy, CLASSES, jax.random.key(1), Sampling(0.7))
    metrics = jax.jit(updated(learner))(state, anchor, rollout, jnp.linspace(0, 1, BATCH))[1]
    assert float(metrics["sampler_drift"]) > 0.01


@pytest.mark.exactness(6, 9)
def test_in_bfloat16_the_gradient_is_nearly_the_same_and_its_sum_in_float32(start, rollout):
    """The KL is 0 to the bit even so, and what the sampler's and the learner's log-probs differ by is on record."""
    (state, anchor), reward = start, jnp.linspace(0, 1, BATCH)
    found = []
    for dtype in ("float32", "bfloat16"):
        learner = a_learner(PolicyGradient(), dtype=dtype)
        after, metrics = jax.jit(updated(learner))(state, anchor, rollout, reward)
        assert {w.dtype for w in jax.tree.leaves((after.policy, after.value))} == {
            jnp.dtype("float32")
        }
        assert float(metrics["kl"]) == 0.0
        found.append(np.concatenate([np.ravel(m) for m in jax.tree.leaves(after.policy_opt[0].mu)]))
    exact, rough = found
    assert 0 < np.linalg.norm(rough - exact) < 0.1 * np.linalg.norm(exact)
    assert 2e-5 < float(metrics["sampler_drift"]) < 0.1


@pytest.fixture(scope="module")
def in_parts(start, rollout):
    """gradient, parts of a batch -> (the optimisers' first moments, a tenth of the gradients; metrics)."""

    @functools.cache
    def found(gradient, parts):
        learner = a_learner(gradient, microbatches=parts)
        state = learner.started(meta.unbox(jax.jit(learner.create)(jax.random.key(0))), start[1])
        reward = jax.random.uniform(jax.random.key(4), (BATCH,))
        state, metrics = jax.jit(updated(learner))(state, start[1], rollout, reward)
        return [opt[0].mu for opt in (state.policy_opt, state.value_opt)], metrics

    return found


@pytest.mark.exactness(15)
@pytest.mark.parametrize("microbatches", [2, 8])
@pytest.mark.parametrize(
    "gradient", [PolicyGradient(), PolicyGradient("group", kl="sampled")], ids=str
)
def test_accumulated_gradients_are_those_of_the_whole_batch(in_parts, gradient, microbatches):
    (one, its_metrics), (other, metrics) = in_parts(gradient, 1), in_parts(gradient, microbatches)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=3e-7), one, other)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5), its_metrics, metrics
    )


def test_equal_rewards_that_the_value_knows_move_nothing(learner, start, steps, rollout):
    """At step 0 the KL's gradient is zero, and so is the advantage: the policy's gradient vanishes."""
    state, anchor = start
    state = state.replace(value={**state.value, "offset": jnp.float32(0.5)})
    _, metrics = steps[1](state, anchor, rollout, jnp.full(BATCH, 0.5))
    assert float(metrics["policy_norm"]) < 1e-6
    assert float(metrics["value_norm"]) < 1e-6


@pytest.mark.exactness(23)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_reward_that_is_not_finite_skips_the_update_and_is_counted(start, steps, rollout, bad):
    state, anchor = start
    after, metrics = steps[1](state, anchor, rollout, jnp.ones(BATCH).at[3].set(bad))
    assert (int(after.step), int(after.skipped), float(metrics["skipped"])) == (1, 1, 1.0)
    for name in ("policy", "value", "policy_opt", "value_opt"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))


@pytest.mark.exactness(23)
def test_a_rollout_whose_updates_are_all_skipped_counts_once_and_moves_no_strength(start, rollout):
    learner = a_learner(PolicyGradient("value", "clipped"), updates=3, kl_target_per_second=2.0)
    state = learner.started(meta.unbox(jax.jit(learner.create)(jax.random.key(0))), start[1])
    after, _ = jax.jit(updated(learner))(
        state, start[1], rollout, jnp.ones(BATCH).at[3].set(jnp.nan)
    )
    assert (int(after.skipped), float(after.kl_strength)) == (1, float(state.kl_strength))


def test_the_value_starts_at_the_mean_of_the_finite_rewards(learner, start):
    reward = jnp.asarray([0.25, jnp.nan, 0.75, jnp.inf])
    value = learner.with_baseline(start[0], reward).value
    assert float(value["offset"]) == 0.5
    np.testing.assert_array_equal(value["after"], start[0].value["after"])


@pytest.mark.exactness(12)
def test_permuted_clips_give_the_same_update(start, steps, rollout):
    reward = jax.random.uniform(jax.random.key(4), (BATCH,))
    order = jax.random.permutation(jax.random.key(5), BATCH)
    one, _ = steps[1](*start, rollout, reward)
    other, _ = steps[1](*start, jax.tree.map(lambda x: x[order], rollout), reward[order])
    # Adam's first step is the sign of the gradient: compare the moments, which are the gradient itself.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        one.policy_opt[0].mu,
        other.policy_opt[0].mu,
    )


def test_reward_rises_and_the_anchor_holds(learner, start, steps):
    """The reward is the share of 0 among the tokens, about a sixth by chance; only the KL holds it
    back. The update takes its state's memory, and the anchor must not be in it.
    """
    anchor = start[1]
    kept = jax.tree.map(np.array, anchor)
    state = learner.started(meta.unbox(jax.jit(learner.create)(jax.random.key(0))), anchor)
    rewards, kls, _ = zeros_played(
        steps[0], jax.jit(updated(learner), donate_argnums=0), state, anchor, 15
    )
    assert rewards[0] < 0.4 and rewards[-1] > 2 * rewards[0]
    # A policy that always plays 0 costs -log p(0) a token: the KL is of that size, not below it.
    assert kls[0] == 0.0 and kls[-1] > 0.3 * TOKENS * np.log(2 * rewards[-1] / (2 * rewards[0]))
    jax.tree.map(np.testing.assert_array_equal, anchor, kept)


@pytest.mark.parametrize(
    ("gradient", "updates"),
    [
        (PolicyGradient("leave_one_out"), 1),
        (PolicyGradient("group_std", "clipped", "sampled", group=8), 2),
        (PolicyGradient("value", "clipped", "local"), 2),
        (PolicyGradient("best"), 1),
    ],
)
def test_every_choice_raises_the_reward(start, steps, gradient, updates):
    learner = a_learner(gradient, updates=updates)
    state, anchor = start
    state = learner.started(meta.unbox(jax.jit(learner.create)(jax.random.key(0))), anchor)
    assert (state.value == {}) == (gradient.baseline != "value")
    rewards, kls, state = zeros_played(steps[0], jax.jit(updated(learner)), state, anchor, 12)
    assert (
        rewards[-1] > 1.6 * rewards[0] and (updates > 1 or kls[0] == 0.0) and int(state.step) == 12
    )


def test_the_strength_follows_the_kls_target(start, steps, rollout):
    """Nothing has moved, so the KL is 0, under any target: the strength falls by a fiftieth."""
    aimed = a_learner(PolicyGradient(), kl_target_per_second=2.0)
    after, metrics = jax.jit(updated(aimed))(*start, rollout, jnp.ones(BATCH))
    assert float(metrics["kl_strength"]) == pytest.approx(0.02)
    assert float(after.kl_strength) == pytest.approx(0.02 * 0.98)
    kept, _ = steps[1](*start, rollout, jnp.ones(BATCH))
    assert float(kept.kl_strength) == pytest.approx(0.02)
