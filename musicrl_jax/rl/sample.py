"""The policy as the learner knows it: three functions over opaque tokens [B, F, K].

`sample` draws them, `log_probs` scores them with the full vocabulary's distribution, `values` judges every prefix.
Another music model takes MusicLM's place by offering the same three.

Legend: B clips, F frames, K codes in a frame, V ids at a place, M MuLan levels.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from musicrl_jax.losses.policy_gradient import token_log_probs
from musicrl_jax.models.musiclm import MusicLM, Value


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a policy's logits become the distribution that it draws from, which *is* the policy.

    Attributes:
      temperature: above 0; f32 [B, 1] gives each clip its own.
      top_k: only so many codes of each place, the likeliest, may be drawn, and those that are as likely as the last of
        them; None, the paper's choice: all.
    """

    temperature: float | jax.Array = 0.99
    top_k: int | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.temperature, float | int)
        if not isinstance(self.temperature, jax.Array) and not (number and 0 < self.temperature < math.inf):
            raise ValueError(f"temperature={self.temperature!r} must be above 0 and finite")
        if self.top_k is not None and not (isinstance(self.top_k, int) and self.top_k >= 1):
            raise ValueError(f"top_k={self.top_k!r} must be 1 or more, or None for all codes")

    def allowed(self, logits: jax.Array) -> jax.Array | None:
        """The codes that may be drawn, bool [..., V]; None where all may."""
        if self.top_k is None or self.top_k >= logits.shape[-1]:
            return None
        return logits >= jax.lax.top_k(logits, self.top_k)[0][..., -1:]

    def log_distribution(self, logits: jax.Array, allowed: jax.Array | None) -> jax.Array:
        """Tempered, and renormalised over what is allowed: [..., V], -inf where nothing may be drawn."""
        scaled = logits / self.temperature
        return jax.nn.log_softmax(scaled if allowed is None else jnp.where(allowed, scaled, -jnp.inf), axis=-1)


class Drawn(NamedTuple):
    """What `sample` drew."""

    tokens: jax.Array  # int32 [B, F, K]
    log_probs: jax.Array  # f32 [B, F, K], of the tokens, under the distribution that they were drawn from
    allowed: jax.Array | None  # bool [B, F, K, V], the codes that could have been drawn; None where all could


class Given(NamedTuple):
    """How clips begin."""

    tokens: jax.Array  # int32 [B, F, K]
    frames: jax.Array  # int32 [B], so many of them are given, and the rest of `tokens` is not looked at


def sample(
    model: MusicLM,
    params: Any,
    mulan: jax.Array,
    keys: jax.Array,
    frames: int,
    sampling: Sampling,
    given: Given | None = None,
) -> Drawn:
    """Draws clips from the policy.

    Each row has its own key, folded with the frame: what a row draws does not depend on the rest of the batch. The
    caches travel in the loop's carry and are updated in place.

    Args:
      model: the policy's module.
      params: its weights.
      mulan: int32 [B, M], MuLan tokens of the prompts.
      keys: [B], a key for each row.
      frames: F, the length of the clips.
      sampling: the distribution.
      given: frames that are not drawn, but stand before those that are; their log-probs in what is returned are of
        the codes that would have been drawn.
    """
    layout = model.config.layout
    variables = {"params": params}
    batch = mulan.shape[0]

    def apply(method: str, *arguments: Any) -> Any:
        return model.apply(variables, *arguments, method=method)

    temporal_bias = apply("temporal_bias", frames)
    depth_bias = apply("depth_bias")
    cache = apply("start_clip", mulan, frames, temporal_bias)

    def draw_frame(carry: Any, frame: jax.Array) -> Any:
        previous, cache = carry
        context, cache = apply("next_frame", previous, cache, frame, temporal_bias)
        frame_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, frame)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (layout.depth, layout.vocabulary), jnp.float32))(frame_keys)

        def draw_code(carry: Any, inputs: Any) -> Any:
            previous, depth_cache = carry
            place, place_noise = inputs
            logits, depth_cache = apply("next_logits", context, previous, depth_cache, place, depth_bias)
            allowed = sampling.allowed(logits)
            scores = sampling.log_distribution(logits, allowed)
            code = jnp.argmax(scores.astype(jnp.float32) + place_noise, axis=-1).astype(jnp.int32)
            return (code, depth_cache), Drawn(code, token_log_probs(scores, code), allowed)

        start = (jnp.zeros(batch, jnp.int32), apply("empty_depth_cache", batch))
        places = jnp.arange(layout.depth, dtype=jnp.int32)
        _, drawn = jax.lax.scan(draw_code, start, (places, jnp.moveaxis(noise, 1, 0)))
        drawn = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), drawn)  # [B, K] or [B, K, V]
        if given is not None:
            kept = (frame < given.frames)[:, None]
            drawn = drawn._replace(tokens=jnp.where(kept, given.tokens[:, frame], drawn.tokens))
        return (drawn.tokens, cache), drawn

    start = (jnp.zeros((batch, layout.depth), jnp.int32), cache)
    _, drawn = jax.lax.scan(draw_frame, start, jnp.arange(frames, dtype=jnp.int32))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), drawn)


def log_probs(
    model: MusicLM,
    params: Any,
    tokens: jax.Array,
    mulan: jax.Array,
    sampling: Sampling,
    allowed: jax.Array | None,
) -> jax.Array:
    """The log-distribution before every token, f32 [B, F, K, V]: the one that `sample` draws from.

    `allowed` are the codes that could have been drawn, as `sample` returns them: policy and anchor are renormalised on
    the same ones, else a code that the anchor's own filter leaves out would cost an infinite KL.
    """
    return sampling.log_distribution(model.apply({"params": params}, tokens, mulan), allowed)


def values(model: Value, params: Any, tokens: jax.Array, mulan: jax.Array) -> jax.Array:
    """V of the prefix before every token, f32 [B, F, K]."""
    return model.apply({"params": params}, tokens, mulan)
