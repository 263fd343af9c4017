"""The symmetric contrastive loss (InfoNCE) that brings two towers together; MuLan (2208.12415), equation 1.

Legend: B clips and their captions, E width of the shared sphere.
"""

import math

import jax
import jax.numpy as jnp

NEVER = -1e9  # a logit that softmax turns into exactly 0 in float32


def identical_rows(text: jax.Array) -> jax.Array:
    """[B, B] bool: which of the texts [B, L] are the same, piece for piece. The diagonal is True."""
    return jnp.all(text[:, None, :] == text[None, :, :], axis=-1)


def contrastive(
    audio: jax.Array, text: jax.Array, temperature: jax.Array, identical: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean over both directions of -log of the own partner's share among the whole batch's partners.

    A caption may stand for several clips of a batch. Each is then right for each, so none is held against the others:
    pairs that `identical` marks, off the diagonal, are left out of the denominators and of the ranks.

    Args:
        audio: [B, E], of length 1.
        text: [B, E], of length 1; row i belongs to row i of `audio`.
        temperature: [], divides the cosines.
        identical: [B, B] bool, symmetric, True where captions are the same.

    Returns:
        The loss, float32 []: ln(B) (`chance`) is what it costs to know nothing. Metrics: loss, chance, temperature,
        recall_1 and recall_10 (share of clips whose own caption is among the 1 or 10 nearest; ties count half), and
        median_rank, where that caption stands for half of the clips, 1 being best.
    """
    size = audio.shape[0]
    own = jnp.eye(size, dtype=bool)
    cosines = jnp.matmul(
        audio, text.T, precision=jax.lax.Precision.HIGHEST
    )  # [B, B], clips down, captions across
    logits = jnp.where(identical & ~own, NEVER, cosines / temperature)
    diagonal = jnp.diagonal(logits)
    to_text = jax.nn.logsumexp(logits, axis=1) - diagonal
    to_audio = jax.nn.logsumexp(logits, axis=0) - diagonal
    loss = jnp.mean(to_text + to_audio) / 2
    rank = _rank(logits, diagonal)
    return loss, {
        "loss": loss,
        "chance": jnp.asarray(math.log(size), jnp.float32),
        "temperature": temperature,
        "recall_1": jnp.mean((rank < 1).astype(jnp.float32)),
        "recall_10": jnp.mean((rank < 10).astype(jnp.float32)),
        "median_rank": jnp.median(rank) + 1,
    }


def _rank(logits: jax.Array, diagonal: jax.Array) -> jax.Array:
    """[B] float32: how many captions are nearer to each clip than its own; each other one as near counts half."""
    nearer = jnp.sum(logits > diagonal[:, None], axis=1).astype(jnp.float32)
    tied = jnp.sum(logits == diagonal[:, None], axis=1).astype(jnp.float32) - 1
    return nearer + tied / 2
