"""Bradley-Terry and DPO against closed forms: planted utilities and the optimal policy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from musicrl_jax.losses.preference import bradley_terry, dpo_margin

CLIPS = 6
PAIRS = np.array(list(itertools.combinations(range(CLIPS), 2)))  # [15, 2]
CONTRAST = np.eye(CLIPS)[PAIRS[:, 0]] - np.eye(CLIPS)[PAIRS[:, 1]]  # [15, 6]


@pytest.fixture(scope="module")
def utilities():
    """Returns utilities of mean 0; pairs do not determine a constant."""
    random = np.random.default_rng(0).normal(size=CLIPS)
    return random - random.mean()


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def fitted(pairs, votes):
    """Minimises the loss by Newton's steps; the utilities have mean 0."""
    x, votes = jnp.asarray(CONTRAST[pairs]), jnp.asarray(votes)
    loss = jax.jit(lambda u: bradley_terry(x @ u, votes)[0] + jnp.mean(u) ** 2)
    slope, curve = jax.jit(jax.grad(loss)), jax.jit(jax.hessian(loss))
    u = jnp.zeros(CLIPS)
    for _ in range(12):
        u -= jnp.linalg.solve(curve(u), slope(u))
    return np.asarray(u)


def draw(utilities, count=50_000):
    """Returns pairs, votes, and standard errors of the utilities by Fisher's information."""
    rng = np.random.default_rng(1)
    pairs = rng.integers(len(PAIRS), size=count)
    chance = expit(CONTRAST[pairs] @ utilities)
    information = (CONTRAST[pairs] * (chance * (1 - chance))[:, None]).T @ CONTRAST[pairs]
    errors = np.sqrt(np.diag(np.linalg.pinv(information)))  # without the constant
    return pairs, (rng.uniform(size=count) < chance).astype(float), errors


@pytest.mark.exactness(20)
def test_planted_utilities_come_back_exactly_from_expected_votes(double, utilities):
    pairs = np.arange(len(PAIRS))
    np.testing.assert_allclose(fitted(pairs, expit(CONTRAST @ utilities)), utilities, atol=1e-8)


@pytest.mark.exactness(20)
def test_planted_utilities_come_back_within_their_errors_from_random_votes(double, utilities):
    pairs, votes, errors = draw(utilities)
    gaps = np.abs(fitted(pairs, votes) - utilities)
    assert (gaps < 4 * errors).all() and gaps.max() > 0.1 * errors.min()


@pytest.mark.exactness(20)
def test_shuffled_votes_teach_nothing(double, utilities):
    """With shuffled clips in each pair, the fit is 0 within its errors and at chance."""
    pairs, votes, errors = draw(utilities)
    shuffled = np.random.default_rng(3).permuted(np.stack([votes, 1 - votes]), axis=0)[0]
    random = fitted(pairs, shuffled)
    assert (np.abs(random) < 4 * errors).all()
    nats, metrics = bradley_terry(jnp.asarray(CONTRAST[pairs] @ random), jnp.asarray(shuffled))
    assert 0.69 < nats < np.log(2) and abs(metrics["accuracy"] - 0.5) < 0.02
    truth, metrics = bradley_terry(jnp.asarray(CONTRAST[pairs] @ utilities), jnp.asarray(votes))
    assert truth < 0.67 and metrics["accuracy"] > 0.6


@pytest.mark.exactness(20)
def test_a_swapped_pair_is_the_same_vote(utilities):
    margin, vote = jnp.asarray([0.3, -2.0, 1.0, 0.0]), jnp.asarray([1.0, 0.0, 0.5, 0.25])
    whole = jax.value_and_grad(bradley_terry, has_aux=True)
    (one, metrics), slope = whole(margin, vote)
    (two, swapped), back = whole(-margin, 1 - vote)
    np.testing.assert_allclose(two, one, rtol=1e-6)
    np.testing.assert_allclose(back, -slope, rtol=1e-6)
    np.testing.assert_allclose(swapped["accuracy"], metrics["accuracy"], rtol=1e-6)


def test_accuracy_leaves_ties_out_and_halves_margins_of_zero():
    margin = jnp.asarray([1.0, -1.0, 5.0, 0.0])
    metrics = bradley_terry(margin, jnp.asarray([1.0, 1.0, 0.5, 0.0]))[1]
    np.testing.assert_allclose(metrics["accuracy"], (1 + 0 + 0.5) / 3, rtol=1e-6)


def test_dpo_reaches_the_regularised_optimum(double, utilities):
    """With Bradley-Terry's votes it is anchor exp(utility / beta) / Z, as for the RL objective."""
    anchor, beta = np.random.default_rng(4).dirichlet(np.ones(CLIPS)), 0.7
    votes = jnp.asarray(expit(CONTRAST @ utilities))

    def loss(logits):
        policy = jax.nn.log_softmax(logits)[PAIRS]
        return bradley_terry(dpo_margin(policy, jnp.log(anchor)[PAIRS], beta), votes)[0]

    slope = jax.grad(loss)
    logits = jax.jit(lambda x: jax.lax.fori_loop(0, 4000, lambda _, x: x - 5 * slope(x), x))(
        jnp.zeros(CLIPS)
    )
    best = anchor * np.exp(utilities / beta)
    np.testing.assert_allclose(jax.nn.softmax(logits), best / best.sum(), atol=1e-6)
