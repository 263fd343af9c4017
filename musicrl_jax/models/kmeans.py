"""k-means on the device: what starts the codec's codebooks and makes semantic and MuLan tokens.

Letters: P points, D width, C codes, Q levels, S points of the k-means++ sample.
"""

import functools

import jax
import jax.numpy as jnp

BLOCK = 16384  # Points whose distances to all centroids are held at once: 64 MiB at 1024 codes.
SAMPLE_PER_CODE = 16  # k-means++ looks at this many points a code; its cost grows with the square of the codes.


def squared_distances(centroids: jax.Array, x: jax.Array) -> jax.Array:
    """Squared Euclidean distances of x [P, D] to centroids [C, D]: [P, C] float32, clipped at 0."""
    product = jnp.matmul(x, centroids.T, precision=jax.lax.Precision.HIGHEST)
    norms = jnp.sum(jnp.square(x), -1)[:, None] + jnp.sum(jnp.square(centroids), -1)[None, :]
    return jnp.maximum(norms - 2.0 * product, 0.0)


def nearest(centroids: jax.Array, x: jax.Array) -> jax.Array:
    """The code of the nearest centroid [C, D] for each of x [..., D]: [...] int32; the lowest code wins a tie."""
    flat = x.reshape(-1, x.shape[-1])
    return jnp.argmin(squared_distances(centroids, flat), axis=-1).astype(jnp.int32).reshape(x.shape[:-1])


def plus_plus(key: jax.Array, x: jax.Array, codes: int) -> jax.Array:
    """k-means++ start: `codes` points of x [P, D], each drawn in proportion to its squared distance from the
    ones drawn before (Arthur and Vassilvitskii 2007). Looks at a random sample of 16 points a code."""
    sample_key, first_key, key = jax.random.split(key, 3)
    points = x.shape[0]
    sample = x[jax.random.permutation(sample_key, points)[: SAMPLE_PER_CODE * codes]]  # [S, D]
    first = sample[jax.random.randint(first_key, (), 0, sample.shape[0])]

    def draw(distance: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        chosen = sample[jax.random.categorical(key, jnp.log(distance))]  # [D]
        return jnp.minimum(distance, jnp.sum(jnp.square(sample - chosen[None, :]), -1)), chosen

    distance = jnp.sum(jnp.square(sample - first[None, :]), -1)  # [S]
    _, rest = jax.lax.scan(draw, distance, jax.random.split(key, codes - 1))
    return jnp.concatenate([first[None, :], rest])


def lloyd_step(centroids: jax.Array, x: jax.Array) -> jax.Array:
    """One exact Lloyd iteration over x [P, D]: each centroid [C, D] moves to the mean of its points.

    A centroid without points moves to one of the points farthest from their centroids, a different one each.
    """
    points, codes = x.shape[0], centroids.shape[0]
    block = min(points, BLOCK)
    padding = -points % block
    blocks = jnp.pad(x, ((0, padding), (0, 0))).reshape(-1, block, x.shape[1])
    real = jnp.pad(jnp.ones(points, bool), (0, padding)).reshape(-1, block)

    def add(total: tuple[jax.Array, jax.Array], part: tuple[jax.Array, jax.Array]):
        (sums, counts), (x, real) = total, part
        distance = squared_distances(centroids, x)  # [block, C]
        member = jax.nn.one_hot(jnp.argmin(distance, -1), codes) * real[:, None].astype(jnp.float32)
        sums += jnp.matmul(member.T, x, precision=jax.lax.Precision.HIGHEST)
        return (sums, counts + member.sum(0)), jnp.where(real, distance.min(-1), -1.0)

    start = (jnp.zeros_like(centroids), jnp.zeros(codes))
    (sums, counts), distance = jax.lax.scan(add, start, (blocks, real))
    empty = counts == 0.0
    farthest = x[jax.lax.top_k(distance.reshape(-1), codes)[1]]  # [C, D]
    seeds = farthest[jnp.maximum(jnp.cumsum(empty) - 1, 0)]  # the first empty code takes the farthest point, ...
    return jnp.where(empty[:, None], seeds, sums / jnp.maximum(counts, 1.0)[:, None])


@functools.partial(jax.jit, static_argnames=("codes", "iterations"))
def kmeans(key: jax.Array, x: jax.Array, codes: int, iterations: int) -> jax.Array:
    """Centroids [codes, D] float32 of the points x [P, D]: a k-means++ start, then exact Lloyd iterations.

    Every centroid is finite and none is left behind empty. Raises ValueError when there are fewer points than codes.
    """
    if x.shape[0] < codes:
        raise ValueError(f"codes = {codes}, but only {x.shape[0]} points to cluster: give more audio or fewer codes")
    x = x.astype(jnp.float32)
    start = plus_plus(key, x, codes)
    return jax.lax.fori_loop(0, iterations, lambda _, centroids: lloyd_step(centroids, x), start)


@functools.partial(jax.jit, static_argnames=("levels", "codes", "iterations"))
def fit_rvq(key: jax.Array, x: jax.Array, levels: int, codes: int, iterations: int) -> jax.Array:
    """Codebooks [levels, codes, D] of a residual quantizer: k-means on x [P, D], then on what each level leaves."""

    def level(residual: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        codebook = kmeans(key, residual, codes, iterations)
        return residual - codebook[nearest(codebook, residual)], codebook

    return jax.lax.scan(level, x.astype(jnp.float32), jax.random.split(key, levels))[1]
