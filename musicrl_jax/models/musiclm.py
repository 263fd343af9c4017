"""The policy and its value function: a hierarchical transformer over frame-interleaved tokens.

A temporal transformer runs once per 40 ms frame, a depth transformer over the K codes inside it
(MusicRL, section 3.1; the hierarchy as in RQ-Transformer, arXiv 2203.01941, and UniAudio). The
caption's MuLan tokens are the temporal transformer's prefix.

Legend: B clips, F frames, K codes in a frame, V_k codes at place k, M MuLan levels, D and d widths
of the temporal and the depth transformer.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from musicrl_jax.core import sharding
from musicrl_jax.core.precision import at_least_float32
from musicrl_jax.models.layers import kernel_init, named_init
from musicrl_jax.models.tokens import TokenLayout
from musicrl_jax.models.transformer import Cache, Transformer, TransformerConfig


@dataclasses.dataclass(frozen=True)
class MusicLMConfig:
    """Sizes of the policy.

    Attributes:
      temporal: the transformer over frames.
      depth: the transformer over the codes of one frame.
      layout: order and vocabulary of a frame's codes.
      mulan_levels: MuLan tokens in the prefix, M.
      mulan_codes: size of each MuLan level's vocabulary.
    """

    temporal: TransformerConfig = dataclasses.field(default_factory=TransformerConfig)
    depth: TransformerConfig = dataclasses.field(
        default_factory=lambda: TransformerConfig(layers=6, embed=512, heads=8, mlp=2048)
    )
    layout: TokenLayout = dataclasses.field(default_factory=TokenLayout)
    mulan_levels: int = 12
    mulan_codes: int = 1024

    def smallest(self) -> tuple[jax.Array, jax.Array]:
        """Returns the tokens and MuLan tokens of a clip of one frame, which `init` traces."""
        tokens = jnp.zeros((1, 1, self.layout.depth), jnp.int32)
        return tokens, jnp.zeros((1, self.mulan_levels), jnp.int32)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Draws the variables of a MusicLM."""
        return MusicLM(self).init(key, *self.smallest())


class Trunk(nn.Module):
    """Maps the tokens of the past to a hidden vector for each next token.

    Embeddings are summed in float32, then cast to the dtype of the weight matrices.

    Attributes:
      config: sizes.
      remat, lanes: as in `Transformer`.
      fused: as in `Transformer`, for the temporal one; a frame is too short for it.
    """

    config: MusicLMConfig
    remat: bool = False
    lanes: int = 1
    fused: bool = False

    def setup(self) -> None:
        """Creates parameters and submodules."""
        c, temporal, depth = self.config, self.config.temporal.embed, self.config.depth.embed
        normal = nn.initializers.normal(temporal**-0.5)
        table = named_init(normal, "vocab", "embed")
        self.mulan_table = self.param(
            "mulan_table", table, (c.mulan_levels * c.mulan_codes, temporal)
        )
        self.frame_table = self.param("frame_table", table, (c.layout.ids, temporal))
        self.code_table = self.param("code_table", table, (c.layout.ids, depth))
        self.begin = self.param("begin", named_init(normal, "embed"), (temporal,))
        place_table = named_init(normal, None, "embed")
        self.place = self.param("place", place_table, (c.layout.depth, depth))
        self.bridge = self.param("bridge", kernel_init("embed", None), (temporal, depth))
        self.temporal = Transformer(c.temporal, self.remat, self.lanes, self.fused)
        self.depth = Transformer(c.depth, self.remat, self.lanes)

    def embed_mulan(self, mulan: jax.Array) -> jax.Array:
        """Embeds the prefix of the temporal transformer: int32 [B, M] -> [B, M, D]."""
        c = self.config
        offsets = jnp.arange(c.mulan_levels, dtype=jnp.int32) * c.mulan_codes
        prefix = self.mulan_table[mulan + jnp.broadcast_to(offsets, mulan.shape)]
        return prefix.astype(self.bridge.dtype)

    def embed_frame(self, tokens: jax.Array) -> jax.Array:
        """Embeds whole frames for the temporal transformer: int32 [..., K] -> [..., D]."""
        frame = self.frame_table[self.config.layout.flat_ids(tokens)].sum(axis=-2)
        return frame.astype(self.bridge.dtype)

    # --- whole clips ---

    def context(self, tokens: jax.Array, mulan: jax.Array, deterministic: bool = True) -> jax.Array:
        """Computes a vector for each frame: int32 [B, F, K], int32 [B, M] -> f32 [B, F, d].

        It depends on the MuLan tokens and on all frames before.
        """
        c, dtype = self.config, self.bridge.dtype
        # The prefix, a begin vector, then all frames but the last.
        begin = jnp.broadcast_to(self.begin.astype(dtype), (len(tokens), 1, c.temporal.embed))
        past = self.embed_frame(tokens[:, :-1])  # [B, F - 1, D]
        x = jnp.concatenate([self.embed_mulan(mulan), begin, past], axis=1)
        x = self.temporal(x, deterministic)
        return at_least_float32(x[:, c.mulan_levels :] @ self.bridge)

    def codes(self, context: jax.Array, tokens: jax.Array, deterministic: bool = True) -> jax.Array:
        """Computes a vector for each code: f32 [B, F, d], int32 [B, F, K] -> [B, F, K, d].

        The vector at (f, k) depends on the context of frame f and on the codes before k in it.
        """
        codes = self.code_table[self.config.layout.flat_ids(tokens)[:, :, :-1]]  # [B, F, K - 1, d]
        codes = jnp.pad(codes, ((0, 0), (0, 0), (1, 0), (0, 0))) + self.place[None, None]
        x = (context[:, :, None] + codes).astype(self.bridge.dtype)
        return self.depth.independent(x, deterministic)

    def hidden(self, tokens: jax.Array, mulan: jax.Array, deterministic: bool = True) -> jax.Array:
        """Computes a vector for each token: int32 [B, F, K], int32 [B, M] -> [B, F, K, d]."""
        return self.codes(self.context(tokens, mulan, deterministic), tokens, deterministic)

    # --- cached decoding ---

    def temporal_bias(self, frames: int) -> jax.Array:
        """Returns the temporal transformer's position bias for a clip; compute it once per clip."""
        return self.temporal.bias(self.config.mulan_levels + frames)

    def depth_bias(self) -> jax.Array:
        """Returns the depth transformer's position bias; compute it once per clip."""
        return self.depth.bias(self.config.layout.depth)

    def start_clip(self, mulan: jax.Array, frames: int, bias: jax.Array) -> Cache:
        """Returns the temporal cache of a clip, filled with the prefix, int32 [B, M]."""
        length = self.config.mulan_levels + frames
        # `len` would need a constant batch; an exported function has a symbolic one.
        cache = self.temporal.empty_cache(mulan.shape[0], length, self.bridge.dtype)
        return self.temporal.extend(self.embed_mulan(mulan), cache, 0, bias)[1]

    def next_frame(
        self, previous: jax.Array, cache: Cache, frame: jax.Array, bias: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """Computes the context [B, d] of a frame.

        Args:
          previous: int32 [B, K], the codes of the frame before; ignored for frame 0.
          cache: the temporal cache.
          frame: index of the frame, int32 [].
          bias: `temporal_bias` of the clip.

        Returns:
          The context, and the cache with this frame.
        """
        begin = self.begin.astype(self.bridge.dtype)[None]
        x = jnp.where(frame > 0, self.embed_frame(previous), begin)
        x, cache = self.temporal.extend(x[:, None], cache, self.config.mulan_levels + frame, bias)
        return x[:, 0] @ self.bridge, cache

    def empty_depth_cache(self, batch: int) -> Cache:
        """Returns a cache without codes, which grows by each code of a frame."""
        return self.depth.empty_cache(batch, 0, self.bridge.dtype)

    def next_code(
        self,
        context: jax.Array,
        previous: jax.Array | None,
        cache: Cache,
        place: int,
        bias: jax.Array,
    ) -> tuple[jax.Array, Cache]:
        """Computes the hidden vector [B, d] at one place of a frame.

        Args:
          context: [B, d], of the frame.
          previous: int32 [B], the code at the place before; None at place 0.
          cache: the depth cache, with the codes before.
          place: in 0 .. K - 1.
          bias: `depth_bias`.

        Returns:
          The vector, and the cache with this place.
        """
        x = at_least_float32(context) + self.place[place][None]
        if previous is not None:
            x += self.code_table[previous + self.config.layout.starts[place - 1]]
        x, cache = self.depth.extend(x.astype(self.bridge.dtype)[:, None], cache, place, bias)
        return x[:, 0], cache


class MusicLM(nn.Module):
    """The policy: a trunk, and a softmax head for each place of a frame. Place 0 is semantic.

    Attributes:
      config: sizes.
      remat, lanes, fused: as in `Trunk`.
    """

    config: MusicLMConfig
    remat: bool = False
    lanes: int = 1
    fused: bool = False

    def setup(self) -> None:
        """Creates parameters and submodules."""
        layout, width = self.config.layout, self.config.depth.embed
        self.trunk = Trunk(self.config, self.remat, self.lanes, self.fused)
        normal = nn.initializers.normal(width**-0.5)
        self.semantic_head = self.param(
            "semantic_head", named_init(normal, "embed", "vocab"), (width, layout.semantic_codes)
        )
        self.acoustic_head = self.param(
            "acoustic_head",
            named_init(normal, None, "embed", "vocab"),
            (layout.depth - 1, width, layout.acoustic_codes),
        )

    def __call__(
        self, tokens: jax.Array, mulan: jax.Array, deterministic: bool = True
    ) -> tuple[jax.Array, ...]:
        """Computes each token's logits, given the tokens before it.

        Args:
          tokens: int32 [B, F, K].
          mulan: int32 [B, M].
          deterministic: False applies dropout.

        Returns:
          f32 [B, F, V_k] for each place k: over the codes that it has.
        """
        context = self.context(tokens, mulan, deterministic)
        return self.frame_logits(context, tokens, deterministic)

    def context(self, tokens: jax.Array, mulan: jax.Array, deterministic: bool = True) -> jax.Array:
        """Returns `Trunk.context`, f32 [B, F, d]; `frame_logits` maps it to logits."""
        return sharding.by_row(self.trunk.context(tokens, mulan, deterministic))

    def frame_logits(
        self, context: jax.Array, tokens: jax.Array, deterministic: bool = True
    ) -> tuple[jax.Array, ...]:
        """Computes the logits of any frames, each by itself.

        Args:
          context: f32 [B, F, d], of the frames.
          tokens: int32 [B, F, K].
          deterministic: False applies dropout.

        Returns:
          f32 [B, F, V_k] for each place k.
        """
        hidden = sharding.by_row(self.trunk.codes(context, tokens, deterministic))
        return tuple(
            self.logits(hidden[:, :, place], place) for place in range(self.config.layout.depth)
        )

    def logits(self, hidden: jax.Array, place: int) -> jax.Array:
        """Maps the hidden vectors of a place to its logits: [..., d] -> f32 [..., V_k]."""
        head = self.acoustic_head[place - 1] if place else self.semantic_head
        return at_least_float32(hidden) @ at_least_float32(head)

    # --- cached decoding: the trunk's functions, and logits in place of hidden vectors ---

    def temporal_bias(self, frames: int) -> jax.Array:
        """Returns `Trunk.temporal_bias`."""
        return self.trunk.temporal_bias(frames)

    def depth_bias(self) -> jax.Array:
        """Returns `Trunk.depth_bias`."""
        return self.trunk.depth_bias()

    def start_clip(self, mulan: jax.Array, frames: int, bias: jax.Array) -> Cache:
        """Returns `Trunk.start_clip`."""
        return self.trunk.start_clip(mulan, frames, bias)

    def next_frame(
        self, previous: jax.Array, cache: Cache, frame: jax.Array, bias: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """Returns `Trunk.next_frame`."""
        return self.trunk.next_frame(previous, cache, frame, bias)

    def empty_depth_cache(self, batch: int) -> Cache:
        """Returns `Trunk.empty_depth_cache`."""
        return self.trunk.empty_depth_cache(batch)

    def next_logits(
        self,
        context: jax.Array,
        previous: jax.Array | None,
        cache: Cache,
        place: int,
        bias: jax.Array,
    ) -> tuple[jax.Array, Cache]:
        """Computes logits f32 [B, V_k] at one place and the depth cache, as `Trunk.next_code`."""
        hidden, cache = self.trunk.next_code(context, previous, cache, place, bias)
        return self.logits(hidden, place), cache


class Value(nn.Module):
    """The value V(s) before every token: the policy's trunk under a scalar head of zeros.

    Training starts from the policy's trunk.

    Attributes:
      config: sizes.
      remat, lanes, fused: as in `Trunk`.
    """

    config: MusicLMConfig
    remat: bool = False
    lanes: int = 1
    fused: bool = False

    def setup(self) -> None:
        """Creates parameters and submodules."""
        self.trunk = Trunk(self.config, self.remat, self.lanes, self.fused)
        zeros = nn.initializers.zeros
        self.head = self.param("head", named_init(zeros, "embed"), (self.config.depth.embed,))
        self.offset = self.param("offset", zeros, ())

    def __call__(self, tokens: jax.Array, mulan: jax.Array) -> jax.Array:
        """Computes values: int32 [B, F, K], int32 [B, M] -> f32 [B, F, K].

        The value at (f, k) does not depend on the token at (f, k).
        """
        return at_least_float32(self.trunk.hidden(tokens, mulan)) @ self.head + self.offset
