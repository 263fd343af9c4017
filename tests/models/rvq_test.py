"""Residual quantization against NumPy: codes, moving averages, dropout and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.cluster

from musicrl_jax.models import rvq

LEVELS, CODES, WIDTH = 3, 4, 2
train = jax.jit(rvq.train)


def numpy_quantize(codebooks, x):
    residual, codes, sums = np.array(x, np.float64), [], []
    for codebook in np.asarray(codebooks, np.float64):
        code = np.square(residual[..., None, :] - codebook).sum(-1).argmin(-1)
        residual = residual - codebook[code]
        codes.append(code)
        sums.append(x - residual)
    return np.stack(codes, -1), np.stack(sums)


def make_state(seed=0, count=5.0):
    codebooks = jax.random.normal(jax.random.key(seed), (LEVELS, CODES, WIDTH))
    counts = jnp.full((LEVELS, CODES), count)
    return {
        "codebooks": codebooks,
        "counts": counts,
        "sums": codebooks * count,
        "updates": jnp.asarray(10**6),
    }


def make_input(clips=4, steps=6, seed=1):
    return jax.random.normal(jax.random.key(seed), (clips, steps, WIDTH))


def test_quantize_and_dequantize_equal_numpy():
    codebooks, x = make_state()["codebooks"], make_input()
    codes, sums = numpy_quantize(codebooks, np.asarray(x))
    np.testing.assert_array_equal(rvq.quantize(codebooks, x), codes)
    assert rvq.quantize(codebooks, x).dtype == jnp.int32
    for q in range(1, LEVELS + 1):
        vectors = rvq.dequantize(codebooks, jnp.asarray(codes[..., :q]))
        np.testing.assert_allclose(vectors, sums[q - 1], atol=1e-6)


def test_a_code_of_minus_one_adds_nothing():
    codebooks = make_state()["codebooks"]
    codes = rvq.quantize(codebooks, make_input())
    silenced = codes.at[..., 1].set(-1)
    expected = rvq.dequantize(codebooks, codes) - codebooks[1][codes[..., 1]]
    np.testing.assert_allclose(rvq.dequantize(codebooks, silenced), expected, atol=1e-6)


def test_dacs_quantizer_gives_no_code_to_values_that_are_not_finite():
    factors = rvq.init_factored(jax.random.key(0), LEVELS, CODES, WIDTH, 2)
    x = make_input()
    codes = np.asarray(rvq.quantize_factored(factors, x))
    broken = np.array(rvq.quantize_factored(factors, x.at[1, 2].set(jnp.nan)))
    assert (codes >= 0).all() and (broken[1, 2] == -1).all()
    broken[1, 2] = codes[1, 2]
    np.testing.assert_array_equal(broken, codes)


def test_codes_of_more_levels_are_refused():
    with pytest.raises(ValueError, match="5 levels"):
        rvq.dequantize(make_state()["codebooks"], jnp.zeros((1, 5), jnp.int32))


def test_moving_averages_equal_a_hand_calculation():
    state = make_state()
    x = np.asarray(make_input())
    _, new = train(state, jnp.asarray(x), jax.random.key(0))
    residual = x.reshape(-1, WIDTH).astype(np.float64)
    for q in range(LEVELS):
        codebook = np.asarray(state["codebooks"][q])
        code = np.square(residual[:, None] - codebook[None]).sum(-1).argmin(-1)
        for c in range(CODES):
            count = 0.99 * 5.0 + 0.01 * (code == c).sum()
            total = 0.99 * 5.0 * codebook[c] + 0.01 * residual[code == c].sum(0)
            np.testing.assert_allclose(new["counts"][q, c], count, rtol=1e-6)
            np.testing.assert_allclose(new["codebooks"][q, c], total / count, rtol=1e-5, atol=1e-6)
        residual = residual - codebook[code]


def test_dead_codes_come_back_as_residuals_of_their_level():
    state = make_state()
    even_share = 24 / CODES
    counts = state["counts"].at[1, 2].set(0.05 * even_share)
    far = state["codebooks"].at[1, 2].set(1e3)  # no vector chooses it
    state = state | {"counts": counts, "codebooks": far, "sums": far * counts[..., None]}
    x = make_input()
    _, new = train(state, x, jax.random.key(0))
    codes, _ = numpy_quantize(state["codebooks"], np.asarray(x))
    first = np.asarray(state["codebooks"][0])[codes[..., 0]]
    residual = (np.asarray(x) - first).reshape(-1, WIDTH)
    revived = np.asarray(new["codebooks"][1, 2])
    assert np.abs(residual - revived).max(-1).min() < 1e-6
    np.testing.assert_allclose(new["counts"][1, 2], even_share)
    np.testing.assert_allclose(new["sums"][1, 2], even_share * revived, rtol=1e-6)
    alive = np.asarray(new["counts"]) != even_share
    assert alive.sum() == LEVELS * CODES - 1


def test_first_batch_starts_the_codebooks():
    state = rvq.init(jax.random.key(0), LEVELS, CODES, WIDTH)
    centres = np.asarray([[30.0, 0.0], [0.0, 30.0], [-30.0, 0.0], [0.0, -30.0]], np.float32)
    x = jnp.asarray(np.tile(centres, (2, 3, 1))) + 0.1 * make_input(2, 12)
    trained, new = train(state, x, jax.random.key(0))
    assert new["updates"] == 1
    codebook = np.asarray(new["codebooks"][0])
    assert np.abs(codebook[:, None] - centres[None]).max(-1).min(0).max() < 0.2
    assert trained.commitment < 0.02
    np.testing.assert_allclose(new["counts"].sum(-1), 24.0, rtol=1e-5)


def test_codebooks_fitted_to_vectors_with_long_tails_are_used_evenly():
    """k-means++ spends most codes on the tail; scikit-learn's distortion is hardly smaller."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 8)) * rng.lognormal(0, 1, size=(4000, 1))
    codebooks = rvq.fit(jax.random.key(0), jnp.asarray(x, jnp.float32), 2, 64)
    codes = rvq.quantize(codebooks, jnp.asarray(x, jnp.float32))
    used = np.asarray(rvq.perplexity(codes, 64))
    assert (used > 28).all()
    theirs = sklearn.cluster.KMeans(64, init="k-means++", n_init=1, random_state=0).fit(x)
    share = np.bincount(theirs.labels_, minlength=64) / len(x)
    assert used[0] > 1.2 * np.exp(-np.sum(share * np.log(np.maximum(share, 1e-12))))
    residual = x - np.asarray(codebooks)[0][np.asarray(codes[:, 0])]
    assert np.square(residual).sum() < 1.5 * theirs.inertia_


def test_fitted_levels_quantize_the_residuals_of_earlier_levels():
    rng = np.random.default_rng(3)
    centres = 10.0 * rng.normal(size=(6, 4))
    x = (centres[rng.integers(0, 6, 600)] + rng.normal(size=(600, 4))).astype(np.float32)
    codebooks = np.asarray(rvq.fit(jax.random.key(0), jnp.asarray(x), 3, 8))
    residual, errors = x, [np.square(x).mean()]
    for codebook in codebooks:
        code = np.square(residual[:, None] - codebook[None]).sum(-1).argmin(1)
        residual = residual - codebook[code]
        errors.append(np.square(residual).mean())
    assert errors[1] < 0.1 * errors[0]
    assert errors[3] < 0.8 * errors[2] < 0.64 * errors[1]


def test_a_first_batch_smaller_than_a_codebook_uses_every_level():
    x = make_input(clips=2, steps=5)
    state = rvq.init(jax.random.key(0), LEVELS, 16, WIDTH)
    trained, _ = train(state, x, jax.random.key(0))
    assert (np.asarray(rvq.perplexity(trained.codes, 16)) > 3).all()
    assert trained.commitment > 1e-4


def test_fewer_vectors_than_codes_are_refused():
    with pytest.raises(ValueError, match="16, but only 10"):
        rvq.fit(jax.random.key(0), jnp.zeros((10, 2)), 1, 16)


def test_dropout_keeps_a_uniform_number_of_first_levels():
    state = make_state()
    x = make_input(clips=300, steps=2)
    sums = numpy_quantize(state["codebooks"], np.asarray(x))[1]  # [Q, B, T, D]
    quantized = np.asarray(train(state, x, jax.random.key(3))[0].x)
    matches = np.abs(sums - quantized[None]).max((-1, -2)) < 1e-5  # [Q, B]
    assert matches.any(0).all()
    assert (np.abs(matches.sum(1) - 100) < 4 * np.sqrt(300 * 2 / 9)).all()


def test_gradient_goes_straight_through():
    weights = make_input(seed=9)
    state = make_state()

    def total(x):
        return jnp.sum(weights * rvq.train(state, x, jax.random.key(0))[0].x)

    np.testing.assert_allclose(jax.jit(jax.grad(total))(make_input()), weights, rtol=1e-6)


def test_every_level_commits():
    state, x = make_state(), make_input()
    gradient = jax.jit(jax.grad(lambda x: rvq.train(state, x, jax.random.key(0))[0].commitment))(x)
    sums = numpy_quantize(state["codebooks"], np.asarray(x))[1]
    per_level = [2 * (np.asarray(x) - level) / (LEVELS * x.size) for level in sums]
    assert all(np.abs(part).max() > 1e-3 for part in per_level)
    np.testing.assert_allclose(gradient, functools.reduce(np.add, per_level), atol=1e-6)


def test_perplexity_of_even_and_single_use():
    codes = jnp.stack([jnp.arange(8) % 4, jnp.zeros(8, jnp.int32)], -1)
    np.testing.assert_allclose(rvq.perplexity(codes, 4), [4.0, 1.0], rtol=1e-6)


def test_statistics_are_those_of_the_global_batch():
    state, x = make_state(), make_input(clips=8)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    one, many = train(state, x, jax.random.key(0)), train(state, spread, jax.random.key(0))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
