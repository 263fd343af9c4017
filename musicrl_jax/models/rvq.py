"""Residual vector quantization (SoundStream, 2107.03312, section III-C) as pure functions over codebooks.

Level q quantizes what levels 0..q-1 left of x; the sum of the chosen codewords stands for x. A quantizer at work is
just `codebooks [Q, C, D]`; while it is trained its `State` also holds the moving averages the codebooks are made of.

Letters: B clips, T codec frames, Q levels, C codes in a codebook, D width, P vectors of a batch (B * T).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from musicrl_jax.models import kmeans

State = dict[
    str, jax.Array
]  # codebooks [Q, C, D], counts [Q, C], sums [Q, C, D] float32; updates [] int32

DECAY = 0.99
DECAY_RAMP = 9.0
DEAD_SHARE = 0.3  # of an even share of the vectors: a code that has less is drawn anew
ROUNDS, ROUND_ITERATIONS, LAST_ITERATIONS = 6, 3, 5  # of `fit`
START_VECTORS_PER_CODE = 4
START_JITTER = 0.3  # standard deviations


def quantize(codebooks: jax.Array, x: jax.Array) -> jax.Array:
    """Codes [..., Q] int32 of x [..., D], level by level, each the nearest codeword to the residual."""

    def level(residual: jax.Array, codebook: jax.Array) -> tuple[jax.Array, jax.Array]:
        codes = kmeans.nearest(codebook, residual)
        return residual - codebook[codes], codes

    codes = jax.lax.scan(level, x.astype(jnp.float32), codebooks)[1]  # [Q, ...]
    return jnp.moveaxis(codes, 0, -1)


def dequantize(codebooks: jax.Array, codes: jax.Array) -> jax.Array:
    """The vectors [..., D] that codes [..., q] stand for: the sum over the first q <= Q levels' codewords; a code of
    -1 adds nothing.
    """
    levels = codes.shape[-1]
    if levels > codebooks.shape[0]:
        raise ValueError(
            f"codes have {levels} levels, the quantizer {codebooks.shape[0]}: are they another codec's?"
        )
    chosen = jax.vmap(lambda codebook, code: codebook[code], in_axes=(0, -1))(
        codebooks[:levels], codes
    )
    heard = jnp.moveaxis(codes, -1, 0)[..., None] >= 0
    return jnp.where(heard, chosen, 0.0).sum(0)


def init(key: jax.Array, levels: int, codes: int, width: int) -> State:
    """A quantizer that has seen no data: random codewords, to be replaced by k-means on the first batch."""
    return {
        "codebooks": jax.random.normal(key, (levels, codes, width)),
        "counts": jnp.ones((levels, codes)),
        "sums": jnp.zeros((levels, codes, width)),
        "updates": jnp.zeros((), jnp.int32),
    }


def perplexity(codes: jax.Array, size: int) -> jax.Array:
    """The effective number of codes in use, exp of the entropy, at each level of codes [..., Q]: [Q] in 1..size."""
    flat = codes.reshape(-1, codes.shape[-1])
    counts = jax.vmap(lambda level: jnp.bincount(level, length=size), in_axes=1)(flat)  # [Q, C]
    share = counts.astype(jnp.float32) / flat.shape[0]
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(share, share), -1))


@functools.partial(jax.jit, static_argnames=("levels", "codes"))
def fit(
    key: jax.Array, x: jax.Array, levels: int, codes: int, start: jax.Array | None = None
) -> jax.Array:
    """Codebooks [levels, codes, D] float32 fitted to vectors x [P, D]: k-means, then k-means on what each level leaves.

    k-means starts from `start` [levels, codes, D], else from random vectors, and between rounds of Lloyd's iterations
    draws codes with less than 0.3 of an even share anew. Vectors of music have long tails, to which a k-means++ start
    gives most codes, where few vectors ever are: such codebooks had a perplexity of 0.24 to 0.66 of their size and a
    larger distortion than these, with 0.66 to 0.81. Raises ValueError when there are fewer vectors than codes.
    """
    if x.shape[0] < codes:
        raise ValueError(
            f"codes = {codes}, but only {x.shape[0]} vectors: give more audio or fewer codes"
        )

    def level(
        residual: jax.Array, part: tuple[jax.Array, jax.Array | None]
    ) -> tuple[jax.Array, jax.Array]:
        key, first = part
        start_key, key = jax.random.split(key)
        if first is None:
            first = residual[jax.random.permutation(start_key, residual.shape[0])[:codes]]

        def round_(codebook: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
            found = kmeans.lloyd(codebook, residual, ROUND_ITERATIONS)
            dead = found.share < DEAD_SHARE / codes
            drawn = residual[jax.random.randint(key, (codes,), 0, residual.shape[0])]
            return jnp.where(dead[:, None], drawn, found.centroids), None

        codebook, _ = jax.lax.scan(round_, first, jax.random.split(key, ROUNDS))
        codebook = kmeans.lloyd(codebook, residual, LAST_ITERATIONS).centroids
        codes_ = jax.lax.map(
            functools.partial(kmeans.nearest, codebook), residual, batch_size=kmeans.BLOCK
        )
        return residual - codebook[codes_], codebook

    return jax.lax.scan(level, x.astype(jnp.float32), (jax.random.split(key, levels), start))[1]


class Trained(NamedTuple):
    """What a training pass gives besides the new state."""

    x: jax.Array  # [B, T, D] quantized; gradients go straight through to the input
    codes: jax.Array  # [B, T, Q] int32, all levels, also those dropped in x
    commitment: (
        jax.Array
    )  # [] mean over levels of the mean squared distance of the input to each level's sum


def train(state: State, x: jax.Array, key: jax.Array) -> tuple[Trained, State]:
    """One training pass over x [B, T, D]: quantizes with the old codebooks, returns the updated ones.

    * The first batch starts the codebooks by `fit`; where it has fewer than 4 vectors a code, each is used several
      times, with noise: codebooks that hold the batch itself would leave the deeper levels nothing to learn from.
    * Codewords are moving averages of the residuals that chose them; batch sums run over the whole batch on all
      devices. The decay of update n is n / (n + 9) until that reaches the paper's 0.99: an encoder moves fast at first,
      and codebooks that average over more of the past than there is of it are left behind, all but one code unused.
    * A code whose average count falls under 0.3 of an even share (P / C) is drawn anew from the batch's residuals, and
      starts with an even share. The paper's limit of 2 is tied to its batch size; this one is not.
    * Quantizer dropout: clip b is decoded from its first n levels, n ~ U{1..Q}. Codebooks learn from all levels.
    * The commitment term has a part for every level, each with its gradient to x.
    """
    clips, steps, width = x.shape
    levels, codes, _ = state["codebooks"].shape
    start_key, jitter_key, dead_key, drop_key = jax.random.split(key, 4)
    points = jax.lax.stop_gradient(x).reshape(-1, width)  # [P, D]
    even_share = points.shape[0] / codes

    def start() -> jax.Array:
        copies = -(-START_VECTORS_PER_CODE * codes // points.shape[0])
        spread = START_JITTER * jnp.std(points, axis=0)[None, None, :]
        noise = spread * jax.random.normal(jitter_key, (copies, *points.shape))
        return fit(
            start_key,
            points if copies == 1 else (points[None] + noise).reshape(-1, width),
            levels,
            codes,
        )

    updates = state["updates"].astype(jnp.float32)
    codebooks = jax.lax.cond(updates > 0.0, lambda: state["codebooks"], start)
    decay = jnp.minimum(DECAY, updates / (updates + DECAY_RAMP))

    def level(residual: jax.Array, part: tuple[jax.Array, ...]):
        codebook, count, total, key = part
        chosen_code = kmeans.nearest(codebook, residual)  # [P]
        chosen = codebook[chosen_code]
        member = jax.nn.one_hot(chosen_code, codes)  # [P, C]
        used = member.sum(0)
        count = decay * count + (1.0 - decay) * used
        total = decay * total + (1.0 - decay) * jnp.matmul(
            member.T, residual, precision=jax.lax.Precision.HIGHEST
        )
        dead = count < DEAD_SHARE * even_share
        drawn = residual[jax.random.randint(key, (codes,), 0, residual.shape[0])]  # [C, D]
        count = jnp.where(dead, even_share, count)
        total = jnp.where(dead[:, None], even_share * drawn, total)
        return residual - chosen, (chosen_code, chosen, count, total)

    parts = (codebooks, state["counts"], state["sums"], jax.random.split(dead_key, levels))
    _, (chosen_codes, chosen, counts, sums) = jax.lax.scan(level, points, parts)
    new_state = {
        "codebooks": sums / counts[:, :, None],
        "counts": counts,
        "sums": sums,
        "updates": state["updates"] + 1,
    }

    chosen = chosen.reshape(levels, clips, steps, width)
    commitment = jnp.mean(jnp.square(x[None] - jnp.cumsum(chosen, 0)))
    quantized = jnp.einsum("qb,qbtd->btd", _heard(drop_key, levels, clips), chosen)
    straight = x + jax.lax.stop_gradient(quantized - x)
    codes_out = jnp.moveaxis(chosen_codes, 0, -1).reshape(clips, steps, levels)
    return Trained(straight, codes_out, commitment), new_state


def _heard(key: jax.Array, levels: int, clips: int) -> jax.Array:
    """Quantizer dropout: float32 [Q, B], 1 for the first n ~ U{1..Q} levels of each clip, those that are decoded."""
    kept = jax.random.randint(key, (clips,), 1, levels + 1)
    return (jnp.arange(levels)[:, None] < kept[None, :]).astype(jnp.float32)


# DAC's quantizer (2306.06546, section 3.2): each level looks at its residual through a projection to a few dimensions
# and compares angles there; codebooks and projections are trained by gradient.

Factors = dict[
    str, jax.Array
]  # in [Q, D, W], in_bias [Q, W], codebooks [Q, C, W], out [Q, W, D], out_bias [Q, D]


def init_factored(key: jax.Array, levels: int, codes: int, width: int, code_width: int) -> Factors:
    """Random projections and codewords."""
    in_key, code_key, out_key = jax.random.split(key, 3)
    return {
        "in": jax.random.normal(in_key, (levels, width, code_width)) * width**-0.5,
        "in_bias": jnp.zeros((levels, code_width)),
        "codebooks": jax.random.normal(code_key, (levels, codes, code_width)),
        "out": jax.random.normal(out_key, (levels, code_width, width)) * code_width**-0.5,
        "out_bias": jnp.zeros((levels, width)),
    }


def expanded(factors: Factors) -> jax.Array:
    """The codebooks [Q, C, D] that these stand for, as `dequantize` takes them."""
    return (
        jnp.einsum("qcw,qwd->qcd", factors["codebooks"], factors["out"])
        + factors["out_bias"][:, None, :]
    )


def _nearest_angle(codebook: jax.Array, x: jax.Array) -> jax.Array:
    """The code of the codeword [C, W] with the largest cosine to each of x [..., W]: [...] int32; -1 where x is not
    finite.
    """
    directions = codebook * jax.lax.rsqrt(
        jnp.maximum(jnp.sum(jnp.square(codebook), -1, keepdims=True), 1e-12)
    )
    codes = jnp.argmax(jnp.matmul(x, directions.T, precision=jax.lax.Precision.HIGHEST), -1).astype(
        jnp.int32
    )
    return jnp.where(jnp.isfinite(x).all(-1), codes, -1)


def quantize_factored(factors: Factors, x: jax.Array) -> jax.Array:
    """Codes [..., Q] int32 of x [..., D], level by level, each of the smallest angle to the projected residual."""

    def level(residual: jax.Array, part: tuple[Factors, jax.Array]) -> tuple[jax.Array, jax.Array]:
        own, codebook = part
        codes = _nearest_angle(own["codebooks"], residual @ own["in"] + own["in_bias"][None, :])
        return residual - codebook[codes], codes

    points = x.astype(jnp.float32).reshape(-1, x.shape[-1])  # [P, D]
    codes = jax.lax.scan(level, points, (factors, expanded(factors)))[1]  # [Q, P]
    return codes.T.reshape(*x.shape[:-1], -1)


def train_factored(factors: Factors, x: jax.Array, key: jax.Array) -> Trained:
    """One training pass over x [B, T, D], with quantizer dropout as in `train`.

    Gradients go straight through each level's search, to the projections and to x. `commitment` is the mean over
    levels of the squared distance between projected residual and codeword, seen four times as strong by the codeword
    (DAC's weights 0.25 and 1).
    """
    levels = factors["codebooks"].shape[0]
    stop = jax.lax.stop_gradient

    def level(residual: jax.Array, own: Factors):
        seen = residual @ own["in"] + own["in_bias"][None, None, :]  # [B, T, W]
        codes = _nearest_angle(own["codebooks"], seen)
        codeword = own["codebooks"][codes]
        distance = jnp.mean(jnp.square(seen - stop(codeword))) + 4.0 * jnp.mean(
            jnp.square(stop(seen) - codeword)
        )
        chosen = (seen + stop(codeword - seen)) @ own["out"] + own["out_bias"][
            None, None, :
        ]  # [B, T, D]
        return residual - chosen, (codes, chosen, distance)

    _, (codes, chosen, distances) = jax.lax.scan(level, x, factors)
    quantized = jnp.einsum("qb,qbtd->btd", _heard(key, levels, x.shape[0]), chosen)
    return Trained(quantized, jnp.moveaxis(codes, 0, -1), jnp.mean(distances))
