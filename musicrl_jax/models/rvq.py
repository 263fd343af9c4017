"""Residual vector quantization (SoundStream, 2107.03312, section III-C) by pure functions.

Level q quantizes the residual of levels 0..q-1; the sum of the chosen codewords approximates x. A
fitted quantizer is its `codebooks [Q, C, D]`. In training its `State` also holds the moving
averages that the codebooks are computed from.

Legend: B clips, T codec frames, Q levels, C codes in a codebook, D width, W code width, P vectors
of a batch (B * T).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from musicrl_jax.models import kmeans

# codebooks [Q, C, D], counts [Q, C], sums [Q, C, D] float32; updates [] int32.
State = dict[str, jax.Array]
# in [Q, D, W], in_bias [Q, W], codebooks [Q, C, W], out [Q, W, D], out_bias [Q, D].
Factors = dict[str, jax.Array]

# Decay of the moving averages; update n has at most n / (n + DECAY_RAMP).
DECAY = 0.99
DECAY_RAMP = 9.0
# A code with less than this part of an even share of the vectors is replaced.
DEAD_SHARE = 0.3
# Rounds of `fit`, and iterations in each round and after the last.
ROUNDS, ROUND_ITERATIONS, LAST_ITERATIONS = 6, 3, 5
START_VECTORS_PER_CODE = 4
# Noise on the first batch's copies, in standard deviations.
START_JITTER = 0.3


class Trained(NamedTuple):
    """The output of a training pass, without the new state."""

    # [B, T, D] quantized; gradients go straight through to the input.
    x: jax.Array
    # [B, T, Q] int32, all levels, also those dropped in x.
    codes: jax.Array
    # [], mean squared distance of the input to each level's sum.
    commitment: jax.Array


# --- codes and vectors ---


def quantize(codebooks: jax.Array, x: jax.Array) -> jax.Array:
    """Quantizes x [..., D], each level to the codeword nearest to the residual: [..., Q] int32."""

    def level(residual: jax.Array, codebook: jax.Array) -> tuple[jax.Array, jax.Array]:
        codes = kmeans.nearest(codebook, residual)
        return residual - codebook[codes], codes

    codes = jax.lax.scan(level, x.astype(jnp.float32), codebooks)[1]  # [Q, ...]
    return jnp.moveaxis(codes, 0, -1)


def dequantize(codebooks: jax.Array, codes: jax.Array) -> jax.Array:
    """Sums the codewords of the first q <= Q levels: codes [..., q] -> [..., D].

    A code of -1 adds nothing.
    """
    levels = codes.shape[-1]
    if levels > codebooks.shape[0]:
        raise ValueError(
            f"codes have {levels} levels, but the quantizer has {codebooks.shape[0]}: "
            "use codes of this codec"
        )
    by_level = jnp.moveaxis(codes, -1, 0)
    chosen = jax.vmap(lambda codebook, code: codebook[code])(codebooks[:levels], by_level)
    return jnp.where(by_level[..., None] >= 0, chosen, 0.0).sum(0)


def perplexity(codes: jax.Array, size: int) -> jax.Array:
    """Computes the effective number of codes in use, exp of the entropy: [..., Q] -> [Q]."""
    flat = codes.reshape(-1, codes.shape[-1])
    counts = jax.vmap(lambda level: jnp.bincount(level, length=size), in_axes=1)(flat)  # [Q, C]
    share = counts.astype(jnp.float32) / flat.shape[0]
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(share, share), -1))


# --- fitting and training ---


@functools.partial(jax.jit, static_argnames=("levels", "codes"))
def fit(
    key: jax.Array, x: jax.Array, levels: int, codes: int, start: jax.Array | None = None
) -> jax.Array:
    """Fits codebooks [levels, codes, D] float32 to x [P, D] by k-means on each level's residuals.

    k-means starts from `start` [levels, codes, D], by default from random vectors. Between rounds
    of Lloyd's iterations, codes with less than 0.3 of an even share are replaced by random vectors.
    Vectors of music have long tails, where a k-means++ start puts most codes. Such codebooks had a
    larger distortion than these and a perplexity of 0.24 to 0.66 of their size; these have 0.66 to
    0.81. Raises ValueError if there are fewer vectors than codes.
    """
    if x.shape[0] < codes:
        raise ValueError(
            f"codes = {codes}, but only {x.shape[0]} vectors: use more audio or fewer codes"
        )

    def level(
        residual: jax.Array, inputs: tuple[jax.Array, jax.Array | None]
    ) -> tuple[jax.Array, jax.Array]:
        key, first = inputs
        start_key, key = jax.random.split(key)
        if first is None:
            first = residual[jax.random.permutation(start_key, residual.shape[0])[:codes]]

        # Rounds of k-means, with dead codes replaced after each.
        def round_(codebook: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
            fitted = kmeans.lloyd(codebook, residual, ROUND_ITERATIONS)
            dead = fitted.share < DEAD_SHARE / codes
            random = residual[jax.random.randint(key, (codes,), 0, residual.shape[0])]
            return jnp.where(dead[:, None], random, fitted.centroids), None

        codebook, _ = jax.lax.scan(round_, first, jax.random.split(key, ROUNDS))
        codebook = kmeans.lloyd(codebook, residual, LAST_ITERATIONS).centroids
        # The residual for the next level, in blocks.
        search = functools.partial(kmeans.nearest, codebook)
        nearest = jax.lax.map(search, residual, batch_size=kmeans.BLOCK)
        return residual - codebook[nearest], codebook

    return jax.lax.scan(level, x.astype(jnp.float32), (jax.random.split(key, levels), start))[1]


def init(key: jax.Array, levels: int, codes: int, width: int) -> State:
    """Draws random codewords, which the first batch replaces."""
    return {
        "codebooks": jax.random.normal(key, (levels, codes, width)),
        "counts": jnp.ones((levels, codes)),
        "sums": jnp.zeros((levels, codes, width)),
        "updates": jnp.zeros((), jnp.int32),
    }


def train(state: State, x: jax.Array, key: jax.Array) -> tuple[Trained, State]:
    """Runs one training pass over x [B, T, D]: quantizes by the old codebooks, updates them.

    * The first batch starts the codebooks by `fit`. If it has fewer than 4 vectors per code, each
      is used several times, with noise: codebooks that hold the batch itself would leave the deeper
      levels nothing to learn.
    * Codewords are moving averages of the residuals that chose them, over the whole batch on all
      devices. The decay of update n is n / (n + 9), at most the paper's 0.99. An encoder moves fast
      at first; codebooks with a longer average fall behind, and only one code stays in use.
    * A code with an average count under 0.3 of an even share (P / C) is replaced by one of the
      batch's residuals and gets an even share. The paper's limit of 2 depends on its batch size.
    * Quantizer dropout: clip b is decoded from its first n levels, n ~ U{1..Q}. Codebooks learn
      from all levels.
    * The commitment loss has a term for each level, with its gradient to x.
    """
    clips, steps, width = x.shape
    levels, codes, _ = state["codebooks"].shape
    start_key, jitter_key, dead_key, drop_key = jax.random.split(key, 4)
    points = jax.lax.stop_gradient(x).reshape(-1, width)  # [P, D]
    even_share = points.shape[0] / codes

    # Codebooks: those of the state, or fitted to the first batch.
    def start() -> jax.Array:
        copies = -(-START_VECTORS_PER_CODE * codes // points.shape[0])
        spread = START_JITTER * jnp.std(points, axis=0)[None, None, :]
        noise = spread * jax.random.normal(jitter_key, (copies, *points.shape))
        vectors = points if copies == 1 else (points[None] + noise).reshape(-1, width)
        return fit(start_key, vectors, levels, codes)

    updates = state["updates"].astype(jnp.float32)
    codebooks = jax.lax.cond(updates > 0.0, lambda: state["codebooks"], start)
    decay = jnp.minimum(DECAY, updates / (updates + DECAY_RAMP))

    # Quantize, and move the averages.
    def level(residual: jax.Array, inputs: tuple[jax.Array, ...]):
        codebook, count, total, key = inputs
        code = kmeans.nearest(codebook, residual)  # [P]
        chosen = codebook[code]
        member = jax.nn.one_hot(code, codes)  # [P, C]
        sums = jnp.matmul(member.T, residual, precision=jax.lax.Precision.HIGHEST)
        count = decay * count + (1.0 - decay) * member.sum(0)
        total = decay * total + (1.0 - decay) * sums
        dead = count < DEAD_SHARE * even_share
        random = residual[jax.random.randint(key, (codes,), 0, residual.shape[0])]  # [C, D]
        count = jnp.where(dead, even_share, count)
        total = jnp.where(dead[:, None], even_share * random, total)
        return residual - chosen, (code, chosen, count, total)

    inputs = (codebooks, state["counts"], state["sums"], jax.random.split(dead_key, levels))
    _, (chosen_codes, chosen, counts, sums) = jax.lax.scan(level, points, inputs)
    new_state = {
        "codebooks": sums / counts[:, :, None],
        "counts": counts,
        "sums": sums,
        "updates": state["updates"] + 1,
    }

    # The output, of a random number of levels.
    chosen = chosen.reshape(levels, clips, steps, width)
    commitment = jnp.mean(jnp.square(x[None] - jnp.cumsum(chosen, 0)))
    quantized = jnp.einsum("qb,qbtd->btd", _dropout_mask(drop_key, levels, clips), chosen)
    straight = x + jax.lax.stop_gradient(quantized - x)
    codes_out = jnp.moveaxis(chosen_codes, 0, -1).reshape(clips, steps, levels)
    return Trained(straight, codes_out, commitment), new_state


def _dropout_mask(key: jax.Array, levels: int, clips: int) -> jax.Array:
    """Draws quantizer dropout: float32 [Q, B], 1 for the first n ~ U{1..Q} levels of each clip."""
    used = jax.random.randint(key, (clips,), 1, levels + 1)
    return (jnp.arange(levels)[:, None] < used[None, :]).astype(jnp.float32)


# --- DAC's quantizer (2306.06546, section 3.2) ---
# Each level projects its residual to a few dimensions and compares angles there. Codebooks and
# projections are trained by gradient.


def init_factored(key: jax.Array, levels: int, codes: int, width: int, code_width: int) -> Factors:
    """Draws random projections and codewords."""
    in_key, code_key, out_key = jax.random.split(key, 3)
    return {
        "in": jax.random.normal(in_key, (levels, width, code_width)) * width**-0.5,
        "in_bias": jnp.zeros((levels, code_width)),
        "codebooks": jax.random.normal(code_key, (levels, codes, code_width)),
        "out": jax.random.normal(out_key, (levels, code_width, width)) * code_width**-0.5,
        "out_bias": jnp.zeros((levels, width)),
    }


def full_codebooks(factors: Factors) -> jax.Array:
    """Projects the codewords to full width: [Q, C, D], as `dequantize` needs them."""
    full = jnp.einsum("qcw,qwd->qcd", factors["codebooks"], factors["out"])
    return full + factors["out_bias"][:, None, :]


def _nearest_angle(codebook: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the codeword [C, W] of the largest cosine: [..., W] -> [...] int32.

    The code is -1 where x is not finite.
    """
    norm = jnp.maximum(jnp.sum(jnp.square(codebook), -1, keepdims=True), 1e-12)
    directions = codebook * jax.lax.rsqrt(norm)
    cosines = jnp.matmul(x, directions.T, precision=jax.lax.Precision.HIGHEST)
    codes = jnp.argmax(cosines, -1).astype(jnp.int32)
    return jnp.where(jnp.isfinite(x).all(-1), codes, -1)


def quantize_factored(factors: Factors, x: jax.Array) -> jax.Array:
    """Quantizes x [..., D], each level to the smallest angle: [..., Q] int32."""

    def level(
        residual: jax.Array, inputs: tuple[Factors, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        own, codebook = inputs
        codes = _nearest_angle(own["codebooks"], residual @ own["in"] + own["in_bias"][None, :])
        return residual - codebook[codes], codes

    points = x.astype(jnp.float32).reshape(-1, x.shape[-1])  # [P, D]
    codes = jax.lax.scan(level, points, (factors, full_codebooks(factors)))[1]  # [Q, P]
    return codes.T.reshape(*x.shape[:-1], -1)


def train_factored(factors: Factors, x: jax.Array, key: jax.Array) -> Trained:
    """Runs one training pass over x [B, T, D], with quantizer dropout as in `train`.

    Gradients go straight through each level's search, to the projections and to x. `commitment` is
    the squared distance between projected residual and codeword, averaged over levels. Its gradient
    to the codeword is four times as strong (DAC's weights are 0.25 and 1).
    """
    levels = factors["codebooks"].shape[0]
    stop = jax.lax.stop_gradient

    def level(residual: jax.Array, own: Factors):
        projected = residual @ own["in"] + own["in_bias"][None, None, :]  # [B, T, W]
        codes = _nearest_angle(own["codebooks"], projected)
        codeword = own["codebooks"][codes]
        to_codeword = jnp.mean(jnp.square(projected - stop(codeword)))
        distance = to_codeword + 4.0 * jnp.mean(jnp.square(stop(projected) - codeword))
        straight = projected + stop(codeword - projected)
        chosen = straight @ own["out"] + own["out_bias"][None, None, :]  # [B, T, D]
        return residual - chosen, (codes, chosen, distance)

    _, (codes, chosen, distances) = jax.lax.scan(level, x, factors)
    quantized = jnp.einsum("qb,qbtd->btd", _dropout_mask(key, levels, x.shape[0]), chosen)
    return Trained(quantized, jnp.moveaxis(codes, 0, -1), jnp.mean(distances))
