"""k-means on the device: what makes semantic tokens, and the iterations that residual quantizers are fitted by.

Two sizes of it. `lloyd` clusters points that are on the device, inside a compiled function if need be. `fit` clusters
points that stay with the host: blocks of them stream through the device or, where a mesh is set (`jax.set_mesh`), are
split over its devices, and only sums come together; it starts by greedy k-means++. Both iterate as Lloyd did, move a
centroid that has lost its points to the point farthest from its own centroid, and stop when an iteration gains too
little.

Letters: P points, D width, C codes, S points of the k-means++ sample, L candidates of a k-means++ draw.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from musicrl_jax.core import hosts, sharding

BLOCK = 4096  # Points whose distances to all centroids are held at once, and of a mini-batch: 16 MiB at 1024 codes.
SAMPLE_PER_CODE = (
    16  # k-means++ looks at this many points a code; its cost grows with the square of the codes.
)
TOLERANCE = 1e-4  # An iteration that lowers the inertia by a smaller share than this is the last.


class Fit(NamedTuple):
    """Centroids and how well they are used; all figures are those of these centroids, over all points."""

    centroids: jax.Array  # [C, D] float32
    share: jax.Array  # [C] float32, the share of points nearest to each; sums to 1
    inertia: (
        jax.Array
    )  # [] float32, mean squared error of a coordinate: scikit-learn's inertia_ / (P D)
    iterations: jax.Array  # [] int32, moves of the centroids
    converged: jax.Array  # [] bool; False where the iterations ran out first

    def usage(self) -> dict[str, jax.Array]:
        """The report: inertia, iterations, converged (0 or 1), used (codes that have points), perplexity (exp of the
        entropy of the shares, 1 to C) and largest_share; float32 [] each.
        """
        entropy = -jnp.sum(jax.scipy.special.xlogy(self.share, self.share))
        figures = {
            "inertia": self.inertia,
            "iterations": self.iterations,
            "converged": self.converged,
            "used": jnp.sum(self.share > 0.0),
            "perplexity": jnp.exp(entropy),
            "largest_share": jnp.max(self.share),
        }
        return {name: figure.astype(jnp.float32) for name, figure in figures.items()}


class _Totals(NamedTuple):
    """What an iteration needs to know of the points: for each centroid the sum of its points and their number."""

    sums: jax.Array  # [C, D]
    counts: jax.Array  # [C]
    inertia: jax.Array  # [] sum of squared distances


def squared_distances(centroids: jax.Array, x: jax.Array) -> jax.Array:
    """Squared Euclidean distances of x [P, D] to centroids [C, D]: [P, C] float32, clipped at 0."""
    product = jnp.matmul(x, centroids.T, precision=jax.lax.Precision.HIGHEST)
    norms = jnp.sum(jnp.square(x), -1)[:, None] + jnp.sum(jnp.square(centroids), -1)[None, :]
    return jnp.maximum(norms - 2.0 * product, 0.0)


def nearest(centroids: jax.Array, x: jax.Array) -> jax.Array:
    """The code of the nearest centroid [C, D] for each of x [..., D]: [...] int32; the lowest code wins a tie.

    -1, which is no code, where x is not finite.
    """
    flat = x.reshape(-1, x.shape[-1])
    code, distance = _lowest(squared_distances(centroids, flat))
    return jnp.where(jnp.isfinite(distance), code, -1).reshape(x.shape[:-1])


def _lowest(distance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(index [P] int32, value [P]) of the first lowest entry in each row of distance [P, C].

    Two plain minima: XLA makes vector code of them on a CPU, and none of its argmin. A float32 holds any index < 2^24.
    """
    lowest = distance.min(-1)
    codes = distance.shape[1]
    index = jnp.arange(codes, dtype=jnp.float32)[None, :]
    first = jnp.where(distance <= lowest[:, None], index, jnp.float32(codes - 1)).min(-1)
    return first.astype(jnp.int32), lowest


def plus_plus(key: jax.Array, x: jax.Array, codes: int) -> jax.Array:
    """k-means++ start: `codes` points of x [P, D], drawn one after the other (Arthur and Vassilvitskii 2007).

    Each is the best of 2 + log(codes) candidates, drawn in proportion to their squared distance from the points
    chosen before: the one that leaves the lowest inertia, as in scikit-learn. Looks at a random sample of 16 points a
    code.
    """
    sample_key, first_key, key = jax.random.split(key, 3)
    points, trials = x.shape[0], 2 + int(math.log(codes))
    sample = x[jax.random.permutation(sample_key, points)[: SAMPLE_PER_CODE * codes]]  # [S, D]
    first = sample[jax.random.randint(first_key, (), 0, sample.shape[0])]

    def draw(distance: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        candidates = sample[
            jax.random.categorical(key, jnp.log(distance), shape=(trials,))
        ]  # [L, D]
        left = jnp.minimum(distance[None, :], squared_distances(sample, candidates))  # [L, S]
        best = jnp.argmin(left.sum(-1))
        return left[best], candidates[best]

    distance = squared_distances(sample, first[None, :])[0]  # [S]
    _, rest = jax.lax.scan(draw, distance, jax.random.split(key, codes - 1))
    return jnp.concatenate([first[None, :], rest])


def _nothing(centroids: jax.Array) -> _Totals:
    return _Totals(jnp.zeros(centroids.shape), jnp.zeros(centroids.shape[0]), jnp.zeros(()))


def _totals(centroids: jax.Array, x: jax.Array, real: jax.Array) -> tuple[_Totals, jax.Array]:
    """The totals of points x [P, D] and each one's squared distance to its centroid [P]; -1 where real [P] is False."""
    code, distance = _lowest(squared_distances(centroids, x))
    weight = real.astype(jnp.float32)

    def by_scatter() -> tuple[jax.Array, jax.Array]:
        def add(values: jax.Array) -> jax.Array:
            return jax.ops.segment_sum(values, code, centroids.shape[0])

        return add(x * weight[:, None]), add(weight)

    def by_product() -> tuple[
        jax.Array, jax.Array
    ]:  # on an accelerator: faster, and the same in every run
        member = jax.nn.one_hot(code, centroids.shape[0]) * weight[:, None]
        return jnp.matmul(member.T, x, precision=jax.lax.Precision.HIGHEST), member.sum(0)

    sums, counts = jax.lax.platform_dependent(cpu=by_scatter, default=by_product)
    return _Totals(sums, counts, jnp.sum(distance * weight)), jnp.where(real, distance, -1.0)


@jax.jit
def _measured(
    totals: _Totals, centroids: jax.Array, x: jax.Array, real: jax.Array
) -> tuple[_Totals, jax.Array]:
    found, distance = _totals(centroids, x, real)
    return jax.tree.map(jnp.add, totals, found), distance


@jax.jit
def _moved(totals: _Totals, seeds: jax.Array) -> jax.Array:
    """Centroids [C, D]: each the mean of its points; those without points take seeds [C, D], the first one first."""
    empty = totals.counts == 0.0
    seeds = seeds[jnp.maximum(jnp.cumsum(empty) - 1, 0)]
    return jnp.where(empty[:, None], seeds, totals.sums / jnp.maximum(totals.counts, 1.0)[:, None])


@jax.jit
def _goes_on(before: jax.Array, totals: _Totals) -> jax.Array:
    """Whether another move is due, bool []: the last one gained enough, or left a centroid without points."""
    return (totals.inertia < (1.0 - TOLERANCE) * before) | jnp.any(totals.counts == 0.0)


@jax.jit
def _fit(centroids: jax.Array, totals: _Totals, before: jax.Array, iterations: jax.Array) -> Fit:
    points, width = totals.counts.sum(), centroids.shape[1]
    converged = ~_goes_on(before, totals)
    return Fit(
        centroids, totals.counts / points, totals.inertia / (points * width), iterations, converged
    )


@jax.jit
def lloyd(start: jax.Array, x: jax.Array, iterations: int) -> Fit:
    """Exact Lloyd iterations over x [P, D] on the device from centroids [C, D], until one gains less than TOLERANCE of
    the inertia or there were `iterations`.

    A centroid without points moves to one of the points farthest from their centroids, a different one each.
    """
    points, codes = x.shape[0], start.shape[0]
    block = min(points, BLOCK)
    padding = -points % block
    blocks = jnp.pad(x, ((0, padding), (0, 0))).reshape(-1, block, x.shape[1])
    real = jnp.pad(jnp.ones(points, bool), (0, padding)).reshape(-1, block)

    def measure(centroids: jax.Array) -> tuple[_Totals, jax.Array]:
        def add(totals: _Totals, part: tuple[jax.Array, jax.Array]):
            return _measured(totals, centroids, *part)

        totals, distance = jax.lax.scan(add, _nothing(centroids), (blocks, real))
        return totals, distance.reshape(-1)

    def seeds(totals: _Totals, distance: jax.Array) -> jax.Array:
        def farthest() -> jax.Array:
            return x[jax.lax.top_k(distance, codes)[1]]

        return jax.lax.cond(jnp.any(totals.counts == 0.0), farthest, lambda: jnp.zeros_like(start))

    def goes_on(state):
        _, totals, _, before, iteration = state
        return (iteration < iterations) & _goes_on(before, totals)

    def move(state):
        _, totals, distance, _, iteration = state
        centroids = _moved(totals, seeds(totals, distance))
        return centroids, *measure(centroids), totals.inertia, iteration + 1

    state = (start, *measure(start), jnp.array(jnp.inf), jnp.array(0, jnp.int32))
    centroids, totals, _, before, iteration = jax.lax.while_loop(goes_on, move, state)
    return _fit(centroids, totals, before, iteration)


def fit(key: jax.Array, points: np.ndarray, codes: int, iterations: int) -> Fit:
    """k-means of points [P, D] that stay with the host, as many as there may be.

    A k-means++ start, one pass of mini-batches in a random order, then exact iterations: at most `iterations` passes
    over all points. Raises ValueError when there are fewer points than codes.
    """
    if len(points) < codes:
        raise ValueError(
            f"codes = {codes}, but only {len(points)} points to cluster: give more audio or fewer codes"
        )
    order_key, start_key = jax.random.split(key)
    points = points[np.asarray(jax.random.permutation(order_key, len(points)))]
    sample = jnp.asarray(points[: SAMPLE_PER_CODE * codes], jnp.float32)
    start = jax.jit(plus_plus, static_argnames="codes")(start_key, sample, codes)
    return streamed_lloyd(mini_batches(start, points), points, iterations)


def mini_batches(start: jax.Array, points: np.ndarray) -> jax.Array:
    """Centroids [C, D] after one pass of mini-batch k-means (Sculley 2010) over points [P, D] of the host.

    Each centroid has its own learning rate, one over the points it has had so far: it stands at their mean.
    """
    centroids, counts = start, jnp.zeros(start.shape[0])
    for x, real in _blocks(points):
        centroids, counts = _mini_batch(centroids, counts, x, real)
    return centroids


@jax.jit
def _mini_batch(
    centroids: jax.Array, counts: jax.Array, x: jax.Array, real: jax.Array
) -> tuple[jax.Array, jax.Array]:
    found, _ = _totals(centroids, x, real)
    counts += found.counts
    step = found.sums - found.counts[:, None] * centroids
    return centroids + step / jnp.maximum(counts, 1.0)[:, None], counts


def streamed_lloyd(start: jax.Array, points: np.ndarray, iterations: int) -> Fit:
    """`lloyd` over points [P, D] that stay with the host."""

    def measure(centroids: jax.Array) -> tuple[_Totals, np.ndarray]:
        totals, distances = _nothing(centroids), []
        for block in _blocks(points):
            totals, distance = _measured(totals, centroids, *block)
            distances.append(distance)
        return totals, np.concatenate(sharding.fetch(distances))

    centroids, before, iteration = start, jnp.inf, 0
    totals, distance = measure(centroids)
    while iteration < iterations and _goes_on(before, totals):
        seeds = np.zeros(start.shape, np.float32)
        if empty := int(jnp.sum(totals.counts == 0.0)):
            seeds[:empty] = points[np.argsort(-distance, kind="stable")[:empty]]
        centroids, before, iteration = (
            _moved(totals, jnp.asarray(seeds)),
            totals.inertia,
            iteration + 1,
        )
        totals, distance = measure(centroids)
    return _fit(centroids, totals, before, jnp.int32(iteration))


def _blocks(points: np.ndarray) -> Iterator[tuple[jax.Array, jax.Array]]:
    """(points [BLOCK, D] float32, which of them are real [BLOCK] bool) on the device or split over the mesh that is
    set; the last block is filled up with zeros.
    """
    mesh = jax.sharding.get_mesh()
    shards = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
    block = -(-BLOCK // shards) * shards
    for begin in range(0, len(points), block):
        hosts.stop_point()
        part = np.asarray(points[begin : begin + block], np.float32)
        real = np.arange(block) < len(part)
        filled = {"x": np.pad(part, ((0, block - len(part)), (0, 0))), "real": real}
        placed = jax.device_put(filled) if mesh.empty else sharding.put_batch(mesh, filled)
        yield placed["x"], placed["real"]
