"""The symmetric contrastive loss (InfoNCE) of two towers, as in MuLan (2208.12415), equation 1.

Legend: B clips and their captions, E width of the shared embedding.
"""

import math

import jax
import jax.numpy as jnp

# A logit that softmax turns into exactly 0 in float32.
NEVER = -1e9


def identical_rows(text: jax.Array) -> jax.Array:
    """Compares all pairs of texts [B, L] piece by piece: bool [B, B], with a True diagonal."""
    return jnp.all(text[:, None, :] == text[None, :, :], axis=-1)


def contrastive(
    audio: jax.Array, text: jax.Array, temperature: jax.Array, identical: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the cross-entropy of each clip's own caption and of each caption's own clip.

    A batch may hold a caption several times. Each copy is right for each of its clips, so pairs of
    identical captions (off the diagonal) are left out of the denominators and of the ranks.

    Args:
      audio: [B, E], of length 1.
      text: [B, E], of length 1; row i belongs to row i of `audio`.
      temperature: [], divides the cosines.
      identical: [B, B] bool, symmetric, True where captions are the same.

    Returns:
      The loss, float32 [], and metrics: loss; chance, the loss ln(B) of a uniform guess;
      temperature; recall_1 and recall_10, the share of clips with their own caption among the 1 or
      10 nearest (ties count half); median_rank of a clip's own caption, where 1 is best.
    """
    # Pairs of clips and captions, without the copies of a clip's own caption.
    size = audio.shape[0]
    cosines = jnp.matmul(audio, text.T, precision=jax.lax.Precision.HIGHEST)  # [clips, captions]
    logits = jnp.where(identical & ~jnp.eye(size, dtype=bool), NEVER, cosines / temperature)
    own = jnp.diagonal(logits)

    # The loss, both ways.
    to_text = jax.nn.logsumexp(logits, axis=1) - own
    to_audio = jax.nn.logsumexp(logits, axis=0) - own
    loss = jnp.mean(to_text + to_audio) / 2

    # Captions that are nearer to a clip than its own.
    nearer = jnp.sum(logits > own[:, None], axis=1).astype(jnp.float32)
    tied = jnp.sum(logits == own[:, None], axis=1).astype(jnp.float32) - 1
    rank = nearer + tied / 2
    return loss, {
        "loss": loss,
        "chance": jnp.asarray(math.log(size), jnp.float32),
        "temperature": temperature,
        "recall_1": jnp.mean((rank < 1).astype(jnp.float32)),
        "recall_10": jnp.mean((rank < 10).astype(jnp.float32)),
        "median_rank": jnp.median(rank) + 1,
    }
