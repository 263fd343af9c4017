"""SoundStorm (2305.09636): the fine codec levels in parallel, given the coarse ones.

A bidirectional conformer sees each codec frame as the sum of its levels' embeddings; codes not known yet share a mask
embedding. Level after level, the most confident frames are kept and the rest predicted again.

Departures from the paper. There the network fills all levels from semantic tokens, which are summed into the frames
too; here, as in MusicLM's fine stage, the coarse levels are given and say more than the semantic tokens would. There is
no prompt delimiter (3.2: nothing before a random time t is masked): it serves voice prompts, and no one here gives fine
levels to start from. The hidden frames of the drawn level are an exact number, as in MaskGIT (2202.04200) and in
decoding, where the paper draws each frame for itself with that probability.

Legend: B clips, T codec frames, Q codec levels (the first `coarse_levels` are given), C codes in a codebook, D width.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

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

    conformer: ConformerConfig = dataclasses.field(default_factory=ConformerConfig)
    levels: int = 12
    coarse_levels: int = 4
    codes: int = 1024
    first_passes: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.coarse_levels < self.levels:
            raise ValueError(
                f"SoundStormConfig.coarse_levels={self.coarse_levels} must lie between 1 and levels={self.levels} - 1"
            )
        if self.first_passes < 1:
            raise ValueError(
                f"SoundStormConfig.first_passes={self.first_passes} must be at least 1"
            )

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Draws the variables of a SoundStorm."""
        codes = jnp.zeros((1, 1, self.levels), jnp.int32)
        return SoundStorm(self).init(key, codes, codes > 0, self.coarse_levels)


class SoundStorm(nn.Module):
    """Logits of one fine level from partly masked codes."""

    config: SoundStormConfig

    @nn.compact
    def __call__(self, codes: jax.Array, masked: jax.Array, level: jax.Array | int) -> jax.Array:
        """Logits f32 [B, T, C] of codec level `level`, coarse_levels <= level < Q; what is before them in the dtype
        of the matrices.

        Every level has a head of its own; only the one that is asked for is computed.

        Args:
          codes: int32 [B, T, Q].
          masked: bool [B, T, Q], the codes that are not seen.
          level: int32, [] for all clips or [B], one for each.
        """
        c = self.config
        width = c.conformer.embed
        table = self.param(
            "table",
            nn.with_logical_partitioning(
                nn.initializers.normal(width**-0.5), (None, None, "embed")
            ),
            (
                c.levels,
                c.codes + 1,
                width,
            ),  # the last is the mask; a mesh's axis would not divide that many rows
        )
        ids = jnp.where(masked, c.codes, codes)
        head = self.param(
            "head",
            nn.with_logical_partitioning(
                nn.initializers.normal(width**-0.5), (None, "embed", "vocab")
            ),
            (c.levels - c.coarse_levels, width, c.codes),
        )
        x = sum(table[q][ids[:, :, q]] for q in range(c.levels))  # [B, T, D]
        x = Conformer(c.conformer)(x.astype(head.dtype))
        return jnp.matmul(x.astype(jnp.float32), head[level - c.coarse_levels].astype(jnp.float32))


class Hidden(NamedTuple):
    """What a training example hides, and where its loss is taken."""

    masked: (
        jax.Array
    )  # [B, T, Q] bool, not seen: part of `level`, all of the levels above, nothing below
    level: jax.Array  # [B] int32, the fine level that the loss is about
    target: jax.Array  # [B, T] bool, the hidden frames of that level: the loss is on these alone


def training_mask(key: jax.Array, shape: tuple[int, int, int], coarse_levels: int) -> Hidden:
    """Draws what each clip of codes [B, T, Q] hides (SoundStorm 3.2).

    The level is uniform over the fine ones; of its frames the share cos(u), u ~ U[0, pi / 2), rounded up, is hidden.
    """
    batch, frames, levels = shape
    level_key, share_key, frame_key = jax.random.split(key, 3)
    level = jax.random.randint(level_key, (batch, 1, 1), coarse_levels, levels)
    share = jnp.cos(jax.random.uniform(share_key, (batch, 1)) * (jnp.pi / 2))
    rank = jax.random.uniform(frame_key, (batch, frames)).argsort(axis=1).argsort(axis=1)
    hidden = rank < jnp.maximum(jnp.ceil(share * frames), 1.0).astype(rank.dtype)  # [B, T]
    index = jnp.arange(levels)[None, None, :]
    masked = jnp.where(index == level, hidden[:, :, None], index > level)
    return Hidden(masked, level[:, 0, 0], hidden)


class Passes(NamedTuple):
    """The forward passes of decoding in their order, [P] each; P = first_passes + fine levels - 1."""

    level: np.ndarray  # int32, the codec level that a pass decides
    number: np.ndarray  # int32, from 1 in each level
    last: np.ndarray  # bool, whether it is its level's last, which takes the most likely codes
    hidden: np.ndarray  # int32, the frames of the level that are still hidden after it


def schedule(config: SoundStormConfig, frames: int) -> Passes:
    """After pass i of n over a level, floor(T cos(i / n pi / 2)) of its T frames are still hidden."""
    each = [config.first_passes] + [1] * (config.levels - config.coarse_levels - 1)
    level = np.repeat(np.arange(config.coarse_levels, config.levels), each)
    number = np.concatenate([np.arange(1, n + 1) for n in each])
    of = np.repeat(each, each)
    hidden = np.floor(frames * np.cos(np.pi / 2 * number / of))
    return Passes(
        level.astype(np.int32), number.astype(np.int32), number == of, hidden.astype(np.int32)
    )


def fill_fine(model: SoundStorm, variables: Any, coarse: jax.Array, keys: jax.Array) -> jax.Array:
    """All codec levels from the coarse ones, by confidence-ranked parallel decoding (SoundStorm 3.3).

    In each pass, codes are drawn for the frames of a level that are still hidden, and the most confident ones are kept,
    as many as `schedule` says; once kept, a code stays. A level's last pass takes the most likely codes. Confidence is
    the log-probability of what was drawn, without MaskGIT's noise. The passes are one loop around one copy of the
    network, so that their number costs no compilation.

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
    index = jnp.arange(c.levels)[None, None, :]

    def draw(scores: jax.Array, step: Passes) -> jax.Array:
        # Codes in proportion to their probability, [B, T].
        step_keys = jax.vmap(
            lambda key: jax.random.fold_in(key, step.level * c.first_passes + step.number)
        )(keys)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (frames, c.codes)))(step_keys)
        return (scores + noise).argmax(axis=-1)

    def decide(
        state: tuple[jax.Array, jax.Array], step: Passes
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        codes, hidden = state  # [B, T, Q], [B, T]
        masked = jnp.where(index == step.level, hidden[:, :, None], index > step.level)
        scores = jax.nn.log_softmax(
            model.apply(variables, codes, masked, step.level), axis=-1
        )  # [B, T, C]
        drawn = jax.lax.cond(step.last, lambda: scores.argmax(axis=-1), lambda: draw(scores, step))
        confidence = jnp.take_along_axis(scores, drawn[:, :, None], axis=-1)[:, :, 0]
        codes = jnp.where(
            (index == step.level) & hidden[:, :, None], drawn[:, :, None].astype(codes.dtype), codes
        )
        rank = jnp.where(hidden, confidence, jnp.inf).argsort(axis=1).argsort(axis=1)
        return (
            codes,
            (rank < step.hidden) | step.last,
        ), None  # the next level starts with all frames hidden

    codes = jnp.pad(coarse, ((0, 0), (0, 0), (0, c.levels - c.coarse_levels)))
    start = (codes, jnp.ones((batch, frames), bool))
    passes = jax.tree.map(jnp.asarray, schedule(c, frames))
    return jax.lax.scan(decide, start, passes)[0][0]
