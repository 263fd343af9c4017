"""The policy as the learner knows it: three functions over opaque tokens [B, F, K].

`sample` draws them, `log_probs` scores them with the full vocabulary's distribution, `values` judges every prefix.
Another music model takes MusicLM's place by offering the same three.

Legend: B clips, F frames, K codes in a frame, V ids at a place, M MuLan levels.
"""

from typing import Any

import jax
import jax.numpy as jnp

from musicrl_jax.models.musiclm import MusicLM, Value


def token_log_probs(log_distribution: jax.Array, tokens: jax.Array) -> jax.Array:
    """The log-probability of each token: f32 [..., V], int32 [...] -> f32 [...]."""
    return jnp.take_along_axis(log_distribution, tokens[..., None], axis=-1)[..., 0]


def sample(
    model: MusicLM, params: Any, mulan: jax.Array, keys: jax.Array, frames: int, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Draws clips from the policy at a temperature, without top-k or guidance (MusicRL 3.3).

    Each row has its own key, folded with the frame: what a row draws does not depend on the rest of the batch. The
    caches travel in the loop's carry and are updated in place.

    Args:
      model: the policy's module.
      params: its weights.
      mulan: int32 [B, M], MuLan tokens of the prompts.
      keys: [B], a key for each row.
      frames: F, the length of the clips.
      temperature: > 0; the policy is the tempered distribution, so log-probs are those at this temperature.

    Returns:
      (tokens int32 [B, F, K], their log-probs f32 [B, F, K]).
    """
    layout = model.config.layout
    variables = {"params": params}
    batch = len(mulan)

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
            scores = jax.nn.log_softmax(logits / temperature, axis=-1)
            code = jnp.argmax(scores.astype(jnp.float32) + place_noise, axis=-1).astype(jnp.int32)
            return (code, depth_cache), (code, token_log_probs(scores, code))

        start = (jnp.zeros(batch, jnp.int32), apply("empty_depth_cache", batch))
        places = jnp.arange(layout.depth, dtype=jnp.int32)
        _, (codes, scores) = jax.lax.scan(draw_code, start, (places, jnp.moveaxis(noise, 1, 0)))
        return (codes.T, cache), (codes.T, scores.T)  # [B, K] each

    start = (jnp.zeros((batch, layout.depth), jnp.int32), cache)
    _, (tokens, scores) = jax.lax.scan(draw_frame, start, jnp.arange(frames, dtype=jnp.int32))
    return jnp.moveaxis(tokens, 0, 1), jnp.moveaxis(scores, 0, 1)


def log_probs(model: MusicLM, params: Any, tokens: jax.Array, mulan: jax.Array, temperature: float) -> jax.Array:
    """The tempered log-distribution before every token, f32 [B, F, K, V]: the one that `sample` draws from."""
    return jax.nn.log_softmax(model.apply({"params": params}, tokens, mulan) / temperature, axis=-1)


def values(model: Value, params: Any, tokens: jax.Array, mulan: jax.Array) -> jax.Array:
    """V of the prefix before every token, f32 [B, F, K]."""
    return model.apply({"params": params}, tokens, mulan)
