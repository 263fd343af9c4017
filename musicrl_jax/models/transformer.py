"""A causal transformer with T5's relative positions and gated feed-forward, run whole or a few positions at a time.

MusicLM's stages: 24 layers, 16 heads of 64, width 1024, feed-forward 4096 (arXiv 2301.11325, 4.1; T5 1.1 blocks).
The same function serves the full forward pass, the prefill and the cached step, so they cannot drift apart.

Legend: B rows, S new positions, P all positions (past and new), D width, H heads, E width of a head, G groups of g
heads.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from musicrl_jax.core import sharding
from musicrl_jax.core.precision import LAYERS, at_least_float32
from musicrl_jax.models.layers import BLOCK, in_a_loop

Cache = list[
    tuple[jax.Array, jax.Array]
]  # for each layer its keys and values, [B, G, P, g E] each; g is mostly 1
LANES = {
    "tpu": 128
}  # of a vector register, by platform: a shorter last axis of an array is filled up in memory
QUERIES = 256  # that attend together where all positions are there: half of the scores of a long clip are never formed

NEVER = -1e9  # a score that softmax turns into exactly 0 in float32


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes of one transformer.

    Attributes:
      layers: blocks.
      embed: width D.
      heads: attention heads, each embed // heads wide.
      mlp: hidden width of the gated feed-forward.
      dropout: rate after attention and feed-forward, in supervised training only.
      relative_buckets: buckets of T5's relative position bias.
      relative_distance: the distance from which on all positions share the last bucket.
    """

    layers: int = 24
    embed: int = 1024
    heads: int = 16
    mlp: int = 4096
    dropout: float = 0.1
    relative_buckets: int = 32
    relative_distance: int = 128

    def __post_init__(self) -> None:
        if self.embed % self.heads:
            raise ValueError(f"TransformerConfig.heads={self.heads} must divide embed={self.embed}")


def relative_bucket(distance: np.ndarray, buckets: int, max_distance: int) -> np.ndarray:
    """T5's causal buckets (arXiv 1910.10683, 2.1): exact up to buckets/2 back, then logarithmic.

    Args:
      distance: int, query position minus key position; the future (negative) falls into bucket 0 and is masked.
      buckets: how many buckets there are.
      max_distance: from here on the last one.

    Returns:
      int32, the shape of `distance`.
    """
    distance = np.maximum(distance, 0)
    exact = buckets // 2
    scale = np.log(np.maximum(distance, 1) / exact) / np.log(max_distance / exact)
    far = np.minimum(exact + (scale * (buckets - exact)).astype(np.int32), buckets - 1)
    return np.where(distance < exact, distance, far).astype(np.int32)


def partitioned(names: tuple[str | None, ...], fan_in_axes: int = 1) -> nn.initializers.Initializer:
    """Truncated normal of variance 1 / fan-in over the first axes, with logical axis names for the mesh."""
    in_axis = tuple(range(fan_in_axes))
    out_axis = tuple(range(fan_in_axes, len(names)))
    return nn.with_logical_partitioning(
        nn.initializers.variance_scaling(
            1.0, "fan_in", "truncated_normal", in_axis=in_axis, out_axis=out_axis
        ),
        names,
    )


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """X / rms(x) * scale over the last axis, T5's layer norm: computed in float32 at least, in x's dtype."""
    wide = at_least_float32(x)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
    return (wide * inverse * jnp.broadcast_to(at_least_float32(scale), x.shape)).astype(x.dtype)


def attend(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array) -> jax.Array:
    """Attention, [B, H, S, E], [B, H, P, E] twice, [H, S, P] -> [B, S, H, E]."""
    scores = jnp.einsum("bhse,bhpe->bhsp", query, key) + bias.astype(query.dtype)[None]
    weights = jax.nn.softmax(at_least_float32(scores), axis=-1).astype(query.dtype)
    return jnp.einsum("bhsp,bhpe->bshe", weights, value)


def heads_together(config: TransformerConfig, lanes: int) -> int:
    """g, the heads that a cache keeps side by side: as few as fill the lanes and divide the heads."""
    width = config.embed // config.heads
    return next(
        g
        for g in range(1, config.heads + 1)
        if config.heads % g == 0 and (g * width >= lanes or g == config.heads)
    )


def side_by_side(x: jax.Array, together: int) -> jax.Array:
    """[B, H, S, E] -> [B, G, S, g E]."""
    batch, heads, length, width = x.shape
    grouped = x.reshape(batch, heads // together, together, length, width)
    return grouped.swapaxes(2, 3).reshape(batch, heads // together, length, together * width)


def attend_together(
    query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array
) -> jax.Array:
    """Attention over heads that stand side by side: [B, H, S, E], [B, G, P, g E] twice, [H, S, P] -> [B, S, H, E].

    Each head's query has zeros where the others' keys stand, and of what it gathers its own part is taken. That is g
    times the multiplications, and on a TPU seven times as fast for one query: a product of matrices in place of many of
    vectors, over arrays that fill its lanes.
    """
    batch, heads, length, width = query.shape
    groups, together = key.shape[1], heads // key.shape[1]
    own = jnp.eye(together, dtype=query.dtype)[None, None, :, None, :, None]
    wide = query.reshape(batch, groups, together, length, 1, width) * jnp.broadcast_to(
        own, (batch, groups, together, length, together, width)
    )
    wide = wide.reshape(batch, groups, together, length, together * width)
    scores = jnp.einsum("bghsd,bgpd->bghsp", wide, key).reshape(batch, heads, length, -1)
    scores += bias.astype(query.dtype)[None]
    weights = jax.nn.softmax(at_least_float32(scores), axis=-1).astype(query.dtype)
    weights = weights.reshape(batch, groups, together, length, -1)
    mixed = jnp.einsum("bghsp,bgpd->bghsd", weights, value)
    mixed = mixed.reshape(batch, groups, together, length, together, width) * jnp.broadcast_to(
        own, (*mixed.shape[:4], together, width)
    )
    return mixed.sum(axis=4).reshape(batch, heads, length, width).swapaxes(1, 2)


class Block(nn.Module):
    """Pre-norm attention and gated feed-forward."""

    config: TransformerConfig
    together: int = 1  # g

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        biases: tuple[jax.Array, ...],
        cache: tuple[jax.Array, jax.Array] | None,
        start: jax.Array | int,
        deterministic: bool,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """X [B, S, D] -> (y [B, S, D], the layer's keys and values).

        Each of the biases, [H, s, p], is for the s queries after the one's before it, which see the first p positions.
        """
        c = self.config
        width = c.embed // c.heads
        heads_kernel = partitioned(("embed", "heads", "kv"))
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))

        x = sharding.by_row(x)
        h = rms_norm(x, self.param("attention_norm", ones, (c.embed,)))
        query = jnp.einsum(
            "bsd,dhe->bhse", h, self.param("query", heads_kernel, (c.embed, c.heads, width))
        )
        key = jnp.einsum(
            "bsd,dhe->bhse", h, self.param("key", heads_kernel, (c.embed, c.heads, width))
        )
        value = jnp.einsum(
            "bsd,dhe->bhse", h, self.param("value", heads_kernel, (c.embed, c.heads, width))
        )
        query = query * width**-0.5
        if cache is not None:
            key, value = (
                jax.lax.dynamic_update_slice_in_dim(
                    past, side_by_side(new, self.together), start, axis=2
                )
                for past, new in zip(cache, (key, value), strict=True)
            )
        if cache is not None and self.together > 1:
            mixed = attend_together(query, key, value, *biases)
        else:
            ends = np.cumsum([bias.shape[1] for bias in biases])
            blocks = [
                attend(
                    query[:, :, end - bias.shape[1] : end],
                    key[:, :, : bias.shape[2]],
                    value[:, :, : bias.shape[2]],
                    bias,
                )
                for end, bias in zip(ends, biases, strict=True)
            ]
            mixed = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)
        out = self.param("out", partitioned(("heads", "kv", "embed"), 2), (c.heads, width, c.embed))
        h = jnp.einsum("bshe,hed->bsd", mixed, out)
        x = x + nn.Dropout(c.dropout)(h, deterministic=deterministic)

        h = rms_norm(x, self.param("mlp_norm", ones, (c.embed,)))
        gate = jnp.einsum(
            "bsd,dm->bsm", h, self.param("gate", partitioned(("embed", "mlp")), (c.embed, c.mlp))
        )
        up = jnp.einsum(
            "bsd,dm->bsm", h, self.param("up", partitioned(("embed", "mlp")), (c.embed, c.mlp))
        )
        down = self.param("down", partitioned(("mlp", "embed")), (c.mlp, c.embed))
        h = jnp.einsum("bsm,md->bsd", jax.nn.gelu(gate) * up, down)
        return x + nn.Dropout(c.dropout)(h, deterministic=deterministic), (key, value)


class Transformer(nn.Module):
    """Blocks under one shared relative position bias, then a norm.

    With `remat` the gradient of all positions at once computes each block anew instead of keeping what it found: a
    third more work, and the memory of one block in place of all. Then, and where its weights are `stacked`, they go
    through the blocks in a loop.
    A cache keeps as many heads side by side, and `apart` as many sequences, as fill the `lanes`. Products are in the
    dtype of their weights.
    """

    config: TransformerConfig
    remat: bool = False
    lanes: int = 1

    def setup(self) -> None:
        c = self.config
        small = nn.initializers.normal(0.1)
        self.relative = self.param(
            "relative",
            nn.with_logical_partitioning(small, ("heads", None)),
            (c.heads, c.relative_buckets),
        )
        self.blocks = [
            Block(c, heads_together(c, self.lanes), name=f"{BLOCK}{i}") for i in range(c.layers)
        ]
        self.final_norm = self.param(
            "final_norm", nn.with_logical_partitioning(nn.initializers.ones, ("embed",)), (c.embed,)
        )

    def bias(self, length: int) -> jax.Array:
        """Added to the attention scores, [H, length, length]: learned by distance, NEVER towards the future."""
        c = self.config
        positions = np.arange(length)
        distance = positions[:, None] - positions[None, :]
        bucket = relative_bucket(distance, c.relative_buckets, c.relative_distance)
        # A product with ones and zeros is what it picks, to the bit: on a TPU a fifth of the time of a lookup and its
        # gradient, and of the time that compiling them takes.
        picked = jax.nn.one_hot(bucket, c.relative_buckets, dtype=self.relative.dtype)
        biases = jnp.einsum(
            "hb,qpb->hqp", self.relative, picked, precision=jax.lax.Precision.HIGHEST
        )
        return jnp.where((distance >= 0)[None], biases, NEVER)

    def empty_cache(self, batch: int, length: int, dtype: Any) -> Cache:
        """A cache of zeros for `length` positions; of the dtype of the weights."""
        c, together = self.config, heads_together(self.config, self.lanes)
        shape = batch, c.heads // together, length, together * c.embed // c.heads
        zeros = jnp.zeros(shape, dtype)
        return [(zeros, zeros) for _ in range(c.layers)]

    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        """All positions at once: x [B, S, D] -> [B, S, D]."""
        return self._all(x, self.bias(x.shape[1]), deterministic)

    def apart(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        """N sequences a row, none of which sees another: x [B, N, S, D] -> [B, N, S, D]."""
        sequences, length = x.shape[1:3]
        together = max(
            n
            for n in range(1, sequences + 1)
            if sequences % n == 0 and (n == 1 or n * length <= self.lanes)
        )
        bias = self.bias(length)
        if together > 1:
            same = np.eye(together, dtype=bool)[None, :, None, :, None]
            bias = jnp.where(same, bias[:, None, :, None, :], NEVER).reshape(
                len(bias), together * length, -1
            )
        return self._all(
            x.reshape(-1, together * length, x.shape[-1]), bias, deterministic
        ).reshape(x.shape)

    def _all(self, x: jax.Array, bias: jax.Array, deterministic: bool) -> jax.Array:
        """Every position of x [B, S, D] under a causal bias [H, S, S]."""
        length = x.shape[1]
        ends = [min(start + QUERIES, length) for start in range(0, length, QUERIES)]
        biases = tuple(
            bias[:, start:end, :end] for start, end in zip([0, *ends], ends, strict=False)
        )
        if self.has_variable("params", LAYERS) or (self.remat and not self.is_initializing()):
            return rms_norm(self._in_a_loop(x, biases, deterministic), self.final_norm)
        for block in self.blocks:
            x, _ = block(x, biases, None, 0, deterministic)
        return rms_norm(x, self.final_norm)

    def _in_a_loop(
        self, x: jax.Array, biases: tuple[jax.Array, ...], deterministic: bool
    ) -> jax.Array:
        """All blocks, as one that compiles in a fraction of the time."""
        c = self.config
        block = Block(c, parent=None)
        if self.has_variable("params", LAYERS):
            weights = self.get_variable("params", LAYERS)
        else:
            weights = jax.tree.map(
                lambda *each: jnp.stack(each), *(block.variables["params"] for block in self.blocks)
            )
        dropping = not deterministic and c.dropout > 0
        keys = jax.random.split(self.make_rng("dropout"), c.layers) if dropping else None

        def apply(x: jax.Array, layer: tuple[Any, jax.Array | None]) -> jax.Array:
            weights, key = layer
            rngs = {} if key is None else {"dropout": key}
            return block.apply({"params": weights}, x, biases, None, 0, deterministic, rngs=rngs)[0]

        return in_a_loop(
            jax.checkpoint(apply) if self.remat else apply, x, (weights, keys), c.layers
        )

    def extend(
        self, x: jax.Array, cache: Cache, start: jax.Array | int, bias: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """The positions start .. start + S - 1, given the cache of those before.

        Args:
          x: [B, S, D].
          cache: of P positions, filled below `start`.
          start: int32 [].
          bias: `bias(P)`, computed once outside the loop.

        Returns:
          (y [B, S, D], the cache filled below start + S).
        """
        bias = jax.lax.dynamic_slice_in_dim(bias, start, x.shape[1], axis=1)
        filled = []
        for block, layer in zip(self.blocks, cache, strict=True):
            x, layer = block(x, (bias,), layer, start, True)
            filled.append(layer)
        return rms_norm(x, self.final_norm), filled
