"""The policy gradient against enumeration (see `oracle`): what is called exact is, known mistakes are caught."""

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
    other_clips_mean,
    still_to_come,
)
from musicrl_jax.systems.system import Sampling

EXACT = [(baseline, kl) for baseline in ("value", "leave_one_out") for kl in ("exact", "sampled")]


def a_choice(baseline="value", surrogate="reinforce", kl="exact"):
    return PolicyGradient(baseline, surrogate, kl, group=2)


@pytest.fixture(scope="module")
def double():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def problem():
    return oracle.problem()


@pytest.fixture(scope="module")
def truth(double, problem):
    return oracle.finite_difference(
        lambda theta: oracle.objective(theta, problem), problem["theta"]
    )


def test_the_readme_shows_the_table_as_it_is(truth, problem):
    readme = Path(__file__).parents[2] / "README.md"
    assert oracle.table(problem, truth) in readme.read_text(encoding="utf-8")


@pytest.mark.exactness(1, 4)
@pytest.mark.parametrize("surrogate", ["reinforce", "clipped"])
@pytest.mark.parametrize(("baseline", "kl"), EXACT)
def test_the_mean_gradient_of_the_first_update_is_that_of_the_objective(
    truth, problem, baseline, surrogate, kl
):
    assert (
        oracle.error(oracle.mean_gradient(a_choice(baseline, surrogate, kl), problem), truth) < 1e-7
    )


@pytest.mark.exactness(1)
def test_baselines_across_clips_leave_the_gradient_exact(truth, problem):
    """Batches of two clips, each the other's baseline for the KL still to come."""
    for kl in ("exact", "sampled"):
        assert oracle.error(oracle.mean_gradient(a_choice(kl=kl), problem, batch=2), truth) < 1e-7


@pytest.mark.exactness(13)
def test_a_mean_with_its_own_reward_in_it_shrinks_the_rewards_gradient(double, problem):
    """By (G - 1) / G, exactly; the KL's gradient stays."""
    theta = problem["theta"]
    reward = oracle.finite_difference(lambda theta: oracle.expected_reward(theta, problem), theta)
    kl = oracle.finite_difference(lambda theta: oracle.kl(theta, problem), theta)
    expected = (1 - oracle.STRENGTH) * reward / 2 - oracle.STRENGTH * kl
    assert oracle.error(oracle.mean_gradient(a_choice("group"), problem), expected) < 1e-7


def test_what_is_biased_by_definition_shows_it(truth, problem):
    for choice in (
        a_choice("group"),
        a_choice("group_std"),
        a_choice("best"),
        a_choice(kl="local"),
    ):
        assert oracle.error(oracle.mean_gradient(choice, problem), truth) > 0.05, choice


@pytest.mark.exactness(13)
def test_equal_rewards_of_a_group_give_no_advantage(double):
    rewards = jnp.asarray([0.3, 0.3, 0.9, 0.9, 0.1, 0.5])
    for baseline in ("leave_one_out", "group", "group_std"):
        found = policy_gradient.reward_advantage(a_choice(baseline), rewards, None)
        np.testing.assert_array_equal(found[:4], np.zeros((4, 1)))
        assert found.shape == (6, 1) and found[4, 0] < 0 < found[5, 0]
    np.testing.assert_allclose(
        policy_gradient.reward_advantage(a_choice("leave_one_out"), rewards, None)[4:, 0],
        [-0.4, 0.4],
    )
    np.testing.assert_allclose(
        policy_gradient.reward_advantage(a_choice("group"), rewards, None)[4:, 0], [-0.2, 0.2]
    )
    np.testing.assert_allclose(
        policy_gradient.reward_advantage(a_choice("group_std"), rewards, None)[4:, 0],
        [-1, 1],
        rtol=1e-3,
    )
    best = policy_gradient.reward_advantage(a_choice("best"), rewards, None)[:, 0]
    np.testing.assert_array_equal(best, [0.5, 0.5, 0.5, 0.5, 0, 1])


@pytest.mark.exactness(2)
def test_a_baseline_that_saw_the_action_is_caught(truth, problem):
    late = np.concatenate(
        [problem["values"][oracle.contexts(oracle.CLIPS)][:, 1:], problem["rewards"][:, None]],
        axis=1,
    )
    assert oracle.error(oracle.mean_gradient(a_choice(), problem, values=late), truth) > 1


def with_kl_loss(penalty):
    """The library's loss with another KL in it: penalty(log_probs, log-probs of the anchor) of the tokens."""

    def loss(choice, current, advantage, strength):
        cost = strength * penalty(current.log_probs, current.anchor)
        return -(current.log_probs * advantage.weight - cost).sum(axis=1).mean(), {}

    return loss


@pytest.mark.exactness(3)
def test_sampled_log_ratio_as_a_loss_is_caught(truth, problem):
    """Its expected gradient is zero, so the KL term is missing altogether."""
    found = oracle.mean_gradient(
        a_choice(kl="local"), problem, loss=with_kl_loss(lambda ours, theirs: ours - theirs)
    )
    assert oracle.error(found, truth) > 0.1
    reward = oracle.finite_difference(
        lambda theta: oracle.expected_reward(theta, problem), problem["theta"]
    )
    np.testing.assert_allclose(found, (1 - oracle.STRENGTH) * reward, atol=1e-8)


def k3(ours, theirs):
    """Schulman's estimate of the KL: unbiased for its value, at least 0."""
    return jnp.exp(theirs - ours) - 1 - (theirs - ours)


@pytest.mark.exactness(4)
def test_other_estimates_of_the_kl_are_caught(truth, problem):
    """k3 as a loss, as in GRPO; and in the reward, where its value is right and its gradient is not."""

    def in_the_reward(choice, current, advantage, strength):
        estimate = jax.lax.stop_gradient(k3(current.log_probs, current.anchor))
        weight = advantage.weight - strength * policy_gradient.from_here_on(estimate)
        return -(current.log_probs * weight).sum(axis=1).mean(), {}

    for loss in (with_kl_loss(k3), in_the_reward):
        assert (
            oracle.error(oracle.mean_gradient(a_choice(kl="local"), problem, loss=loss), truth)
            > 0.1
        )


@pytest.fixture(scope="module")
def filtered(double, problem):
    """The problem of a policy that draws the likelier two of the four codes, and what the gradient is there."""
    problem = problem | {
        "allowed": np.asarray(Sampling(1.0, top_k=2).allowed(jnp.asarray(problem["theta"])))
    }
    return problem, oracle.finite_difference(
        lambda theta: oracle.objective(theta, problem), problem["theta"]
    )


@pytest.mark.exactness(7)
@pytest.mark.parametrize(("baseline", "kl"), EXACT)
def test_a_filtered_policy_has_its_own_exact_gradient(filtered, baseline, kl):
    problem, truth = filtered
    assert oracle.error(oracle.mean_gradient(a_choice(baseline, kl=kl), problem), truth) < 1e-7


@pytest.mark.exactness(7)
def test_scoring_a_filtered_policy_on_all_codes_is_caught(filtered):
    problem, truth = filtered
    assert (
        oracle.cosine(oracle.mean_gradient(a_choice(), problem, scored_on="all codes"), truth) < 0.9
    )


@pytest.mark.exactness(14)
def test_the_value_comes_to_the_expected_reward_of_each_prefix(double, problem):
    """Clips are uniform here, so that means over the batch are expectations. Least squares reaches E[R | prefix]; what
    it explains of R is Var E[R | prefix] / Var R, the mean over the steps.
    """
    rewards, places = jnp.asarray(problem["rewards"]), oracle.contexts(oracle.CLIPS)
    slope = jax.grad(lambda v: policy_gradient.value_loss(v[places], rewards)[0])
    values = jnp.zeros(oracle.CONTEXTS)
    for _ in range(400):
        values -= 2 * slope(values)
    table = problem["rewards"].reshape(4, 4, 4)
    expected = np.concatenate([[table.mean()], table.mean(axis=(1, 2)), table.mean(axis=2).ravel()])
    np.testing.assert_allclose(values, expected, atol=1e-4)
    _, metrics = policy_gradient.value_loss(values[places], rewards)
    shares = [
        level.var() / table.var()
        for level in (table.mean(), table.mean(axis=(1, 2)), table.mean(axis=2))
    ]
    np.testing.assert_allclose(metrics["explained_variance"], np.mean(shares), atol=1e-6)


def ascended(problem, choice, steps=30_000, rate=0.5):
    """The policy after gradient ascent with the library's mean gradient from the anchor."""

    def step(_, theta):
        return theta + rate * oracle.mean_gradient(choice, problem | {"theta": theta})

    return jax.jit(lambda theta: jax.lax.fori_loop(0, steps, step, theta))(
        jnp.asarray(problem["anchor"])
    )


@pytest.fixture(scope="module")
def optimum(double, problem):
    """The distribution over clips that J prefers: anchor exp(R / beta) / Z, beta = a / (1 - a)."""
    beta = oracle.STRENGTH / (1 - oracle.STRENGTH)
    weight = oracle.probabilities(problem["anchor"]) * np.exp(problem["rewards"] / beta)
    return weight / weight.sum()


@pytest.mark.exactness(5)
def test_ascent_reaches_the_regularised_optimum(problem, optimum):
    """Its objective and its distribution within .3 %; without the KL still to come it stops short."""
    log_anchor = np.log(oracle.probabilities(problem["anchor"]))
    best = float(
        (1 - oracle.STRENGTH) * (optimum * problem["rewards"]).sum()
        - oracle.STRENGTH * (optimum * (np.log(optimum) - log_anchor)).sum()
    )
    reached = {kl: ascended(problem, a_choice(kl=kl)) for kl in ("exact", "local")}
    values = {kl: float(oracle.objective(theta, problem)) for kl, theta in reached.items()}
    assert best * 0.997 < values["exact"] <= best + 1e-9
    assert values["local"] < best * 0.99
    np.testing.assert_allclose(oracle.probabilities(reached["exact"]), optimum, atol=0.003)


def test_a_second_update_on_a_rollout_is_biased_by_the_states_alone(double, problem, truth):
    """Clipped, after a small step: near the truth there, not on it; and 'reinforce' there is far off."""
    moved = problem["theta"] + oracle.STEP * truth
    there = oracle.finite_difference(lambda theta: oracle.objective(theta, problem), moved)
    assert (
        1e-6
        < oracle.error(
            oracle.mean_gradient(a_choice(surrogate="clipped"), problem, theta=moved), there
        )
        < 0.02
    )


def test_ratios_beyond_the_clip_stop_pulling(double):
    choice = a_choice("leave_one_out", "clipped", "local")
    log_old = jnp.log(jnp.asarray([[[0.5, 0.5]], [[0.5, 0.5]]]))
    tokens = jnp.zeros((2, 1), jnp.int32)
    drawn = policy_gradient.scores(log_old, log_old, tokens)
    found, _ = policy_gradient.advantage(choice, drawn, jnp.asarray([1.0, 0.0]), None, 0.0)
    np.testing.assert_allclose(found.weight, [[1.0], [-1.0]])

    def pull(probability):
        def loss(logit):
            log_new = jax.nn.log_softmax(jnp.stack([logit, jnp.zeros_like(logit)], axis=-1))[
                :, None
            ]
            current = policy_gradient.scores(log_new, log_old, tokens)
            return policy_gradient.policy_loss(choice, current, found, 0.0)

        logit = jnp.log(probability / (1 - probability))
        gradient, metrics = jax.grad(loss, has_aux=True)(jnp.asarray([logit, logit]))
        return np.asarray(gradient), float(metrics["clipped"])

    raised, share = pull(
        0.7
    )  # a ratio of 1.4: the good clip has had enough, the bad one is still pushed down
    assert raised[0] == 0 < raised[1] and share == 1
    lowered, _ = pull(0.3)
    assert lowered[0] < 0 == lowered[1]
    both, share = pull(0.55)
    assert both[0] < 0 < both[1] and share == 0


def test_kl_metric_is_the_enumerated_kl(double, problem):
    theta, anchor = (jnp.asarray(problem[name]) for name in ("theta", "anchor"))
    per_clip = full_kl(
        oracle.log_distribution(theta, oracle.CLIPS), oracle.log_distribution(anchor, oracle.CLIPS)
    ).sum(1)
    np.testing.assert_allclose(
        (oracle.probabilities(theta) * per_clip).sum(), oracle.kl(theta, problem), rtol=1e-12
    )


@pytest.mark.parametrize("never", [-1e9, -np.inf])
def test_kl_of_a_token_equals_scipy(never):
    """Of 7 codes the last is in neither distribution, and the first in the anchor's alone."""
    policy, anchor = np.random.default_rng(1).normal(size=(2, 3, 5, 7))
    policy[..., [0, 6]] = anchor[..., 6] = never
    expected = rel_entr(softmax(policy, axis=-1), softmax(anchor, axis=-1)).sum(axis=-1)
    log_policy, log_anchor = (
        jax.nn.log_softmax(x.astype(np.float32), axis=-1) for x in (policy, anchor)
    )
    np.testing.assert_allclose(full_kl(log_policy, log_anchor), expected, rtol=1e-4)
    assert expected.min() > 0.1
    slopes = jax.grad(lambda x: full_kl(jax.nn.log_softmax(x, axis=-1), log_anchor).sum())(
        policy.astype(np.float32)
    )
    assert np.isfinite(slopes).all() and np.abs(slopes[..., 1:6]).max() > 0.1
    np.testing.assert_array_equal(slopes[..., [0, 6]], 0.0)


def test_kl_is_infinite_where_the_anchor_forbids_what_the_policy_draws():
    halves, one = np.log(np.float32([[[0.5, 0.5]]])), np.float32([[[0.0, -np.inf]]])
    assert full_kl(halves, one) == np.inf
    np.testing.assert_allclose(full_kl(one, halves), np.log(2), rtol=1e-6)


def test_still_to_come_leaves_out_the_present():
    np.testing.assert_allclose(still_to_come(jnp.array([[1.0, 2.0, 4.0]])), [[6.0, 4.0, 0.0]])


def test_other_clips_mean_leaves_out_the_clip():
    x = jnp.asarray([[1.0, 5.0], [3.0, 1.0]])
    np.testing.assert_allclose(other_clips_mean(x), x[::-1])
    np.testing.assert_allclose(other_clips_mean(x[:1]), [[0.0, 0.0]])


@pytest.mark.exactness(12)
def test_rewards_reach_the_advantage_as_they_are():
    """0.1 to 0.9 in float32, in their order: no rounding to integers, no whitening, no shuffling."""
    rewards = np.linspace(0.1, 0.9, 9).astype(np.float32)
    values = np.full((9, 4), 0.25, np.float32)
    found = policy_gradient.reward_advantage(a_choice(), rewards, values)
    np.testing.assert_allclose(found, np.tile(rewards[:, None] - 0.25, (1, 4)), atol=1e-6)
    order = np.random.default_rng(0).permutation(9)
    np.testing.assert_array_equal(
        policy_gradient.reward_advantage(a_choice(), rewards[order], values), found[order]
    )


@pytest.mark.exactness(14)
def test_values_fit_the_expected_reward_of_the_prefix(double, problem):
    """The minimum of the value loss over all clips, by probability, is E[R | prefix]."""
    probabilities = np.asarray(oracle.probabilities(jnp.asarray(problem["theta"])))
    index = np.asarray(oracle.contexts(oracle.CLIPS))
    expected = np.zeros(oracle.CONTEXTS)
    for context in range(len(expected)):
        rows = (index == context).any(axis=1)
        expected[context] = (probabilities * problem["rewards"])[rows].sum() / probabilities[
            rows
        ].sum()

    def loss(values):
        def one(tokens, reward):
            return policy_gradient.value_loss(values[oracle.contexts(tokens[None])], reward[None])[
                0
            ]

        losses = jax.vmap(one)(jnp.asarray(oracle.CLIPS), jnp.asarray(problem["rewards"]))
        return (jnp.asarray(probabilities) * losses).sum()

    assert np.abs(np.asarray(jax.grad(loss)(jnp.asarray(expected)))).max() < 1e-12
    assert np.abs(np.asarray(jax.grad(loss)(jnp.asarray(problem["values"])))).max() > 1e-3


def test_the_kl_strength_follows_its_target():
    strength = jnp.float32(0.01)
    assert policy_gradient.adapted_strength(
        strength, jnp.float32(3.0), target=2.0
    ) == pytest.approx(0.0102)
    assert policy_gradient.adapted_strength(
        strength, jnp.float32(1.0), target=2.0
    ) == pytest.approx(0.0098)
    assert policy_gradient.adapted_strength(strength, jnp.float32(2.0), target=2.0) == strength
    assert policy_gradient.adapted_strength(jnp.float32(0.5), jnp.float32(9.0), target=2.0) == 0.5


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"baseline": "rloo"}, "baseline"),
        ({"surrogate": "ppo"}, "surrogate"),
        ({"kl": "k3"}, "kl"),
        ({"clip": 1.0}, "clip"),
        ({"group": 1}, "group = 1: a clip is compared with others"),
    ],
)
def test_bad_choices_are_named(change, word):
    with pytest.raises(ValueError, match=word):
        PolicyGradient(**change)


def test_a_batch_that_is_no_whole_number_of_groups_is_refused():
    with pytest.raises(ValueError, match="3 clips is no whole number of groups of 2"):
        policy_gradient.reward_advantage(a_choice("group"), jnp.zeros(3), None)
