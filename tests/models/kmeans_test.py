import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans

from musicrl_jax.models import kmeans


def blobs(points, codes, width, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(codes, width)) * 10
    return (centres[rng.integers(0, codes, points)] + rng.normal(size=(points, width))).astype(np.float32)


def inertia(x, centroids):
    return np.square(x[:, None].astype(np.float64) - np.asarray(centroids, np.float64)[None]).sum(-1).min(1).sum()


def test_as_good_as_sklearn_on_blobs():
    x = blobs(2000, 16, 8)
    ours = min(inertia(x, kmeans.kmeans(jax.random.key(s), jnp.asarray(x), 16, 20)) for s in range(3))
    assert ours <= 1.02 * KMeans(16, n_init=3, random_state=0).fit(x).inertia_


def test_lloyd_step_equals_numpy_across_blocks(monkeypatch):
    monkeypatch.setattr(kmeans, "BLOCK", 64)  # 150 points: three blocks, the last one padded
    x = blobs(150, 5, 3)
    centroids = x[:5]
    assigned = np.square(x[:, None] - centroids[None]).sum(-1).argmin(1)
    expected = np.stack([x[assigned == c].mean(0) for c in range(5)])
    np.testing.assert_allclose(kmeans.lloyd_step(jnp.asarray(centroids), jnp.asarray(x)), expected, rtol=1e-5)


def test_empty_centroids_move_to_the_farthest_points():
    x = jnp.asarray([[0.0], [1.0], [2.0], [100.0], [200.0]])
    centroids = jnp.asarray([[1.0], [-1e4], [-2e4]])
    moved = kmeans.lloyd_step(centroids, x)
    np.testing.assert_allclose(moved, [[60.6], [200.0], [100.0]], rtol=1e-6)


def test_plus_plus_reaches_every_far_blob():
    x = np.repeat(np.asarray([[0, 0], [1e3, 0], [0, 1e3], [1e3, 1e3]], np.float32), 50, 0)
    for seed in range(5):
        start = kmeans.plus_plus(jax.random.key(seed), jnp.asarray(x), 4)
        assert len(np.unique(np.asarray(start), axis=0)) == 4


def test_finite_on_identical_points():
    assert np.isfinite(kmeans.kmeans(jax.random.key(0), jnp.ones((40, 3)), 8, 3)).all()


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match="only 7 points"):
        kmeans.kmeans(jax.random.key(0), jnp.ones((7, 3)), 8, 3)


def test_rvq_levels_follow_each_other():
    x = blobs(600, 6, 4, seed=3)
    codebooks = np.asarray(kmeans.fit_rvq(jax.random.key(0), jnp.asarray(x), 3, 8, 10))
    residual, errors = x, [np.square(x).mean()]
    for codebook in codebooks:
        residual = residual - codebook[np.square(residual[:, None] - codebook[None]).sum(-1).argmin(1)]
        errors.append(np.square(residual).mean())
    assert errors[1] < 0.1 * errors[0]
    assert errors[3] < 0.8 * errors[2] < 0.64 * errors[1]
