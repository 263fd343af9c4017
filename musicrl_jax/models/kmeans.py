"""k-means on the device, for semantic tokens and for residual quantizers.

`lloyd` clusters points that are on the device, inside a compiled function if need be. `fit`
clusters points in host memory: blocks of them stream through the device or, under `jax.set_mesh`,
are sharded over its devices, and only sums are reduced. It starts with greedy k-means++. Both run
Lloyd's iterations, move a centroid without points to a point far from its own centroid, and stop
when an iteration gains too little.

Legend: P points, D width, C codes, S points of the k-means++ sample, L candidates per k-means++
step.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from musicrl_jax.core import hosts, sharding

# Points of a block or mini-batch; their distances to 1024 codes take 16 MiB.
BLOCK = 4096
# Points per code that k-means++ samples; its cost is quadratic in the codes.
SAMPLE_PER_CODE = 16
# Iterations stop when one lowers the inertia by a smaller share than this.
TOLERANCE = 1e-4


class Fit(NamedTuple):
    """Centroids, and statistics of these centroids over all points."""

    # [C, D] float32.
    centroids: jax.Array
    # [C] float32, share of points nearest to each centroid; sums to 1.
    share: jax.Array
    # [] float32, mean squared error per coordinate (sklearn's inertia_ / P D).
    inertia: jax.Array
    # [] int32, updates of the centroids.
    iterations: jax.Array
    # [] bool; False if the iterations ran out.
    converged: jax.Array

    def usage(self) -> dict[str, jax.Array]:
        """Summarises the fit; float32 [] each.

        Returns:
          inertia, iterations, converged (0 or 1), used (codes with points), perplexity (exp of the
          shares' entropy, 1 to C) and largest_share.
        """
        entropy = -jnp.sum(jax.scipy.special.xlogy(self.share, self.share))
        statistics = {
            "inertia": self.inertia,
            "iterations": self.iterations,
            "converged": self.converged,
            "used": jnp.sum(self.share > 0.0),
            "perplexity": jnp.exp(entropy),
            "largest_share": jnp.max(self.share),
        }
        return {name: value.astype(jnp.float32) for name, value in statistics.items()}


class _Totals(NamedTuple):
    """Sums over points that an update of the centroids needs."""

    # [C, D], of each centroid's points.
    sums: jax.Array
    # [C], of each centroid's points.
    counts: jax.Array
    # [], sum of squared distances.
    inertia: jax.Array


# --- distances ---


def squared_distances(centroids: jax.Array, x: jax.Array) -> jax.Array:
    """Computes squared Euclidean distances: [C, D], [P, D] -> [P, C] float32, at least 0."""
    product = jnp.matmul(x, centroids.T, precision=jax.lax.Precision.HIGHEST)
    norms = jnp.sum(jnp.square(x), -1)[:, None] + jnp.sum(jnp.square(centroids), -1)[None, :]
    return jnp.maximum(norms - 2.0 * product, 0.0)


def nearest(centroids: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the code of the nearest centroid: [C, D], [..., D] -> [...] int32.

    The lowest code wins a tie. The code is -1 where x is not finite.
    """
    flat = x.reshape(-1, x.shape[-1])
    code, distance = _lowest(squared_distances(centroids, flat))
    return jnp.where(jnp.isfinite(distance), code, -1).reshape(x.shape[:-1])


def _lowest(distance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the index int32 [P] and value [P] of each row's first minimum in distance [P, C].

    XLA vectorises two plain minima on a CPU, but not argmin. float32 holds any index < 2^24.
    """
    lowest = distance.min(-1)
    codes = distance.shape[1]
    index = jnp.arange(codes, dtype=jnp.float32)[None, :]
    first = jnp.where(distance <= lowest[:, None], index, jnp.float32(codes - 1)).min(-1)
    return first.astype(jnp.int32), lowest


# --- k-means++ ---


def plus_plus(key: jax.Array, x: jax.Array, codes: int) -> jax.Array:
    """Chooses `codes` starting centroids among x [P, D] by k-means++ (2007), one after the other.

    Each is the best of 2 + log(codes) candidates, sampled in proportion to their squared distance
    from the centroids so far: the one with the lowest inertia, as in scikit-learn. Uses a random
    sample of 16 points per code.
    """
    # The sample, and its first point.
    sample_key, first_key, key = jax.random.split(key, 3)
    points, trials = x.shape[0], 2 + int(math.log(codes))
    sample = x[jax.random.permutation(sample_key, points)[: SAMPLE_PER_CODE * codes]]  # [S, D]
    first = sample[jax.random.randint(first_key, (), 0, sample.shape[0])]

    def choose(distance: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        index = jax.random.categorical(key, jnp.log(distance), shape=(trials,))
        candidates = sample[index]  # [L, D]
        distances = jnp.minimum(distance[None, :], squared_distances(sample, candidates))  # [L, S]
        best = jnp.argmin(distances.sum(-1))
        return distances[best], candidates[best]

    distance = squared_distances(sample, first[None, :])[0]  # [S]
    _, rest = jax.lax.scan(choose, distance, jax.random.split(key, codes - 1))
    return jnp.concatenate([first[None, :], rest])


# --- one iteration ---


def _zero_totals(centroids: jax.Array) -> _Totals:
    return _Totals(jnp.zeros(centroids.shape), jnp.zeros(centroids.shape[0]), jnp.zeros(()))


def _totals(centroids: jax.Array, x: jax.Array, real: jax.Array) -> tuple[_Totals, jax.Array]:
    """Returns the totals of x [P, D], and each point's squared distance to its centroid [P].

    Points with real [P] False are padding; their distance is -1.
    """
    code, distance = _lowest(squared_distances(centroids, x))
    weight = real.astype(jnp.float32)

    def by_scatter() -> tuple[jax.Array, jax.Array]:
        def add(values: jax.Array) -> jax.Array:
            return jax.ops.segment_sum(values, code, centroids.shape[0])

        return add(x * weight[:, None]), add(weight)

    # On an accelerator a product is faster than a scatter, and deterministic.
    def by_product() -> tuple[jax.Array, jax.Array]:
        member = jax.nn.one_hot(code, centroids.shape[0]) * weight[:, None]
        return jnp.matmul(member.T, x, precision=jax.lax.Precision.HIGHEST), member.sum(0)

    sums, counts = jax.lax.platform_dependent(cpu=by_scatter, default=by_product)
    return _Totals(sums, counts, jnp.sum(distance * weight)), jnp.where(real, distance, -1.0)


@jax.jit
def _add_block(
    totals: _Totals, centroids: jax.Array, x: jax.Array, real: jax.Array
) -> tuple[_Totals, jax.Array]:
    """Adds the totals of a block; returns them, and the block's distances as in `_totals`."""
    block, distance = _totals(centroids, x, real)
    return jax.tree.map(jnp.add, totals, block), distance


@jax.jit
def _update(totals: _Totals, seeds: jax.Array) -> jax.Array:
    """Returns centroids [C, D]: the mean of each one's points, or the next of seeds [C, D]."""
    empty = totals.counts == 0.0
    seeds = seeds[jnp.maximum(jnp.cumsum(empty) - 1, 0)]
    return jnp.where(empty[:, None], seeds, totals.sums / jnp.maximum(totals.counts, 1.0)[:, None])


@jax.jit
def _improves(before: jax.Array, totals: _Totals) -> jax.Array:
    """Returns whether the last update gained enough or left a centroid without points, bool []."""
    return (totals.inertia < (1.0 - TOLERANCE) * before) | jnp.any(totals.counts == 0.0)


@jax.jit
def _result(centroids: jax.Array, totals: _Totals, before: jax.Array, iterations: jax.Array) -> Fit:
    points, width = totals.counts.sum(), centroids.shape[1]
    share, inertia = totals.counts / points, totals.inertia / (points * width)
    return Fit(centroids, share, inertia, iterations, ~_improves(before, totals))


# --- all iterations ---


@jax.jit
def lloyd(start: jax.Array, x: jax.Array, iterations: int) -> Fit:
    """Runs Lloyd's iterations over x [P, D] on the device, from centroids `start` [C, D].

    Stops after `iterations`, or when one gains less than TOLERANCE of the inertia. Centroids
    without points move to the points farthest from their centroids, each to a different one.
    """
    # Blocks of points, [blocks, block, D]; the last one is padded.
    points, codes = x.shape[0], start.shape[0]
    block = min(points, BLOCK)
    padding = -points % block
    blocks = jnp.pad(x, ((0, padding), (0, 0))).reshape(-1, block, x.shape[1])
    real = jnp.pad(jnp.ones(points, bool), (0, padding)).reshape(-1, block)

    # The parts of an iteration.
    def measure(centroids: jax.Array) -> tuple[_Totals, jax.Array]:
        def add(totals: _Totals, part: tuple[jax.Array, jax.Array]):
            return _add_block(totals, centroids, *part)

        totals, distance = jax.lax.scan(add, _zero_totals(centroids), (blocks, real))
        return totals, distance.reshape(-1)

    def seeds(totals: _Totals, distance: jax.Array) -> jax.Array:
        def farthest() -> jax.Array:
            return x[jax.lax.top_k(distance, codes)[1]]

        return jax.lax.cond(jnp.any(totals.counts == 0.0), farthest, lambda: jnp.zeros_like(start))

    def continues(state):
        _, totals, _, before, iteration = state
        return (iteration < iterations) & _improves(before, totals)

    def iterate(state):
        _, totals, distance, _, iteration = state
        centroids = _update(totals, seeds(totals, distance))
        return centroids, *measure(centroids), totals.inertia, iteration + 1

    # The loop: centroids, their totals and distances, the inertia before, the iteration.
    state = (start, *measure(start), jnp.array(jnp.inf), jnp.array(0, jnp.int32))
    centroids, totals, _, before, iteration = jax.lax.while_loop(continues, iterate, state)
    return _result(centroids, totals, before, iteration)


def fit(key: jax.Array, points: np.ndarray, codes: int, iterations: int) -> Fit:
    """Clusters points [P, D] in host memory, of any number.

    Starts with k-means++ and one pass of mini-batches in random order, then runs at most
    `iterations` exact passes. Raises ValueError if there are fewer points than codes.
    """
    if len(points) < codes:
        raise ValueError(
            f"codes = {codes}, but only {len(points)} points: use more audio or fewer codes"
        )
    # A random order makes every block a sample.
    order_key, start_key = jax.random.split(key)
    points = points[np.asarray(jax.random.permutation(order_key, len(points)))]
    sample = jnp.asarray(points[: SAMPLE_PER_CODE * codes], jnp.float32)
    start = jax.jit(plus_plus, static_argnames="codes")(start_key, sample, codes)
    return streamed_lloyd(mini_batches(start, points), points, iterations)


def mini_batches(start: jax.Array, points: np.ndarray) -> jax.Array:
    """Runs one pass of mini-batch k-means (Sculley 2010) over points [P, D] in host memory.

    Each centroid's learning rate is one over the number of its points so far, so it is their mean.
    Returns centroids [C, D].
    """
    centroids, counts = start, jnp.zeros(start.shape[0])
    for x, real in _blocks(points):
        centroids, counts = _mini_batch(centroids, counts, x, real)
    return centroids


@jax.jit
def _mini_batch(
    centroids: jax.Array, counts: jax.Array, x: jax.Array, real: jax.Array
) -> tuple[jax.Array, jax.Array]:
    batch, _ = _totals(centroids, x, real)
    counts += batch.counts
    step = batch.sums - batch.counts[:, None] * centroids
    return centroids + step / jnp.maximum(counts, 1.0)[:, None], counts


def streamed_lloyd(start: jax.Array, points: np.ndarray, iterations: int) -> Fit:
    """Runs `lloyd` over points [P, D] in host memory."""

    def measure(centroids: jax.Array) -> tuple[_Totals, np.ndarray]:
        totals, distances = _zero_totals(centroids), []
        for block in _blocks(points):
            totals, distance = _add_block(totals, centroids, *block)
            distances.append(distance)
        return totals, np.concatenate(sharding.fetch(distances))

    centroids, before, iteration = start, jnp.inf, 0
    totals, distance = measure(centroids)
    while iteration < iterations and _improves(before, totals):
        # Centroids without points move to the farthest points.
        seeds = np.zeros(start.shape, np.float32)
        if empty := int(jnp.sum(totals.counts == 0.0)):
            seeds[:empty] = points[np.argsort(-distance, kind="stable")[:empty]]
        centroids, before = _update(totals, jnp.asarray(seeds)), totals.inertia
        totals, distance = measure(centroids)
        iteration += 1
    return _result(centroids, totals, before, jnp.int32(iteration))


def _blocks(points: np.ndarray) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Yields blocks [BLOCK, D] float32 on the device or sharded over the mesh, and a mask [BLOCK].

    The last block is padded with zeros, where the mask is False.
    """
    mesh = jax.sharding.get_mesh()
    shards = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
    size = -(-BLOCK // shards) * shards
    for begin in range(0, len(points), size):
        hosts.stop_point()
        part = np.asarray(points[begin : begin + size], np.float32)
        padded = np.pad(part, ((0, size - len(part)), (0, 0)))
        block = {"x": padded, "real": np.arange(size) < len(part)}
        block = jax.device_put(block) if mesh.empty else sharding.put_batch(mesh, block)
        yield block["x"], block["real"]
