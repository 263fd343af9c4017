"""SoundStorm (2305.09636): the fine codec levels, decoded in parallel given the coarse ones.

A bidirectional conformer sees each codec frame as the sum of its levels' embeddings; hidden codes
have a mask embedding. Level by level, the most confident frames are kept and the others predicted
again.

Departures from the paper:

* The coarse levels are given, as in MusicLM's fine stage, not the semantic tokens.
* There is no prompt delimiter (section 3.2), which serves voice prompts.
* The number of frames hidden in training is exact, as in MaskGIT (2202.04200) and in decoding. The
  paper hides each frame independently.

Legend: B clips, T codec frames, Q codec levels (the first `coarse_levels` are given), C codes in a
codebook, D width, P passes.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from musicrl_jax.models.categorical import sample_codes
from musicrl_jax.models.conformer import Conformer, ConformerConfig
from musicrl_jax.models.layers import named_init


@dataclasses.dataclass(frozen=True)
class SoundStormConfig:
    """Sizes, and the passes of decoding.

    Attributes:
      conformer: the network.
      levels: all codec levels, Q.
      coarse_levels: given levels.
      codes: C.
      first_passes: passes over the first fine level; later levels have one (the paper's 16, 1, 1).
    """

    conformer: ConformerConfig = dataclasses.field(default_factory=ConformerConfig)
    levels: int = 12
    coarse_levels: int = 4
    codes: int = 1024
    first_passes: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.coarse_levels < self.levels:
            raise ValueError(
                f"SoundStormConfig.coarse_levels={self.coarse_levels} must be between 1 and "
                f"levels={self.levels} - 1"
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
    """The network: logits of one fine level from partly hidden codes."""

    config: SoundStormConfig

    @nn.compact
    def __call__(self, codes: jax.Array, masked: jax.Array, level: jax.Array | int) -> jax.Array:
        """Computes a fine level's logits; each level has its own head.

        Layers below the head are computed in the dtype of their weights.

        Args:
          codes: int32 [B, T, Q].
          masked: bool [B, T, Q], True for hidden codes.
          level: int32, [] for all clips or [B] for each; coarse_levels <= level < Q.

        Returns:
          f32 [B, T, C].
        """
        c, width = self.config, self.config.conformer.embed
        normal = nn.initializers.normal(width**-0.5)
        # The last row of each table is the mask's. No mesh axis divides C + 1 rows.
        embed = named_init(normal, None, None, "embed")
        table = self.param("table", embed, (c.levels, c.codes + 1, width))
        heads = named_init(normal, None, "embed", "vocab")
        head = self.param("head", heads, (c.levels - c.coarse_levels, width, c.codes))
        ids = jnp.where(masked, c.codes, codes)
        x = sum(table[q][ids[:, :, q]] for q in range(c.levels))  # [B, T, D]
        x = Conformer(c.conformer)(x.astype(head.dtype))
        return jnp.matmul(x.astype(jnp.float32), head[level - c.coarse_levels].astype(jnp.float32))


class TrainingMask(NamedTuple):
    """The hidden codes of a training example, and the frames of its loss."""

    # [B, T, Q] bool, True if hidden: some frames of `level`, and all frames of finer levels.
    masked: jax.Array
    # [B] int32, the fine level of the loss.
    level: jax.Array
    # [B, T] bool, the hidden frames of `level`: those of the loss.
    target: jax.Array


def training_mask(key: jax.Array, shape: tuple[int, int, int], coarse_levels: int) -> TrainingMask:
    """Draws the hidden codes for codes of `shape` [B, T, Q] (SoundStorm, section 3.2).

    The level is uniform over the fine ones. Of its frames, a share cos(u), u ~ U[0, pi / 2), is
    hidden, rounded up.
    """
    batch, frames, levels = shape
    # The level, and the share of its frames.
    level_key, share_key, frame_key = jax.random.split(key, 3)
    level = jax.random.randint(level_key, (batch, 1, 1), coarse_levels, levels)
    share = jnp.cos(jax.random.uniform(share_key, (batch, 1)) * (jnp.pi / 2))

    # As many random frames, at least one.
    rank = _ranks(jax.random.uniform(frame_key, (batch, frames)))
    hidden = rank < jnp.maximum(jnp.ceil(share * frames), 1.0).astype(rank.dtype)  # [B, T]
    return TrainingMask(_masked(levels, level, hidden), level[:, 0, 0], hidden)


def _ranks(x: jax.Array) -> jax.Array:
    """Returns each value's rank in its row, [B, T] int32."""
    return x.argsort(axis=1).argsort(axis=1)


def _masked(levels: int, level: jax.Array, hidden: jax.Array) -> jax.Array:
    """Hides frames [B, T] of one level and all levels above it: bool [B, T, Q]."""
    index = jnp.arange(levels)[None, None, :]
    return jnp.where(index == level, hidden[:, :, None], index > level)


# --- decoding ---


class Passes(NamedTuple):
    """The passes of decoding in order, [P] each; P = first_passes + fine levels - 1."""

    # int32, the codec level of a pass.
    level: np.ndarray
    # int32, from 1 in each level.
    number: np.ndarray
    # bool, whether it is the level's last, which takes the most likely codes.
    last: np.ndarray
    # int32, frames of the level that stay hidden after the pass.
    hidden: np.ndarray


def schedule(config: SoundStormConfig, frames: int) -> Passes:
    """Returns the passes; after pass i of n over a level, floor(T cos(i / n pi / 2)) are hidden."""
    counts = [config.first_passes] + [1] * (config.levels - config.coarse_levels - 1)
    level = np.repeat(np.arange(config.coarse_levels, config.levels), counts)
    number = np.concatenate([np.arange(1, count + 1) for count in counts])
    count = np.repeat(counts, counts)
    hidden = np.floor(frames * np.cos(np.pi / 2 * number / count))
    last = number == count
    return Passes(level.astype(np.int32), number.astype(np.int32), last, hidden.astype(np.int32))


def fill_fine(
    model: SoundStorm,
    variables: Any,
    coarse: jax.Array,
    keys: jax.Array,
    past: jax.Array | None = None,
) -> jax.Array:
    """Decodes all levels from the coarse ones by confidence (SoundStorm, section 3.3).

    Each pass samples codes for the hidden frames of a level and keeps the most confident, as many
    as `schedule` says. Kept codes do not change. A level's last pass takes the most likely codes.
    Confidence is the log-probability of the sampled code, without MaskGIT's noise.

    All passes are one `scan`, so more of them do not compile longer.

    A stream decodes a clip in windows that overlap. Each continues from `past`, the P frames that
    the window before decided: the network sees their codes as those of kept frames.

    Args:
      model: the module.
      variables: its variables.
      coarse: int32 [B, T, coarse_levels].
      keys: [B], one per clip.
      past: int32 [B, P, Q], codes of the frames before those of `coarse`; by default P is 0.

    Returns:
      int32 [B, T, Q].
    """
    c = model.config
    batch, frames, _ = coarse.shape

    # The window: the past, whose codes stay, and the frames to decide.
    codes = jnp.pad(coarse, ((0, 0), (0, 0), (0, c.levels - c.coarse_levels)))
    undecided = jnp.ones((batch, frames), bool)
    if past is not None:
        codes = jnp.concatenate([past, codes], axis=1)
        undecided = jnp.pad(undecided, ((0, 0), (past.shape[1], 0)))
    window = codes.shape[1]  # P + T

    def sample(scores: jax.Array, step: Passes) -> jax.Array:
        number = step.level * c.first_passes + step.number
        step_keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
        uniforms = jax.vmap(lambda key: jax.random.uniform(key, (window, 2)))(step_keys)
        return sample_codes(scores, uniforms)

    def decode(
        state: tuple[jax.Array, jax.Array], step: Passes
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        codes, hidden = state  # [B, P + T, Q], [B, P + T]

        # New codes for the hidden frames, [B, P + T].
        logits = model.apply(variables, codes, _masked(c.levels, step.level, hidden), step.level)
        scores = jax.nn.log_softmax(logits, axis=-1)  # [B, P + T, C]
        new = jax.lax.cond(step.last, lambda: scores.argmax(axis=-1), lambda: sample(scores, step))
        replaced = (jnp.arange(c.levels)[None, None, :] == step.level) & hidden[:, :, None]
        codes = jnp.where(replaced, new[:, :, None].astype(codes.dtype), codes)

        # The least confident stay hidden; the next level starts with all T frames hidden.
        confidence = jnp.take_along_axis(scores, new[:, :, None], axis=-1)[:, :, 0]
        rank = _ranks(jnp.where(hidden, confidence, jnp.inf))
        return (codes, (rank < step.hidden) | (step.last & undecided)), None

    passes = jax.tree.map(jnp.asarray, schedule(c, frames))
    return jax.lax.scan(decode, (codes, undecided), passes)[0][0][:, window - frames :]
