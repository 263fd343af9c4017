"""Residual vector quantization (SoundStream, 2107.03312, section III-C) as pure functions over codebooks.

Level q quantizes what levels 0..q-1 left of x; the sum of the chosen codewords stands for x. A quantizer at work is
just `codebooks [Q, C, D]`; while it is trained its `State` also holds the moving averages the codebooks are made of.

Letters: B clips, T codec frames, Q levels, C codes in a codebook, D width, P vectors of a batch (B * T).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from musicrl_jax.models import kmeans

State = dict[str, jax.Array]  # codebooks [Q, C, D], counts [Q, C], sums [Q, C, D] float32; updates [] int32

DECAY = 0.99
DECAY_RAMP = 9.0
DEAD_SHARE = 0.1
KMEANS_ITERATIONS = 10


def quantize(codebooks: jax.Array, x: jax.Array) -> jax.Array:
    """Codes [..., Q] int32 of x [..., D], level by level, each the nearest codeword to the residual."""

    def level(residual: jax.Array, codebook: jax.Array) -> tuple[jax.Array, jax.Array]:
        codes = kmeans.nearest(codebook, residual)
        return residual - codebook[codes], codes

    codes = jax.lax.scan(level, x.astype(jnp.float32), codebooks)[1]  # [Q, ...]
    return jnp.moveaxis(codes, 0, -1)


def dequantize(codebooks: jax.Array, codes: jax.Array) -> jax.Array:
    """The vectors [..., D] that codes [..., q] stand for: the sum over the first q <= Q levels' codewords."""
    levels = codes.shape[-1]
    if levels > codebooks.shape[0]:
        raise ValueError(f"codes have {levels} levels, the quantizer {codebooks.shape[0]}: are they another codec's?")
    chosen = jax.vmap(lambda codebook, code: codebook[code], in_axes=(0, -1))(codebooks[:levels], codes)
    return chosen.sum(0)


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


class Trained(NamedTuple):
    """What a training pass gives besides the new state."""

    x: jax.Array  # [B, T, D] quantized; gradients go straight through to the input
    codes: jax.Array  # [B, T, Q] int32, all levels, also those dropped in x
    commitment: jax.Array  # [] mean over levels of the mean squared distance of the input to each level's sum


def train(state: State, x: jax.Array, key: jax.Array) -> tuple[Trained, State]:
    """One training pass over x [B, T, D]: quantizes with the old codebooks, returns the updated ones.

    * The first batch starts the codebooks by k-means, level after level.
    * Codewords are moving averages of the residuals that chose them; batch sums run over the whole batch on all
      devices. The decay of update n is n / (n + 9) until that reaches the paper's 0.99: an encoder moves fast at first,
      and codebooks that average over more of the past than there is of it are left behind, all but one code unused.
    * A code whose average count falls under a tenth of an even share (P / C) is drawn anew from the batch's
      residuals, and starts with an even share. The paper's limit of 2 is tied to its batch size; this one is not.
    * Quantizer dropout: clip b is decoded from its first n levels, n ~ U{1..Q}. Codebooks learn from all levels.
    * The commitment term has a part for every level, each with its gradient to x.
    """
    clips, steps, width = x.shape
    levels, codes, _ = state["codebooks"].shape
    start_key, dead_key, drop_key = jax.random.split(key, 3)
    points = jax.lax.stop_gradient(x).reshape(-1, width)  # [P, D]
    even_share = points.shape[0] / codes

    def start() -> jax.Array:
        return kmeans.fit_rvq(start_key, points, levels, codes, KMEANS_ITERATIONS)

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
        total = decay * total + (1.0 - decay) * jnp.matmul(member.T, residual, precision=jax.lax.Precision.HIGHEST)
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
    kept = jax.random.randint(drop_key, (clips,), 1, levels + 1)  # [B] levels that the decoder hears
    heard = (jnp.arange(levels)[:, None] < kept[None, :]).astype(jnp.float32)  # [Q, B]
    quantized = jnp.einsum("qb,qbtd->btd", heard, chosen)
    straight = x + jax.lax.stop_gradient(quantized - x)
    codes_out = jnp.moveaxis(chosen_codes, 0, -1).reshape(clips, steps, levels)
    return Trained(straight, codes_out, commitment), new_state
