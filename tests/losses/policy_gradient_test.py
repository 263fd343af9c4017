"""The policy gradient against enumeration (`tests/benchmarks/gradients.py`) and known mistakes."""

from pathlib import Path

import gradients as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import rel_entr, softmax

from musicrl_jax.losses import policy_gradient
from musicrl_jax.losses.policy_gradient import (
    PolicyGradient,
    full_kl,
    future_sum,
    other_clips_mean,
    reward_advantage,
)
from musicrl_jax.systems.system import Sampling

EXACT = [(baseline, kl) for baseline in ("value", "leave_one_out") for kl in ("exact", "sampled")]


def choose(baseline="value", surrogate="reinforce", kl="exact"):
    return PolicyGradient(baseline, surrogate, kl, group=2)


@pytest.fixture(scope="module")
def double():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def problem():
    return oracle.problem()


def gradient_of(function, problem, theta=None):
    theta = problem["theta"] if theta is None else theta
    return oracle.finite_difference(lambda theta: function(theta, problem), theta)


@pytest.fixture(scope="module")
def truth(double, problem):
    return gradient_of(oracle.objective, problem)


def error(choice, problem, truth, **options):
    return oracle.error(oracle.mean_gradient(choice, problem, **options), truth)


# --- unbiased and biased gradients ---


def test_the_readme_shows_this_table(truth, problem):
    readme = Path(__file__).parents[2] / "musicrl_jax/rl/README.md"
    assert oracle.table(problem, truth) in readme.read_text(encoding="utf-8")


@pytest.mark.exactness(1, 4)
@pytest.mark.parametrize("surrogate", ["reinforce", "clipped"])
@pytest.mark.parametrize(("baseline", "kl"), EXACT)
def test_the_first_update_is_unbiased(truth, problem, baseline, surrogate, kl):
    assert error(choose(baseline, surrogate, kl), problem, truth) < 1e-7


@pytest.mark.exactness(1)
@pytest.mark.parametrize("kl", ["exact", "sampled"])
def test_other_clips_as_baseline_of_the_future_kl_are_unbiased(truth, problem, kl):
    assert error(choose(kl=kl), problem, truth, batch=2) < 1e-7


@pytest.mark.exactness(13)
def test_a_mean_with_the_own_reward_shrinks_the_rewards_gradient(double, problem):
    """By (G - 1) / G exactly; the KL's gradient is unchanged."""
    reward, kl = (gradient_of(f, problem) for f in (oracle.expected_reward, oracle.kl))
    expected = (1 - oracle.STRENGTH) * reward / 2 - oracle.STRENGTH * kl
    assert error(choose("group"), problem, expected) < 1e-7


@pytest.mark.parametrize(
    "choice",
    [choose("group"), choose("group_std"), choose("best"), choose(kl="local")],
    ids=["group", "group_std", "best", "local"],
)
def test_gradients_that_are_biased_by_definition_differ(truth, problem, choice):
    assert error(choice, problem, truth) > 0.05


def test_a_second_update_is_biased_by_the_states_alone(double, problem, truth):
    """After a small step the clipped gradient is near the new truth, but not equal."""
    moved = problem["theta"] + oracle.STEP * truth
    there = gradient_of(oracle.objective, problem, moved)
    assert 1e-6 < error(choose(surrogate="clipped"), problem, there, theta=moved) < 0.02


# --- known mistakes ---


@pytest.mark.exactness(2)
def test_a_baseline_that_sees_the_action_is_caught(truth, problem):
    values = problem["values"][oracle.contexts(oracle.CLIPS)][:, 1:]
    late = np.concatenate([values, problem["rewards"][:, None]], axis=1)
    assert error(choose(), problem, truth, values=late) > 1


def with_kl_loss(penalty):
    """Returns the library's loss with penalty(log_probs, anchor's log_probs) as its KL."""

    def loss(choice, current, advantage, strength):
        cost = strength * penalty(current.log_probs, current.anchor)
        return -(current.log_probs * advantage.weight - cost).sum(axis=1).mean(), {}

    return loss


@pytest.mark.exactness(3)
def test_the_sampled_log_ratio_as_a_loss_is_caught(truth, problem):
    """Its expected gradient is zero, so the KL has no effect."""
    loss = with_kl_loss(lambda ours, theirs: ours - theirs)
    gradient = oracle.mean_gradient(choose(kl="local"), problem, loss=loss)
    assert oracle.error(gradient, truth) > 0.1
    reward = gradient_of(oracle.expected_reward, problem)
    np.testing.assert_allclose(gradient, (1 - oracle.STRENGTH) * reward, atol=1e-8)


def k3(ours, theirs):
    """Returns Schulman's estimate of the KL: its value is unbiased and at least 0."""
    return jnp.exp(theirs - ours) - 1 - (theirs - ours)


def k3_in_the_reward(choice, current, advantage, strength):
    estimate = jax.lax.stop_gradient(k3(current.log_probs, current.anchor))
    weight = advantage.weight - strength * policy_gradient.sum_from_here(estimate)
    return -(current.log_probs * weight).sum(axis=1).mean(), {}


@pytest.mark.exactness(4)
@pytest.mark.parametrize(
    "loss", [with_kl_loss(k3), k3_in_the_reward], ids=["as a loss", "in the reward"]
)
def test_k3_is_caught(truth, problem, loss):
    assert error(choose(kl="local"), problem, truth, loss=loss) > 0.1


# --- filtered sampling ---


@pytest.fixture(scope="module")
def filtered(double, problem):
    """Returns the problem with a policy of the likelier two of four codes, and its truth."""
    allowed = Sampling(1.0, top_k=2).allowed(jnp.asarray(problem["theta"]))
    problem = problem | {"allowed": np.asarray(allowed)}
    return problem, gradient_of(oracle.objective, problem)


@pytest.mark.exactness(7)
@pytest.mark.parametrize(("baseline", "kl"), EXACT)
def test_a_filtered_policy_has_an_unbiased_gradient(filtered, baseline, kl):
    assert error(choose(baseline, kl=kl), *filtered) < 1e-7


@pytest.mark.exactness(7)
def test_scoring_a_filtered_policy_on_all_codes_is_caught(filtered):
    problem, truth = filtered
    gradient = oracle.mean_gradient(choose(), problem, scored_on="all codes")
    assert oracle.cosine(gradient, truth) < 0.9


# --- where ascent ends ---


@pytest.mark.exactness(5)
def test_ascent_reaches_the_regularised_optimum(double, problem):
    """It is anchor exp(R / beta) / Z, beta = a / (1 - a). Without the future KL J stays lower."""
    a = oracle.STRENGTH
    anchor = oracle.probabilities(problem["anchor"])
    optimum = anchor * np.exp(problem["rewards"] * (1 - a) / a)
    optimum /= optimum.sum()
    kl = (optimum * np.log(optimum / anchor)).sum()
    best = float((1 - a) * (optimum * problem["rewards"]).sum() - a * kl)

    def ascend(choice):
        def step(_, theta):
            return theta + 0.5 * oracle.mean_gradient(choice, problem | {"theta": theta})

        start = jnp.asarray(problem["anchor"])
        return jax.jit(lambda theta: jax.lax.fori_loop(0, 30_000, step, theta))(start)

    exact, local = (ascend(choose(kl=kl)) for kl in ("exact", "local"))
    assert best * 0.997 < float(oracle.objective(exact, problem)) <= best + 1e-9
    assert float(oracle.objective(local, problem)) < best * 0.99
    np.testing.assert_allclose(oracle.probabilities(exact), optimum, atol=0.003)


@pytest.mark.exactness(14)
def test_the_value_comes_to_the_expected_reward_of_each_prefix(double, problem):
    """Clips are uniform, so means over the batch are expectations.

    Least squares reaches E[R | prefix]. It explains Var E[R | prefix] / Var R, averaged over steps.
    """
    rewards, places = jnp.asarray(problem["rewards"]), oracle.contexts(oracle.CLIPS)
    slope = jax.jit(jax.grad(lambda v: policy_gradient.value_loss(v[places], rewards)[0]))
    values = jnp.zeros(oracle.CONTEXTS)
    for _ in range(400):
        values -= 2 * slope(values)
    table = problem["rewards"].reshape(4, 4, 4)
    levels = table.mean(), table.mean(axis=(1, 2)), table.mean(axis=2)
    expected = np.concatenate([np.ravel(level) for level in levels])
    np.testing.assert_allclose(values, expected, atol=1e-4)
    _, metrics = policy_gradient.value_loss(values[places], rewards)
    explained = np.mean([level.var() / table.var() for level in levels])
    np.testing.assert_allclose(metrics["explained_variance"], explained, atol=1e-6)


@pytest.mark.exactness(14)
def test_the_value_loss_is_least_at_the_expected_reward_of_each_prefix(double, problem):
    """The loss is taken over all clips by their probability under the policy."""
    probabilities = np.asarray(oracle.probabilities(jnp.asarray(problem["theta"])))
    index = np.asarray(oracle.contexts(oracle.CLIPS))
    expected = np.zeros(oracle.CONTEXTS)
    for context in range(len(expected)):
        weight = probabilities * (index == context).any(axis=1)
        expected[context] = (weight * problem["rewards"]).sum() / weight.sum()

    @jax.jit
    @jax.grad
    def slope(values):
        def clip_loss(values, reward):
            return policy_gradient.value_loss(values[None], reward[None])[0]

        losses = jax.vmap(clip_loss)(values[index], jnp.asarray(problem["rewards"]))
        return (probabilities * losses).sum()

    assert np.abs(np.asarray(slope(jnp.asarray(expected)))).max() < 1e-12
    assert np.abs(np.asarray(slope(jnp.asarray(problem["values"])))).max() > 1e-3


# --- advantages ---


@pytest.mark.exactness(13)
@pytest.mark.parametrize(
    ("baseline", "unequal"),
    [("leave_one_out", [-0.4, 0.4]), ("group", [-0.2, 0.2]), ("group_std", [-1, 1])],
)
def test_equal_rewards_of_a_group_give_no_advantage(double, baseline, unequal):
    rewards = jnp.asarray([0.3, 0.3, 0.9, 0.9, 0.1, 0.5])
    advantage = reward_advantage(choose(baseline), rewards, None)
    assert advantage.shape == (6, 1)
    np.testing.assert_array_equal(advantage[:4], np.zeros((4, 1)))
    np.testing.assert_allclose(advantage[4:, 0], unequal, rtol=1e-3)
    if baseline != "group_std":
        np.testing.assert_allclose(advantage[4:, 0], unequal)


def test_the_best_clips_of_a_group_share_an_advantage_of_1():
    rewards = jnp.asarray([0.3, 0.3, 0.9, 0.9, 0.1, 0.5])
    advantage = reward_advantage(choose("best"), rewards, None)[:, 0]
    np.testing.assert_array_equal(advantage, [0.5, 0.5, 0.5, 0.5, 0, 1])


@pytest.mark.exactness(12)
def test_rewards_reach_the_advantage_unchanged():
    """0.1 to 0.9 in float32, in order: no rounding, no whitening, no shuffling."""
    rewards = np.linspace(0.1, 0.9, 9).astype(np.float32)
    values = np.full((9, 4), 0.25, np.float32)
    advantage = reward_advantage(choose(), rewards, values)
    np.testing.assert_allclose(advantage, np.tile(rewards[:, None] - 0.25, (1, 4)), atol=1e-6)
    order = np.random.default_rng(0).permutation(9)
    shuffled = reward_advantage(choose(), rewards[order], values)
    np.testing.assert_array_equal(shuffled, advantage[order])


def test_ratios_beyond_the_clip_have_no_gradient(double):
    choice = choose("leave_one_out", "clipped", "local")
    log_old = jnp.log(jnp.full((2, 1, 2), 0.5))
    tokens = jnp.zeros((2, 1), jnp.int32)
    sampled = policy_gradient.scores(log_old, log_old, tokens)
    advantage, _ = policy_gradient.advantage(choice, sampled, jnp.asarray([1.0, 0.0]), None, 0.0)
    np.testing.assert_allclose(advantage.weight, [[1.0], [-1.0]])

    def loss(logit):
        log_new = jax.nn.log_softmax(jnp.stack([logit, jnp.zeros_like(logit)], axis=-1))
        current = policy_gradient.scores(log_new[:, None], log_old, tokens)
        return policy_gradient.policy_loss(choice, current, advantage, 0.0)

    gradient = jax.jit(jax.grad(loss, has_aux=True))

    def at(probability):
        slope, metrics = gradient(jnp.full(2, np.log(probability / (1 - probability))))
        return slope, metrics["clipped"]

    # A ratio of 1.4: the good clip is not raised further, the bad one is still lowered.
    raised, share = at(0.7)
    assert raised[0] == 0 < raised[1] and share == 1
    lowered, _ = at(0.3)
    assert lowered[0] < 0 == lowered[1]
    both, share = at(0.55)
    assert both[0] < 0 < both[1] and share == 0


# --- the KL ---


def test_the_kl_metric_is_the_enumerated_kl(double, problem):
    theta, anchor = (jnp.asarray(problem[name]) for name in ("theta", "anchor"))
    distributions = (oracle.log_distribution(logits, oracle.CLIPS) for logits in (theta, anchor))
    expected = (oracle.probabilities(theta) * full_kl(*distributions).sum(1)).sum()
    np.testing.assert_allclose(expected, oracle.kl(theta, problem), rtol=1e-12)


@pytest.mark.parametrize("never", [-1e9, -np.inf])
def test_the_kl_of_a_token_equals_scipys(never):
    """Of 7 codes the last has probability 0 in both, the first only in the policy."""
    policy, anchor = np.random.default_rng(1).normal(size=(2, 3, 5, 7))
    policy[..., [0, 6]] = anchor[..., 6] = never
    expected = rel_entr(softmax(policy, axis=-1), softmax(anchor, axis=-1)).sum(axis=-1)
    policy, anchor = policy.astype(np.float32), anchor.astype(np.float32)

    def kl(policy):
        return full_kl(*(jax.nn.log_softmax(x, axis=-1) for x in (policy, anchor)))

    np.testing.assert_allclose(kl(policy), expected, rtol=1e-4)
    assert expected.min() > 0.1
    slopes = jax.jit(jax.grad(lambda policy: kl(policy).sum()))(policy)
    assert np.isfinite(slopes).all() and np.abs(slopes[..., 1:6]).max() > 0.1
    np.testing.assert_array_equal(slopes[..., [0, 6]], 0.0)


def test_the_kl_is_infinite_where_the_anchor_excludes_a_code_of_the_policy():
    halves, one = np.log(np.float32([[[0.5, 0.5]]])), np.float32([[[0.0, -np.inf]]])
    assert full_kl(halves, one) == np.inf
    np.testing.assert_allclose(full_kl(one, halves), np.log(2), rtol=1e-6)


def test_the_future_sum_leaves_out_the_present():
    np.testing.assert_allclose(future_sum(jnp.array([[1.0, 2.0, 4.0]])), [[6.0, 4.0, 0.0]])


def test_the_other_clips_mean_leaves_out_the_clip():
    x = jnp.asarray([[1.0, 5.0], [3.0, 1.0]])
    np.testing.assert_allclose(other_clips_mean(x), x[::-1])
    np.testing.assert_allclose(other_clips_mean(x[:1]), [[0.0, 0.0]])


@pytest.mark.parametrize(
    ("strength", "kl", "expected"),
    [(0.01, 3.0, 0.0102), (0.01, 1.0, 0.0098), (0.01, 2.0, 0.01), (0.5, 9.0, 0.5)],
)
def test_the_kl_strength_follows_its_target(strength, kl, expected):
    adapted = policy_gradient.adapted_strength(jnp.float32(strength), jnp.float32(kl), target=2.0)
    assert adapted == pytest.approx(np.float32(expected))
    if strength == expected:
        assert adapted == np.float32(expected)


# --- errors ---


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"baseline": "rloo"}, "baseline"),
        ({"surrogate": "ppo"}, "surrogate"),
        ({"kl": "k3"}, "kl"),
        ({"clip": 1.0}, "clip"),
        ({"group": 1}, "group = 1 must be 2 or more"),
    ],
)
def test_bad_choices_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        PolicyGradient(**change)


def test_a_batch_that_is_not_a_whole_number_of_groups_is_refused():
    with pytest.raises(ValueError, match="3 clips is not a whole number of groups of 2"):
        reward_advantage(choose("group"), jnp.zeros(3), None)
