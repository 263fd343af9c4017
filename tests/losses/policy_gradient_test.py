"""The policy gradient against enumeration: 4 codes, 3 steps, all 64 sequences, float64.

The truth is the central finite difference of the enumerated objective (1 - a) E[R] - a KL. What the library's loss
gives is averaged over all sequences, each with its probability, so nothing is sampled.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import rel_entr, softmax

from musicrl_jax.losses.policy_gradient import full_kl, other_clips_mean, policy_loss, still_to_come, value_loss

CODES, STEPS, STRENGTH = 4, 3, 0.3
SEQUENCES = np.array(list(itertools.product(range(CODES), repeat=STEPS)))


def contexts(tokens):
    """A number for the prefix before each token, [B, S]: 0 for the empty one, then 1 .. 4, then 5 .. 20."""
    first, second = tokens[:, 0], tokens[:, 1]
    return jnp.stack([jnp.zeros_like(first), 1 + first, 1 + CODES + CODES * first + second], axis=1)


def log_distribution(theta, tokens):
    return jax.nn.log_softmax(theta, axis=-1)[contexts(tokens)]  # [B, S, V]


def sequence_probabilities(theta):
    scores = jnp.take_along_axis(log_distribution(theta, SEQUENCES), SEQUENCES[:, :, None], axis=-1)
    return jnp.exp(scores.sum(axis=(1, 2)))


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    size = 1 + CODES + CODES**2
    return {
        "theta": rng.normal(size=(size, CODES)),
        "anchor": rng.normal(size=(size, CODES)),
        "rewards": rng.normal(size=len(SEQUENCES)),
        "values": rng.normal(size=size),
    }


def objective(theta, problem, a=STRENGTH):
    probabilities = sequence_probabilities(theta)
    anchor = sequence_probabilities(problem["anchor"])
    kl = (probabilities * jnp.log(probabilities / anchor)).sum()
    return (1 - a) * (probabilities * problem["rewards"]).sum() - a * kl


def finite_difference(theta, problem):
    gradient, step = np.zeros_like(theta), 1e-6
    for index in np.ndindex(*theta.shape):
        nudge = np.zeros_like(theta)
        nudge[index] = step
        gradient[index] = (objective(theta + nudge, problem) - objective(theta - nudge, problem)) / (2 * step)
    return gradient


def mean_gradient(problem, loss=policy_loss, values=None):
    """The expectation of minus the loss's gradient: per sequence, weighted by its probability."""
    theta = jnp.asarray(problem["theta"])
    values = problem["values"][contexts(SEQUENCES)] if values is None else values

    def one(theta, tokens, reward, value):
        log_policy = log_distribution(theta, tokens[None])
        log_anchor = log_distribution(jnp.asarray(problem["anchor"]), tokens[None])
        return -loss(log_policy, log_anchor, tokens[None], reward[None], value[None], STRENGTH)[0]

    gradients = jax.vmap(jax.grad(one), in_axes=(None, 0, 0, 0))(
        theta, jnp.asarray(SEQUENCES), jnp.asarray(problem["rewards"]), jnp.asarray(values)
    )
    return np.asarray(jnp.einsum("b,bij->ij", sequence_probabilities(theta), gradients))


def relative_error(found, truth):
    return np.linalg.norm(found - truth) / np.linalg.norm(truth)


@pytest.fixture(scope="module")
def double():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def truth(double, problem):
    return finite_difference(problem["theta"], problem)


def test_mean_gradient_is_exact(truth, problem):
    assert relative_error(mean_gradient(problem), truth) < 1e-7


def test_baselines_across_clips_leave_the_gradient_exact(truth, problem):
    """Batches of two clips: all 64 x 64 pairs, each with its probability."""
    theta = jnp.asarray(problem["theta"])
    first, second = (grid.ravel() for grid in np.meshgrid(np.arange(64), np.arange(64), indexing="ij"))
    rows = np.stack([first, second], axis=1)

    def one(theta, tokens, rewards, values):
        log_policy = log_distribution(theta, tokens)
        log_anchor = log_distribution(jnp.asarray(problem["anchor"]), tokens)
        return -policy_loss(log_policy, log_anchor, tokens, rewards, values, STRENGTH)[0]

    gradients = jax.vmap(jax.grad(one), in_axes=(None, 0, 0, 0))(
        theta,
        jnp.asarray(SEQUENCES[rows]),
        jnp.asarray(problem["rewards"][rows]),
        jnp.asarray(problem["values"][contexts(SEQUENCES)][rows]),
    )
    probabilities = sequence_probabilities(theta)
    found = jnp.einsum("b,bij->ij", probabilities[first] * probabilities[second], gradients)
    assert relative_error(np.asarray(found), truth) < 1e-7


def test_a_mean_that_includes_the_clip_itself_shrinks_the_gradient(double):
    """Why the clip is left out of its own baseline: with it in, two clips lose half of their signal."""
    x = jnp.asarray([[1.0, 5.0], [3.0, 1.0]])
    np.testing.assert_allclose(other_clips_mean(x), x[::-1])
    np.testing.assert_allclose(x - x.mean(axis=0, keepdims=True), (x - other_clips_mean(x)) / 2)
    np.testing.assert_allclose(other_clips_mean(x[:1]), [[0.0, 0.0]])


def test_a_baseline_that_saw_the_action_is_caught(truth, problem):
    late = np.concatenate([problem["values"][contexts(SEQUENCES)][:, 1:], problem["rewards"][:, None]], axis=1)
    assert relative_error(mean_gradient(problem, values=late), truth) > 0.1


def test_kl_along_the_path_alone_is_caught(truth, problem):
    def local(log_policy, log_anchor, tokens, rewards, values, a):
        log_probs = jnp.take_along_axis(log_policy, tokens[..., None], axis=-1)[..., 0]
        surrogate = (1 - a) * log_probs * (rewards[:, None] - values) - a * full_kl(log_policy, log_anchor)
        return -surrogate.sum(axis=1).mean(), {}

    assert relative_error(mean_gradient(problem, loss=local), truth) > 0.05


def test_sampled_log_ratio_as_a_loss_is_caught(truth, problem):
    """Its expected gradient is zero, so the KL term is missing altogether."""

    def sampled(log_policy, log_anchor, tokens, rewards, values, a):
        log_probs = jnp.take_along_axis(log_policy, tokens[..., None], axis=-1)[..., 0]
        ratio = log_probs - jnp.take_along_axis(log_anchor, tokens[..., None], axis=-1)[..., 0]
        return -((1 - a) * log_probs * (rewards[:, None] - values) - a * ratio).sum(axis=1).mean(), {}

    found = mean_gradient(problem, loss=sampled)
    assert relative_error(found, truth) > 0.1

    def reward_alone(theta):
        return (1 - STRENGTH) * (sequence_probabilities(theta) * problem["rewards"]).sum()

    np.testing.assert_allclose(found, jax.grad(reward_alone)(jnp.asarray(problem["theta"])), atol=1e-12)


def test_kl_metric_is_the_enumerated_kl(double, problem):
    theta, anchor = (jnp.asarray(problem[name]) for name in ("theta", "anchor"))
    per_sequence = full_kl(log_distribution(theta, SEQUENCES), log_distribution(anchor, SEQUENCES)).sum(axis=1)
    p, q = sequence_probabilities(theta), sequence_probabilities(anchor)
    np.testing.assert_allclose((p * per_sequence).sum(), (p * jnp.log(p / q)).sum(), rtol=1e-12)


@pytest.mark.parametrize("never", [-1e9, -np.inf])
def test_kl_of_a_token_equals_scipy(never):
    """Of 7 codes the last is in neither distribution, and the first in the anchor's alone."""
    policy, anchor = np.random.default_rng(1).normal(size=(2, 3, 5, 7))
    policy[..., [0, 6]] = anchor[..., 6] = never
    expected = rel_entr(softmax(policy, axis=-1), softmax(anchor, axis=-1)).sum(axis=-1)
    log_policy, log_anchor = (jax.nn.log_softmax(x.astype(np.float32), axis=-1) for x in (policy, anchor))
    np.testing.assert_allclose(full_kl(log_policy, log_anchor), expected, rtol=1e-4)
    assert expected.min() > 0.1
    slopes = jax.grad(lambda x: full_kl(jax.nn.log_softmax(x, axis=-1), log_anchor).sum())(policy.astype(np.float32))
    assert np.isfinite(slopes).all() and np.abs(slopes[..., 1:6]).max() > 0.1
    np.testing.assert_array_equal(slopes[..., [0, 6]], 0.0)


def test_kl_is_infinite_where_the_anchor_forbids_what_the_policy_draws():
    halves, one = np.log(np.float32([[[0.5, 0.5]]])), np.float32([[[0.0, -np.inf]]])
    assert full_kl(halves, one) == np.inf
    np.testing.assert_allclose(full_kl(one, halves), np.log(2), rtol=1e-6)


def test_still_to_come_leaves_out_the_present():
    np.testing.assert_allclose(still_to_come(jnp.array([[1.0, 2.0, 4.0]])), [[6.0, 4.0, 0.0]])


def test_values_fit_the_expected_reward_of_the_prefix(double, problem):
    """The minimum of the value loss over all sequences, by probability, is E[R | prefix]."""
    probabilities = np.asarray(sequence_probabilities(jnp.asarray(problem["theta"])))
    index = np.asarray(contexts(SEQUENCES))
    expected = np.zeros(len(problem["values"]))
    for context in range(len(expected)):
        rows = (index == context).any(axis=1)
        expected[context] = (probabilities * problem["rewards"])[rows].sum() / probabilities[rows].sum()

    def loss(values):
        def one(tokens, reward):
            return value_loss(values[contexts(tokens[None])], reward[None])[0]

        losses = jax.vmap(one)(jnp.asarray(SEQUENCES), jnp.asarray(problem["rewards"]))
        return (jnp.asarray(probabilities) * losses).sum()

    assert np.abs(np.asarray(jax.grad(loss)(jnp.asarray(expected)))).max() < 1e-12
    assert np.abs(np.asarray(jax.grad(loss)(jnp.asarray(problem["values"])))).max() > 1e-3
