"""Sampling of tokens: the distribution, how clips begin, and the result.

Legend: B clips, S tokens of a clip in sampling order, V token ids.
"""

import dataclasses
import math
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The distribution that tokens are sampled from, which *is* the policy.

    Attributes:
      temperature: above 0; an f32 array that broadcasts against the logits gives each clip its own.
      top_k: only the k likeliest tokens, and those as likely as the last of them, may be sampled;
        None, the paper's choice, allows all.
    """

    temperature: float | jax.Array = 0.99
    top_k: int | None = None

    def __post_init__(self) -> None:
        is_array = isinstance(self.temperature, jax.Array)
        is_number = isinstance(self.temperature, float | int)
        if not is_array and not (is_number and 0 < self.temperature < math.inf):
            raise ValueError(f"temperature={self.temperature!r} must be above 0 and finite")
        if self.top_k is not None and not (isinstance(self.top_k, int) and self.top_k >= 1):
            raise ValueError(f"top_k={self.top_k!r} must be 1 or more, or None for all codes")

    def allowed(self, logits: jax.Array) -> jax.Array | None:
        """Returns which tokens may be sampled, bool [..., V]; None if all may."""
        if self.top_k is None or self.top_k >= logits.shape[-1]:
            return None
        return logits >= jax.lax.top_k(logits, self.top_k)[0][..., -1:]

    def log_distribution(self, logits: jax.Array, allowed: jax.Array | None) -> jax.Array:
        """Returns f32 [..., V], renormalised over the allowed tokens; -inf for the others."""
        scaled = logits / self.temperature
        if allowed is not None:
            scaled = jnp.where(allowed, scaled, -jnp.inf)
        return jax.nn.log_softmax(scaled, axis=-1)


class Beginning(NamedTuple):
    """The frames that clips begin with; the system samples the rest."""

    tokens: jax.Array  # int32 [B, S]; those from `length` on are ignored
    length: jax.Array  # int32 [B], tokens of whole frames; a part of a frame is ignored


@flax.struct.dataclass
class SampledTokens:
    """Tokens and the distribution that they were sampled from.

    Attributes:
      tokens: int32 [B, S].
      log_probs: f32 [B, S], log-probabilities of the tokens.
      allowed: bool [B, S, V], the tokens that could have been sampled; None if all could.
    """

    tokens: jax.Array
    log_probs: jax.Array
    allowed: jax.Array | None
