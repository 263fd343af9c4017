"""The layout of the policy's tokens: semantic and coarse acoustic codes, interleaved frame by frame.

A frame is 40 ms: one semantic code (25 Hz) and two codec frames (50 Hz) of `coarse_levels` codes each (MusicRL 3.1,
MusicLM 3.2: frame-major, level-minor, each place in the frame with its own range of ids).

Legend: B clips, F frames, T = 2 F codec frames, Q codec levels, K = 1 + 2 * coarse_levels places in a frame.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

CODEC_FRAMES_PER_FRAME = 2
FRAMES_PER_SECOND = 25


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """How codes are laid out in a frame.

    Attributes:
      semantic_codes: size of the semantic vocabulary.
      acoustic_codes: size of each codec level's codebook.
      coarse_levels: the codec levels that the policy generates; the fine ones above come from SoundStorm.
    """

    semantic_codes: int = 1024
    acoustic_codes: int = 1024
    coarse_levels: int = 4

    @property
    def depth(self) -> int:
        """K, the places in a frame."""
        return 1 + CODEC_FRAMES_PER_FRAME * self.coarse_levels

    @property
    def vocabulary(self) -> int:
        """V, the codes of the larger of the two codebooks."""
        return max(self.semantic_codes, self.acoustic_codes)

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """int32 [K + 1]: the first flat id of each place, and behind the last their number."""
        sizes = [self.semantic_codes] + [self.acoustic_codes] * (self.depth - 1)
        return np.cumsum([0, *sizes], dtype=np.int32)

    @property
    def ids(self) -> int:
        """How many flat ids there are."""
        return int(self.starts[-1])

    def flat_ids(self, tokens: jax.Array) -> jax.Array:
        """Ids in [0, `ids`), a range of its own for each place: tokens int32 [..., K] -> int32 [..., K]."""
        return tokens + jnp.broadcast_to(self.starts[:-1], tokens.shape)


def interleave(semantic: jax.Array, coarse: jax.Array) -> jax.Array:
    """Semantic int32 [..., F], coarse int32 [..., 2F, coarse_levels] -> tokens int32 [..., F, K]; a bijection."""
    if coarse.shape[:-1] != (*semantic.shape[:-1], CODEC_FRAMES_PER_FRAME * semantic.shape[-1]):
        raise ValueError(
            f"coarse codes {coarse.shape} do not fit semantic codes {semantic.shape}: "
            f"two codec frames to a semantic one are needed"
        )
    return jnp.concatenate([semantic[..., None], coarse.reshape(*semantic.shape, -1)], axis=-1)


def deinterleave(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The inverse: tokens int32 [B, F, K] -> semantic int32 [B, F], coarse int32 [B, 2F, coarse_levels]."""
    batch, frames, depth = tokens.shape
    coarse_levels = (depth - 1) // CODEC_FRAMES_PER_FRAME
    coarse = tokens[:, :, 1:].reshape(batch, CODEC_FRAMES_PER_FRAME * frames, coarse_levels)
    return tokens[:, :, 0], coarse
