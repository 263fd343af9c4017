"""The learner on a tiny policy: what its first step must be, and what must not move it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.linen import meta

from musicrl_jax.core.keys import row_keys
from musicrl_jax.core.tokens import TokenLayout
from musicrl_jax.models.musiclm import MusicLM, MusicLMConfig, Value
from musicrl_jax.models.transformer import TransformerConfig
from musicrl_jax.rl.rollout import Rollout
from musicrl_jax.rl.sample import sample
from musicrl_jax.train_rl import Learner

CONFIG = MusicLMConfig(
    TransformerConfig(2, 16, 2, 32, dropout=0.0), TransformerConfig(1, 16, 2, 16), TokenLayout(6, 6, 1), 2, 4
)
BATCH, FRAMES, TEMPERATURE = 32, 8, 0.99


@pytest.fixture(scope="module")
def learner():
    return Learner(
        MusicLM(CONFIG), Value(CONFIG), optax.adam(3e-2), optax.adam(3e-2), kl_strength=0.02, temperature=TEMPERATURE
    )


@pytest.fixture(scope="module")
def start(learner):
    state = meta.unbox(jax.jit(learner.create)(jax.random.key(0)))
    base = jax.tree.map(jnp.copy, state.policy)
    return learner.started(state, base), base


@pytest.fixture(scope="module")
def steps(learner):
    def draw(policy, mulan, key):
        tokens, log_probs = sample(learner.policy, policy, mulan, row_keys(key, BATCH), FRAMES, TEMPERATURE)
        empty = jnp.zeros((BATCH, 1), jnp.float32)
        return Rollout(jnp.zeros((BATCH, 1), jnp.int32), empty, mulan, tokens, log_probs, tokens, empty)

    return jax.jit(draw), jax.jit(learner.update)


@pytest.fixture(scope="module")
def rollout(start, steps):
    mulan = jax.random.randint(jax.random.key(9), (BATCH, 2), 0, 4)
    return steps[0](start[0].policy, mulan, jax.random.key(1))


def test_kl_is_zero_to_the_bit_before_the_first_step(start, steps, rollout):
    _, metrics = steps[1](*start, rollout, jnp.linspace(0, 1, BATCH))
    assert float(metrics["kl"]) == 0.0
    assert float(metrics["sampler_drift"]) < 2e-5


def test_equal_rewards_that_the_value_knows_move_nothing(learner, start, steps, rollout):
    """At step 0 the KL's gradient is zero, and so is the advantage: the policy's gradient vanishes."""
    state, anchor = start
    state = state.replace(value={**state.value, "offset": jnp.float32(0.5)})
    _, metrics = steps[1](state, anchor, rollout, jnp.full(BATCH, 0.5))
    assert float(metrics["policy_norm"]) < 1e-6
    assert float(metrics["value_norm"]) < 1e-6


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_reward_that_is_not_finite_skips_the_update_and_is_counted(start, steps, rollout, bad):
    state, anchor = start
    after, metrics = steps[1](state, anchor, rollout, jnp.ones(BATCH).at[3].set(bad))
    assert (int(after.step), int(after.skipped), float(metrics["skipped"])) == (1, 1, 1.0)
    for name in ("policy", "value", "policy_opt", "value_opt"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))


def test_the_value_starts_at_the_mean_of_the_finite_rewards(learner, start):
    reward = jnp.asarray([0.25, jnp.nan, 0.75, jnp.inf])
    value = learner.with_baseline(start[0], reward).value
    assert float(value["offset"]) == 0.5
    jax.tree.map(np.testing.assert_array_equal, value["trunk"], start[0].value["trunk"])


def test_permuted_clips_give_the_same_update(start, steps, rollout):
    reward = jax.random.uniform(jax.random.key(4), (BATCH,))
    order = jax.random.permutation(jax.random.key(5), BATCH)
    one, _ = steps[1](*start, rollout, reward)
    other, _ = steps[1](*start, jax.tree.map(lambda x: x[order], rollout), reward[order])
    # Adam's first step is the sign of the gradient: compare the moments, which are the gradient itself.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one.policy_opt[0].mu, other.policy_opt[0].mu)


def test_reward_rises_and_the_anchor_holds(start, steps):
    """The reward is the share of semantic codes that are 0, about a sixth by chance; only the KL holds it back."""
    (draw, update), (state, anchor) = steps, start
    kept = jax.tree.map(np.array, anchor)
    mulan = jnp.zeros((BATCH, 2), jnp.int32)
    rewards, kls = [], []
    for step in range(15):
        rollout = draw(state.policy, mulan, jax.random.key(100 + step))
        reward = (rollout.tokens[:, :, 0] == 0).mean(axis=1, dtype=jnp.float32)
        state, metrics = update(state, anchor, rollout, reward)
        rewards.append(float(reward.mean()))
        kls.append(float(metrics["kl"]))
    assert rewards[0] < 0.4 and rewards[-1] > 2 * rewards[0]
    # A policy that always plays 0 costs -log p(0) a frame, 8 frames long: the KL is of that size, not below it.
    assert kls[0] == 0.0 and kls[-1] > 0.3 * FRAMES * np.log(2 * rewards[-1] / (2 * rewards[0]))
    jax.tree.map(np.testing.assert_array_equal, anchor, kept)
