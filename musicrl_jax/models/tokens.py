"""The layout of the policy's tokens: semantic and coarse acoustic codes, interleaved by frame.

A frame is 40 ms: one semantic code (25 Hz) and two codec frames (50 Hz) of `coarse_levels` codes
each. Codec frames are in time order, and each one's levels follow each other (MusicRL, section 3.1;
MusicLM, section 3.2). Each place of a frame has its own range of ids.

Legend: B clips, F frames, T = 2 F codec frames, K = 1 + 2 * coarse_levels places in a frame.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

# Rates of MusicLM's tokens: 50 Hz codec frames, 25 Hz policy frames.
CODEC_FRAMES_PER_FRAME = 2
FRAMES_PER_SECOND = 25


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """Vocabulary and order of a frame's codes.

    Attributes:
      semantic_codes: size of the semantic vocabulary.
      acoustic_codes: size of each codec level's codebook.
      coarse_levels: codec levels that the policy generates. SoundStorm adds the fine ones.
    """

    semantic_codes: int = 1024
    acoustic_codes: int = 1024
    coarse_levels: int = 4

    @property
    def depth(self) -> int:
        """The places in a frame, K."""
        return 1 + CODEC_FRAMES_PER_FRAME * self.coarse_levels

    @property
    def vocabulary(self) -> int:
        """The size of the larger codebook, V."""
        return max(self.semantic_codes, self.acoustic_codes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The size of each place's codebook, V_k."""
        return (self.semantic_codes, *[self.acoustic_codes] * (self.depth - 1))

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """The first flat id of each place, then the number of ids, int32 [K + 1]."""
        return np.cumsum([0, *self.sizes], dtype=np.int32)

    @property
    def ids(self) -> int:
        """The number of flat ids."""
        return int(self.starts[-1])

    def flat_ids(self, tokens: jax.Array) -> jax.Array:
        """Maps codes to ids in [0, `ids`), one range per place: int32 [..., K], as tokens."""
        return tokens + jnp.broadcast_to(self.starts[:-1], tokens.shape)


def interleave(semantic: jax.Array, coarse: jax.Array) -> jax.Array:
    """Joins semantic int32 [..., F] and coarse int32 [..., 2F, levels] to tokens int32 [..., F, K].

    Raises ValueError unless there are two codec frames for each semantic code.
    """
    if coarse.shape[:-1] != (*semantic.shape[:-1], CODEC_FRAMES_PER_FRAME * semantic.shape[-1]):
        raise ValueError(
            f"coarse codes {coarse.shape} do not fit semantic codes {semantic.shape}: "
            f"give two codec frames for each semantic code"
        )
    return jnp.concatenate([semantic[..., None], coarse.reshape(*semantic.shape, -1)], axis=-1)


def deinterleave(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Splits tokens int32 [B, F, K] into semantic int32 [B, F] and coarse int32 [B, 2F, levels]."""
    batch, frames, depth = tokens.shape
    coarse_levels = (depth - 1) // CODEC_FRAMES_PER_FRAME
    coarse = tokens[:, :, 1:].reshape(batch, CODEC_FRAMES_PER_FRAME * frames, coarse_levels)
    return tokens[:, :, 0], coarse
