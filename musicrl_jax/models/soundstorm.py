"""SoundStorm: the fine codec levels in parallel, given the coarse ones (arXiv 2305.09636).

A bidirectional conformer sees each codec frame as the sum of its levels' embeddings; codes not known yet share a mask
embedding. Level after level, the most confident frames are kept and the rest predicted again.

Legend: B clips, T codec frames, Q codec levels (the first `coarse_levels` are given), C codes in a codebook, D width.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from musicrl_jax.models.conformer import Conformer, ConformerConfig


@dataclasses.dataclass(frozen=True)
class SoundStormConfig:
    """Sizes, and how decoding spends its passes.

    Attributes:
      conformer: the network.
      levels: Q, all codec levels.
      coarse_levels: those that are given.
      codes: C.
      first_passes: passes over the first fine level; each later level gets one (the paper's 16, 1, ..., 1).
    """

    conformer: ConformerConfig
    levels: int = 12
    coarse_levels: int = 4
    codes: int = 1024
    first_passes: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.coarse_levels < self.levels:
            raise ValueError(
                f"SoundStormConfig.coarse_levels={self.coarse_levels} must lie between 1 and levels={self.levels} - 1"
            )

    @property
    def passes(self) -> tuple[int, ...]:
        """Passes over each fine level."""
        return (self.first_passes,) + (1,) * (self.levels - self.coarse_levels - 1)


class SoundStorm(nn.Module):
    """Logits of every fine level from partly masked codes."""

    config: SoundStormConfig

    @nn.compact
    def __call__(self, codes: jax.Array, masked: jax.Array) -> jax.Array:
        """codes int32 [B, T, Q], masked bool [B, T, Q] -> logits f32 [B, T, Q - coarse_levels, C]."""
        c = self.config
        width = c.conformer.embed
        table = self.param(
            "table",
            nn.with_logical_partitioning(nn.initializers.normal(width**-0.5), (None, "vocab", "embed")),
            (c.levels, c.codes + 1, width),
        )
        ids = jnp.where(masked, c.codes, codes)
        x = sum(table[level][ids[:, :, level]] for level in range(c.levels))  # [B, T, D]
        x = Conformer(c.conformer)(x)
        head = self.param(
            "head",
            nn.with_logical_partitioning(nn.initializers.normal(width**-0.5), (None, "embed", "vocab")),
            (c.levels - c.coarse_levels, width, c.codes),
        )
        return jnp.einsum("btd,qdc->btqc", x, head).astype(jnp.float32)


def training_mask(key: jax.Array, shape: tuple[int, int, int], coarse_levels: int) -> tuple[jax.Array, jax.Array]:
    """What a training example hides and what its loss is taken on (SoundStorm 3.2), bool [B, T, Q] both.

    For each clip a fine level q is drawn, and of its frames the share cos(u pi / 2), u ~ U[0, 1), is hidden, one at
    least; above q all is hidden, below nothing. The loss is on the hidden frames of level q.
    """
    batch, frames, levels = shape
    level_key, share_key, frame_key = jax.random.split(key, 3)
    level = jax.random.randint(level_key, (batch, 1, 1), coarse_levels, levels)
    share = jnp.cos(jax.random.uniform(share_key, (batch, 1)) * (jnp.pi / 2))
    rank = jax.random.uniform(frame_key, (batch, frames)).argsort(axis=1).argsort(axis=1)
    hidden = rank < jnp.maximum(jnp.ceil(share * frames), 1.0).astype(rank.dtype)  # [B, T]
    index = jnp.arange(levels)[None, None, :]
    target = hidden[:, :, None] & (index == level)
    return target | jnp.broadcast_to(index > level, shape), target


def fill_fine(model: SoundStorm, variables: Any, coarse: jax.Array, keys: jax.Array) -> jax.Array:
    """All codec levels from the coarse ones, by confidence-ranked parallel decoding (SoundStorm 3.3).

    In pass i of n over a level, codes are drawn for the frames still hidden, and all but the share cos(i/n pi/2) of the
    frames are kept, the most confident first; the last pass takes the most likely code.

    Args:
      model: the module.
      variables: its variables.
      coarse: int32 [B, T, coarse_levels].
      keys: [B], a key for each clip.

    Returns:
      int32 [B, T, Q].
    """
    c = model.config
    batch, frames, _ = coarse.shape
    codes = jnp.pad(coarse, ((0, 0), (0, 0), (0, c.levels - c.coarse_levels)))
    for fine_level, passes in enumerate(c.passes):
        level = c.coarse_levels + fine_level
        hidden = jnp.ones((batch, frames), bool)
        for i in range(1, passes + 1):
            above = jnp.broadcast_to(jnp.arange(c.levels)[None, None, :] > level, codes.shape)
            masked = above.at[:, :, level].set(hidden)
            scores = jax.nn.log_softmax(model.apply(variables, codes, masked)[:, :, fine_level], axis=-1)
            if i == passes:
                drawn = scores.argmax(axis=-1)
            else:
                pass_keys = jax.vmap(lambda key, n=level * c.first_passes + i: jax.random.fold_in(key, n))(keys)
                noise = jax.vmap(lambda key: jax.random.gumbel(key, (frames, c.codes)))(pass_keys)
                drawn = (scores + noise).argmax(axis=-1)
            drawn = jnp.where(hidden, drawn.astype(jnp.int32), codes[:, :, level])
            codes = codes.at[:, :, level].set(drawn)
            confidence = jnp.take_along_axis(scores, drawn[:, :, None], axis=-1)[:, :, 0]
            confidence = jnp.where(hidden, confidence, jnp.inf)
            still_hidden = int(frames * math.cos(math.pi / 2 * i / passes))
            hidden = confidence.argsort(axis=1).argsort(axis=1) < still_hidden
    return codes
