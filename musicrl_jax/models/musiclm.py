"""The policy and its value function: a hierarchical transformer over frame-interleaved tokens.

A temporal transformer runs once a 40 ms frame, a depth transformer over the K codes inside it (MusicRL 3.1; the
hierarchy as in RQ-Transformer, arXiv 2203.01941, and UniAudio). MuLan tokens stand in front as a prefix.

Legend: B clips, F frames, K codes in a frame, V ids at a place, M MuLan levels, D and d widths of the two transformers.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from musicrl_jax.core import sharding
from musicrl_jax.core.precision import at_least_float32
from musicrl_jax.models.tokens import TokenLayout
from musicrl_jax.models.transformer import (
    NEVER,
    Cache,
    Transformer,
    TransformerConfig,
    partitioned,
)


@dataclasses.dataclass(frozen=True)
class MusicLMConfig:
    """Sizes of the policy.

    Attributes:
      temporal: the transformer over frames.
      depth: the transformer over the codes of one frame.
      layout: how a frame's codes are laid out.
      mulan_levels: MuLan tokens in the prefix, M.
      mulan_codes: the codes of each.
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
    """Everything below the heads: tokens of the past -> one vector for each token that comes next.

    What is added up is so in float32, and from there on all is in the dtype of the matrices.
    """

    config: MusicLMConfig
    remat: bool = False  # as in Transformer
    lanes: int = 1  # the same

    def setup(self) -> None:
        c = self.config
        table = nn.initializers.normal(c.temporal.embed**-0.5)
        embed = nn.with_logical_partitioning(table, ("vocab", "embed"))
        self.mulan_table = self.param(
            "mulan_table", embed, (c.mulan_levels * c.mulan_codes, c.temporal.embed)
        )
        self.frame_table = self.param("frame_table", embed, (c.layout.ids, c.temporal.embed))
        self.code_table = self.param("code_table", embed, (c.layout.ids, c.depth.embed))
        self.begin = self.param(
            "begin", nn.with_logical_partitioning(table, ("embed",)), (c.temporal.embed,)
        )
        self.place = self.param(
            "place",
            nn.with_logical_partitioning(table, (None, "embed")),
            (c.layout.depth, c.depth.embed),
        )
        self.bridge = self.param(
            "bridge", partitioned(("embed", None)), (c.temporal.embed, c.depth.embed)
        )
        self.temporal = Transformer(c.temporal, self.remat, self.lanes)
        self.depth = Transformer(c.depth, self.remat, self.lanes)

    def embed_mulan(self, mulan: jax.Array) -> jax.Array:
        """The temporal transformer's prefix: int32 [B, M] -> [B, M, D]."""
        c = self.config
        offsets = jnp.arange(c.mulan_levels, dtype=jnp.int32) * c.mulan_codes
        return self.mulan_table[mulan + jnp.broadcast_to(offsets, mulan.shape)].astype(
            self.bridge.dtype
        )

    def embed_frame(self, tokens: jax.Array) -> jax.Array:
        """A whole frame as one input of the temporal transformer: int32 [..., K] -> [..., D]."""
        frame = self.frame_table[self.config.layout.flat_ids(tokens)].sum(axis=-2)
        return frame.astype(self.bridge.dtype)

    def hidden(self, tokens: jax.Array, mulan: jax.Array, deterministic: bool = True) -> jax.Array:
        """What is known before each token: tokens int32 [B, F, K], mulan int32 [B, M] -> [B, F, K, d].

        The vector at (f, k) depends on the MuLan tokens, on all frames before f and on the codes before k in frame f.
        """
        c = self.config
        batch = tokens.shape[0]
        begin = jnp.broadcast_to(self.begin.astype(self.bridge.dtype), (batch, 1, c.temporal.embed))
        past = self.embed_frame(tokens[:, :-1])  # [B, F - 1, D]
        x = self.temporal(
            jnp.concatenate([self.embed_mulan(mulan), begin, past], axis=1), deterministic
        )
        context = at_least_float32(x[:, c.mulan_levels :] @ self.bridge)  # [B, F, d]
        codes = self.code_table[c.layout.flat_ids(tokens)[:, :, :-1]]  # [B, F, K - 1, d]
        codes = jnp.pad(codes, ((0, 0), (0, 0), (1, 0), (0, 0))) + self.place[None, None]
        return self.depth.apart(
            (context[:, :, None] + codes).astype(self.bridge.dtype), deterministic
        )

    def temporal_bias(self, frames: int) -> jax.Array:
        """The temporal attention's position bias for a clip of `frames`, computed once for the whole decoding."""
        return self.temporal.bias(self.config.mulan_levels + frames)

    def depth_bias(self) -> jax.Array:
        """The same for the depth transformer."""
        return self.depth.bias(self.config.layout.depth)

    def start_clip(self, mulan: jax.Array, frames: int, bias: jax.Array) -> Cache:
        """The temporal cache of a clip of `frames`, with the MuLan prefix inside."""
        cache = self.temporal.empty_cache(
            mulan.shape[0], self.config.mulan_levels + frames, self.bridge.dtype
        )
        return self.temporal.extend(self.embed_mulan(mulan), cache, 0, bias)[1]

    def next_frame(
        self, previous: jax.Array, cache: Cache, frame: jax.Array, bias: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """The context [B, d] of `frame` (0, 1, ...), given the codes int32 [B, K] of the one before it, if any."""
        x = jnp.where(
            frame > 0, self.embed_frame(previous), self.begin.astype(self.bridge.dtype)[None]
        )
        x, cache = self.temporal.extend(x[:, None], cache, self.config.mulan_levels + frame, bias)
        return x[:, 0] @ self.bridge, cache

    def empty_depth_cache(self, batch: int) -> Cache:
        """A cache for the codes of one frame."""
        return self.depth.empty_cache(batch, self.config.layout.depth, self.bridge.dtype)

    def next_code(
        self,
        context: jax.Array,
        previous: jax.Array,
        cache: Cache,
        place: jax.Array,
        bias: jax.Array,
    ) -> tuple[jax.Array, Cache]:
        """The hidden vector [B, d] at `place` (0 .. K - 1), given the code int32 [B] at the place before it."""
        c = self.config
        code = self.code_table[previous + jnp.asarray(c.layout.starts)[jnp.maximum(place - 1, 0)]]
        code = jnp.where(place > 0, code, 0.0)
        x = at_least_float32(context) + code + self.place[place][None]
        x, cache = self.depth.extend(x.astype(self.bridge.dtype)[:, None], cache, place, bias)
        return x[:, 0], cache


class MusicLM(nn.Module):
    """The policy: a trunk and a softmax head for each place in the frame, the first of which is the semantic one."""

    config: MusicLMConfig
    remat: bool = False  # as in Transformer
    lanes: int = 1  # the same

    def setup(self) -> None:
        c = self.config
        self.trunk = Trunk(c, self.remat, self.lanes)
        normal = nn.initializers.normal(c.depth.embed**-0.5)
        self.semantic_head = self.param(
            "semantic_head",
            nn.with_logical_partitioning(normal, ("embed", "vocab")),
            (c.depth.embed, c.layout.semantic_codes),
        )
        self.acoustic_head = self.param(
            "acoustic_head",
            nn.with_logical_partitioning(normal, (None, "embed", "vocab")),
            (c.layout.depth - 1, c.depth.embed, c.layout.acoustic_codes),
        )

    def __call__(
        self, tokens: jax.Array, mulan: jax.Array, deterministic: bool = True
    ) -> jax.Array:
        """Logits of every token given those before it: int32 [B, F, K], int32 [B, M] -> f32 [B, F, K, V].

        Codes that a place does not have get a score that makes their probability exactly 0.
        """
        hidden = sharding.by_row(self.trunk.hidden(tokens, mulan, deterministic))
        semantic = self._logits("bfkd,dv->bfkv", hidden[:, :, :1], self.semantic_head)
        acoustic = self._logits("bfkd,kdv->bfkv", hidden[:, :, 1:], self.acoustic_head)
        return jnp.concatenate([semantic, acoustic], axis=2)

    def _logits(self, product: str, hidden: jax.Array, head: jax.Array) -> jax.Array:
        """In float32 whatever its factors are, and up to the V codes of the larger codebook: f32 [..., V]."""
        logits = jnp.einsum(product, at_least_float32(hidden), at_least_float32(head))
        missing = self.config.layout.vocabulary - logits.shape[-1]
        return jnp.pad(logits, [(0, 0)] * (logits.ndim - 1) + [(0, missing)], constant_values=NEVER)

    def temporal_bias(self, frames: int) -> jax.Array:
        """See Trunk."""
        return self.trunk.temporal_bias(frames)

    def depth_bias(self) -> jax.Array:
        """See Trunk."""
        return self.trunk.depth_bias()

    def start_clip(self, mulan: jax.Array, frames: int, bias: jax.Array) -> Cache:
        """See Trunk."""
        return self.trunk.start_clip(mulan, frames, bias)

    def next_frame(
        self, previous: jax.Array, cache: Cache, frame: jax.Array, bias: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """See Trunk."""
        return self.trunk.next_frame(previous, cache, frame, bias)

    def empty_depth_cache(self, batch: int) -> Cache:
        """See Trunk."""
        return self.trunk.empty_depth_cache(batch)

    def next_logits(
        self,
        context: jax.Array,
        previous: jax.Array,
        cache: Cache,
        place: jax.Array,
        bias: jax.Array,
    ) -> tuple[jax.Array, Cache]:
        """Logits f32 [B, V] of the code at `place`, and the depth cache; arguments as in Trunk.next_code."""
        hidden, cache = self.trunk.next_code(context, previous, cache, place, bias)
        acoustic = self._logits("bd,dv->bv", hidden, self.acoustic_head[jnp.maximum(place - 1, 0)])
        return jnp.where(
            place > 0, acoustic, self._logits("bd,dv->bv", hidden, self.semantic_head)
        ), cache


class Value(nn.Module):
    """V(s) for every token: the policy's trunk, started from its weights, under a scalar head that starts at 0."""

    config: MusicLMConfig
    remat: bool = False  # as in Transformer
    lanes: int = 1  # the same

    def setup(self) -> None:
        self.trunk = Trunk(self.config, self.remat, self.lanes)
        self.head = self.param(
            "head",
            nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)),
            (self.config.depth.embed,),
        )
        self.offset = self.param("offset", nn.initializers.zeros, ())

    def __call__(self, tokens: jax.Array, mulan: jax.Array) -> jax.Array:
        """Values f32 [B, F, K]; that of (f, k) has not seen the token at (f, k)."""
        return at_least_float32(self.trunk.hidden(tokens, mulan)) @ self.head + self.offset
