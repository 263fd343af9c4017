"""k-means against scikit-learn, NumPy, and one device against eight."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.exceptions import ConvergenceWarning

from musicrl_jax.core import sharding
from musicrl_jax.models import kmeans


def blobs(points, codes, width, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(codes, width)) * 10
    x = centres[rng.integers(0, codes, points)] + rng.normal(size=(points, width))
    return x.astype(np.float32)


def inertia(x, centroids):
    difference = x[:, None].astype(np.float64) - np.asarray(centroids, np.float64)[None]
    return np.square(difference).sum(-1).min(1).sum()


def cloud(points, width, seed=0):
    """Draws points without clear clusters, like features: the harder case."""
    rng = np.random.default_rng(seed)
    return np.tanh(rng.normal(size=(points, 3)) @ rng.normal(size=(3, width)), dtype=np.float32)


start_of = jax.jit(kmeans.plus_plus, static_argnames="codes")


def lloyd(streamed, start, x, iterations):
    run = kmeans.streamed_lloyd if streamed else kmeans.lloyd
    return run(jnp.asarray(start), x if streamed else jnp.asarray(x), iterations)


def test_fit_is_as_good_as_sklearns_on_blobs():
    x = blobs(2000, 16, 8)
    ours = min(inertia(x, kmeans.fit(jax.random.key(s), x, 16, 20).centroids) for s in range(3))
    assert ours <= 1.02 * KMeans(16, n_init=3, random_state=0).fit(x).inertia_


@pytest.mark.parametrize("iterations", [1, 4, 300])
@pytest.mark.parametrize("streamed", [False, True])
def test_lloyd_equals_sklearn_from_the_same_start(monkeypatch, iterations, streamed):
    monkeypatch.setattr(kmeans, "BLOCK", 256)  # 900 points: four blocks, the last one padded
    monkeypatch.setattr(kmeans, "TOLERANCE", 0.0)
    x = cloud(900, 6)
    theirs = KMeans(12, init=x[:12], n_init=1, max_iter=iterations, tol=0.0, algorithm="lloyd")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        theirs.fit(x)
    ours = lloyd(streamed, x[:12], x, iterations)
    np.testing.assert_allclose(ours.centroids, theirs.cluster_centers_, atol=1e-5)
    np.testing.assert_allclose(ours.inertia, theirs.inertia_ / x.size, rtol=1e-5)
    np.testing.assert_allclose(
        ours.share, np.bincount(theirs.labels_, minlength=12) / 900, rtol=1e-6
    )
    assert bool(ours.converged) == (iterations == 300)
    assert ours.iterations == iterations or (iterations == 300 and ours.iterations < 100)


@pytest.mark.parametrize("streamed", [False, True])
def test_lloyd_stops_when_an_iteration_gains_too_little(streamed):
    x = cloud(3000, 5, seed=1)
    fit = lloyd(streamed, x[:20], x, 300)
    assert fit.converged
    last = int(fit.iterations)
    assert 5 < last < 100
    inertias = [lloyd(streamed, x[:20], x, n).inertia for n in range(last - 2, last + 1)]
    inertias = np.asarray(inertias)
    gains = 1 - inertias[1:] / inertias[:-1]
    assert gains[0] > kmeans.TOLERANCE > gains[1] >= 0


def test_usage_is_that_of_the_returned_centroids():
    x = blobs(600, 5, 3)
    fit = lloyd(False, x[:8], x, 2)
    distance = np.square(x[:, None] - np.asarray(fit.centroids)[None]).sum(-1)
    share = np.bincount(distance.argmin(1), minlength=8) / 600
    usage = fit.usage()
    np.testing.assert_allclose(fit.share, share, rtol=1e-6)
    np.testing.assert_allclose(usage["inertia"], distance.min(1).mean() / 3, rtol=1e-4)
    np.testing.assert_allclose(usage["perplexity"], np.exp(scipy.stats.entropy(share)), rtol=1e-5)
    np.testing.assert_allclose(usage["largest_share"], share.max(), rtol=1e-6)
    assert float(usage["used"]) == np.sum(share > 0)
    assert (float(usage["iterations"]), float(usage["converged"])) == (2, 0)


@pytest.mark.parametrize("streamed", [False, True])
def test_empty_centroids_move_to_the_farthest_points(streamed):
    x = np.asarray([[0.0], [1.0], [2.0], [100.0], [200.0]], np.float32)
    fit = lloyd(streamed, [[1.0], [-1e4], [-2e4]], x, 1)
    np.testing.assert_allclose(fit.centroids, [[60.6], [200.0], [100.0]], rtol=1e-6)


def test_the_start_is_no_worse_than_sklearns():
    """By a one-sided Welch test of 40 seeds, which plain k-means++ fails by far."""
    x = cloud(640, 8, seed=2)
    ours, theirs, plain = [], [], []
    for seed in range(40):
        ours.append(inertia(x, start_of(jax.random.key(seed), jnp.asarray(x), 40)))
        theirs.append(inertia(x, kmeans_plusplus(x, 40, random_state=seed)[0]))
        plain.append(inertia(x, kmeans_plusplus(x, 40, random_state=seed, n_local_trials=1)[0]))

    def worse(inertias):
        options = {"equal_var": False, "alternative": "greater"}
        return scipy.stats.ttest_ind(inertias, theirs, **options).pvalue

    assert worse(ours) > 0.01 and worse(plain) < 1e-6


def test_mini_batches_keep_each_centroid_at_the_mean_of_its_points(monkeypatch):
    monkeypatch.setattr(kmeans, "BLOCK", 64)
    x = blobs(200, 4, 3, seed=5)
    centroids, sums, counts = x[:4].astype(np.float64), np.zeros((4, 3)), np.zeros(4)
    for begin in range(0, 200, 64):
        part = x[begin : begin + 64].astype(np.float64)
        code = np.square(part[:, None] - centroids[None]).sum(-1).argmin(1)
        np.add.at(sums, code, part)
        counts += np.bincount(code, minlength=4)
        centroids = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centroids)
    np.testing.assert_allclose(kmeans.mini_batches(jnp.asarray(x[:4]), x), centroids, rtol=1e-5)


def test_mini_batches_and_then_a_few_passes_are_as_good_as_sklearns_full_batch(monkeypatch):
    monkeypatch.setattr(kmeans, "BLOCK", 512)
    x = cloud(6000, 8, seed=3)
    theirs = KMeans(64, n_init=1, random_state=0).fit(x).inertia_ / x.size
    fit = kmeans.fit(jax.random.key(0), x, 64, 300)
    assert fit.converged
    assert fit.inertia < 1.02 * theirs
    start = start_of(jax.random.key(1), jnp.asarray(x), 64)
    once = inertia(x, kmeans.mini_batches(start, x)) / x.size
    assert once < 1.1 * theirs < 0.9 * inertia(x, start) / x.size


def test_a_mesh_gives_the_same_result_as_one_device(monkeypatch):
    monkeypatch.setattr(kmeans, "BLOCK", 128)
    x = cloud(400, 6, seed=4)
    alone = kmeans.fit(jax.random.key(0), x, 8, 50)
    with jax.set_mesh(sharding.make_mesh(fsdp=2)):
        block, _ = next(kmeans._blocks(x))
        assert block.addressable_shards[0].data.shape == (16, 6)
        spread = kmeans.fit(jax.random.key(0), x, 8, 50)
    np.testing.assert_allclose(spread.centroids, alone.centroids, atol=1e-5)
    np.testing.assert_array_equal(spread.share, alone.share)
    assert spread.iterations == alone.iterations


def test_nearest_takes_the_first_of_equals():
    centroids = jnp.asarray([[5.0, 5.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    codes = kmeans.nearest(centroids, jnp.asarray([[0.9, 0.1], [0.0, 0.0], [-2.0, 0.0]]))
    np.testing.assert_array_equal(codes, [1, 1, 3])
    x, many = cloud(500, 7), cloud(90, 7, seed=9)
    expected = np.square(x[:, None] - many[None]).sum(-1).argmin(1)
    np.testing.assert_array_equal(kmeans.nearest(jnp.asarray(many), jnp.asarray(x)), expected)


def test_plus_plus_reaches_every_far_blob():
    x = np.repeat(np.asarray([[0, 0], [1e3, 0], [0, 1e3], [1e3, 1e3]], np.float32), 50, 0)
    for seed in range(5):
        start = start_of(jax.random.key(seed), jnp.asarray(x), 4)
        assert len(np.unique(np.asarray(start), axis=0)) == 4


def test_identical_points_give_finite_centroids():
    fit = kmeans.fit(jax.random.key(0), np.ones((40, 3), np.float32), 8, 3)
    assert np.isfinite(fit.centroids).all()


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match="only 7 points"):
        kmeans.fit(jax.random.key(0), np.ones((7, 3), np.float32), 8, 3)
