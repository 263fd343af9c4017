"""A causal transformer: T5's relative positions, pre-norm attention, gated feed-forward.

MusicLM's stages have 24 layers, 16 heads of 64, width 1024, feed-forward 4096 (arXiv 2301.11325,
section 4.1; T5 1.1 blocks). Training, prefill and cached decoding run the same `Block`.

Legend: B rows, S new positions, P all positions (past and new), D width, H heads, E width of a
head, G packs of g heads. A pack is several heads' keys or values side by side in one last axis.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from musicrl_jax.core import sharding
from musicrl_jax.core.precision import LAYERS, at_least_float32
from musicrl_jax.models.attention import NEVER, attend
from musicrl_jax.models.fused_attention import MOST_POSITIONS, bias_diagonals, fused_attention
from musicrl_jax.models.layers import (
    BLOCK,
    GATE_UP,
    JOINED,
    QKV,
    kernel_init,
    named_init,
    scan_layers,
)

# Keys and values of one layer, each [B, G, P, g * E]: G packs of g heads side by side.
LayerCache = tuple[jax.Array, jax.Array]
# One LayerCache per layer.
Cache = list[LayerCache]

# Lanes of a vector register, by platform. In memory an array's last axis is padded to as many.
LANES = {"tpu": 128}
# Queries of a block of attention. A block computes no scores for later keys, which saves about
# half of them in a long clip.
QUERY_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes of one transformer.

    Attributes:
      layers: number of blocks.
      embed: width D.
      heads: attention heads H, each embed // heads wide.
      mlp: hidden width of the gated feed-forward.
      dropout: rate after attention and feed-forward, in supervised training only.
      relative_buckets: buckets of T5's relative position bias.
      relative_distance: positions at this distance or more share the last bucket.
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

    @property
    def head_width(self) -> int:
        """E."""
        return self.embed // self.heads


# --- pure functions ---


def relative_bucket(distance: np.ndarray, buckets: int, max_distance: int) -> np.ndarray:
    """Returns T5's causal bucket of each distance (arXiv 1910.10683, section 2.1).

    Distances below buckets / 2 have a bucket each; the others share buckets on a log scale.

    Args:
      distance: int, query position minus key position. The future (negative) gets bucket 0.
      buckets: number of buckets.
      max_distance: distances from here on get the last bucket.

    Returns:
      int32, the shape of `distance`.
    """
    distance = np.maximum(distance, 0)
    exact = buckets // 2
    scale = np.log(np.maximum(distance, 1) / exact) / np.log(max_distance / exact)
    far = np.minimum(exact + (scale * (buckets - exact)).astype(np.int32), buckets - 1)
    return np.where(distance < exact, distance, far).astype(np.int32)


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns x / rms(x) * scale over the last axis (T5's layer norm), computed in float32."""
    wide = at_least_float32(x)
    # Without the barrier XLA on a CPU may sum in another order where a gradient needs the sum too:
    # the KL of equal weights would then not be 0 to the bit.
    mean = jax.lax.optimization_barrier(jnp.mean(jnp.square(wide), axis=-1, keepdims=True))
    inverse = jax.lax.rsqrt(mean + 1e-6)
    scale = at_least_float32(scale).reshape(*[1] * (x.ndim - 1), -1)
    return (wide * inverse * scale).astype(x.dtype)


def attention_weights(scores: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns softmax(scores + bias), [B, H, S, P]; the softmax is computed in float32."""
    scores = scores + bias.astype(scores.dtype)[None]
    return jax.nn.softmax(at_least_float32(scores), axis=-1).astype(scores.dtype)


def attend_in_blocks(
    query: jax.Array, key: jax.Array, value: jax.Array, biases: tuple[jax.Array, ...]
) -> jax.Array:
    """Computes attention one block of queries at a time, as `attend`.

    Each bias [H, s, p] belongs to the next s queries, which attend to the first p positions.
    """
    mixed, start = [], 0
    for bias in biases:
        _, queries, past = bias.shape
        block = query[:, :, start : start + queries]
        mixed.append(attend(block, key[:, :, :past], value[:, :, :past], bias))
        start += queries
    return jnp.concatenate(mixed, axis=1)


def _product(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Multiplies vectors by matrices: [B, S, D] and [D, ...] -> [B, S, ...].

    One product of two matrices, whatever the axes: XLA on a CPU then needs no transposed copies.
    """
    flat = jnp.tensordot(x.reshape(-1, x.shape[-1]), weights, axes=1)
    return flat.reshape(*x.shape[:-1], *weights.shape[1:])


def heads_per_pack(config: TransformerConfig, lanes: int) -> int:
    """Returns g: the fewest heads that divide H and fill the lanes."""
    divisors = [g for g in range(1, config.heads + 1) if config.heads % g == 0]
    return next(g for g in divisors if g * config.head_width >= lanes or g == config.heads)


def pack_heads(x: jax.Array, size: int) -> jax.Array:
    """Packs `size` heads side by side: [B, H, S, E] -> [B, G, S, g E]."""
    batch, heads, length, width = x.shape
    packs = x.reshape(batch, heads // size, size, length, width)
    return packs.swapaxes(2, 3).reshape(batch, heads // size, length, size * width)


def attend_packed(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array) -> jax.Array:
    """Computes attention over packed heads, as `attend`; key and value are [B, G, P, g E].

    A head's query is zero at the other heads' keys, and of the pack's output it keeps its own part.
    This multiplies g times as much. A TPU is still seven times as fast for one query: it multiplies
    matrices that fill its lanes, not many short vectors.
    """
    batch, heads, length, width = query.shape
    packs, size = key.shape[1], heads // key.shape[1]
    own = jnp.eye(size, dtype=query.dtype)[None, None, :, None, :, None]

    # Pad each query with zeros to the width of its pack.
    wide = query.reshape(batch, packs, size, length, 1, width) * jnp.broadcast_to(
        own, (batch, packs, size, length, size, width)
    )
    wide = wide.reshape(batch, packs, size, length, size * width)
    scores = jnp.einsum("bghsd,bgpd->bghsp", wide, key).reshape(batch, heads, length, -1)
    weights = attention_weights(scores, bias).reshape(batch, packs, size, length, -1)

    # Keep each head's own part of the output.
    mixed = jnp.einsum("bghsp,bgpd->bghsd", weights, value)
    mixed = mixed.reshape(batch, packs, size, length, size, width) * jnp.broadcast_to(
        own, (batch, packs, size, length, size, width)
    )
    return mixed.sum(axis=4).reshape(batch, heads, length, width).swapaxes(1, 2)


def by_query_block(bias: jax.Array) -> tuple[jax.Array, ...]:
    """Splits a causal bias [H, S, S] into those of `attend_in_blocks`."""
    biases = []
    for start in range(0, bias.shape[1], QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, bias.shape[1])
        biases.append(bias[:, start:end, :end])
    return tuple(biases)


# --- modules ---


class Block(nn.Module):
    """Pre-norm attention, then a gated feed-forward; both are residual."""

    config: TransformerConfig
    pack: int = 1  # heads in a pack of the cache, g
    # Whether products are of matrices [B S, D]. XLA on a CPU then makes no transposed copies, but
    # on a TPU it does.
    flat: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        biases: tuple[jax.Array, ...] | jax.Array,
        cache: LayerCache | None,
        start: jax.Array | int,
        deterministic: bool,
    ) -> tuple[jax.Array, LayerCache]:
        """Runs the block on x [B, S, D]; returns y [B, S, D] and this layer's keys and values.

        Args:
          x: [B, S, D].
          biases: one per block of queries, see `attend_in_blocks`; exactly one if there is a cache.
            For the fused kernel an array, `fused_attention.bias_diagonals`.
          cache: keys and values of P positions, valid before `start`; or of fewer positions than
            the bias has, which the new ones follow. None for a whole clip.
          start: cache position of x[:, 0], int32 [].
          deterministic: False applies dropout.
        """
        c = self.config
        ones = named_init(nn.initializers.ones, "embed")

        # Attention.
        batch, length, _ = x.shape
        x = sharding.by_row(x)
        x = x.reshape(batch * length, c.embed) if self.flat else x
        h = rms_norm(x, self.param("attention_norm", ones, (c.embed,)))
        to_heads = kernel_init("embed", "heads", "kv"), (c.embed, c.heads, c.head_width)
        query, key, value = (
            x.reshape(batch, length, c.heads, c.head_width).swapaxes(1, 2)
            for x in self._products(h, QKV, *to_heads)
        )
        query = query * c.head_width**-0.5
        if cache is not None:
            packed = [pack_heads(new, self.pack) for new in (key, value)]
            key, value = (
                jnp.concatenate([past, new], axis=2)
                if past.shape[2] < biases[0].shape[-1]
                else jax.lax.dynamic_update_slice_in_dim(past, new, start, axis=2)
                for past, new in zip(cache, packed, strict=True)
            )
        if cache is not None and self.pack > 1:
            mixed = attend_packed(query, key, value, *biases)
        elif isinstance(biases, jax.Array):
            mixed = fused_attention(query, key, value, biases)
        else:
            mixed = attend_in_blocks(query, key, value, biases)
        from_heads = kernel_init("heads", "kv", "embed", fan_in_axes=2)
        out = self.param("out", from_heads, (c.heads, c.head_width, c.embed))
        h = mixed.reshape(x.shape) @ out.reshape(c.embed, c.embed)
        x = x + nn.Dropout(c.dropout)(h, deterministic=deterministic)

        # Gated feed-forward.
        h = rms_norm(x, self.param("mlp_norm", ones, (c.embed,)))
        to_mlp = kernel_init("embed", "mlp"), (c.embed, c.mlp)
        gate, up = self._products(h, GATE_UP, *to_mlp)  # [..., M] each
        down = self.param("down", kernel_init("mlp", "embed"), (c.mlp, c.embed))
        h = (jax.nn.gelu(gate) * up) @ down
        x = x + nn.Dropout(c.dropout)(h, deterministic=deterministic)
        return x.reshape(batch, length, c.embed), (key, value)

    def _products(
        self, x: jax.Array, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...]
    ) -> list[jax.Array]:
        """Multiplies x [..., D] by several weights [D, ...], joined or not: [..., ...] each."""
        parts = JOINED[name]
        if self.has_variable("params", name):
            weights = self.get_variable("params", name)
            together = x @ weights.reshape(len(weights), -1)
            return jnp.split(together, len(parts), axis=-1)
        return [jnp.tensordot(x, self.param(part, init, shape), axes=1) for part in parts]


class Transformer(nn.Module):
    """Blocks under one shared relative position bias, then a norm.

    Matrix products are computed in the dtype of their weights.

    Attributes:
      config: sizes.
      remat: whether gradients recompute each block instead of storing its activations: a third
        more work, and the memory of one block instead of all.
      lanes: the cache packs as many heads, and `independent` as many sequences, as fill the lanes.
      fused: whether `__call__` uses the kernel of `fused_attention`, which needs a TPU.
    """

    config: TransformerConfig
    remat: bool = False
    lanes: int = 1
    fused: bool = False

    def setup(self) -> None:
        """Creates parameters and submodules."""
        c = self.config
        small = named_init(nn.initializers.normal(0.1), "heads", None)
        self.relative = self.param("relative", small, (c.heads, c.relative_buckets))
        pack = heads_per_pack(c, self.lanes)
        flat = self.lanes == 1
        self.blocks = [Block(c, pack, flat, name=f"{BLOCK}{i}") for i in range(c.layers)]
        ones = named_init(nn.initializers.ones, "embed")
        self.final_norm = self.param("final_norm", ones, (c.embed,))

    def bias(self, length: int) -> jax.Array:
        """Returns the bias of attention scores, [H, length, length]: NEVER towards the future."""
        c = self.config
        positions = np.arange(length)
        distance = positions[:, None] - positions[None, :]
        bucket = relative_bucket(distance, c.relative_buckets, c.relative_distance)
        # A product with a one-hot matrix equals a lookup to the bit. On a TPU it and its gradient
        # take a fifth of the time to run and to compile.
        one_hot = jax.nn.one_hot(bucket, c.relative_buckets, dtype=self.relative.dtype)
        biases = jnp.einsum(
            "hb,qpb->hqp", self.relative, one_hot, precision=jax.lax.Precision.HIGHEST
        )
        return jnp.where((distance >= 0)[None], biases, NEVER)

    # --- whole clips ---

    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        """Transforms all positions at once: x [B, S, D] -> [B, S, D]."""
        c, length = self.config, x.shape[1]
        if self.fused and length <= MOST_POSITIONS and not self.is_initializing():
            distances = np.arange(c.relative_distance + 1)
            buckets = relative_bucket(distances, c.relative_buckets, c.relative_distance)
            biases = bias_diagonals(self.relative, buckets, length)
        else:
            biases = by_query_block(self.bias(length))
        return self._apply_blocks(x, biases, deterministic)

    def independent(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        """Transforms N sequences a row, each by itself: x [B, N, S, D] -> [B, N, S, D]."""
        _, sequences, length, width = x.shape
        # Join as many short sequences as fill the lanes, and mask them from each other.
        joined = max(
            n
            for n in range(1, sequences + 1)
            if sequences % n == 0 and (n == 1 or n * length <= self.lanes)
        )
        bias = self.bias(length)
        if joined > 1:
            same = np.eye(joined, dtype=bool)[None, :, None, :, None]
            bias = jnp.where(same, bias[:, None, :, None, :], NEVER)
            bias = bias.reshape(len(bias), joined * length, -1)
        x = x.reshape(-1, joined * length, width)
        y = self._apply_blocks(x, by_query_block(bias), deterministic)
        return y.reshape(-1, sequences, length, width)

    def _apply_blocks(
        self, x: jax.Array, biases: tuple[jax.Array, ...] | jax.Array, deterministic: bool
    ) -> jax.Array:
        """Applies all blocks and the final norm to x [B, S, D]; biases are those of a `Block`."""
        stacked = self.has_variable("params", LAYERS)
        if stacked or (self.remat and not self.is_initializing()):
            x = self._scan_blocks(x, biases, deterministic)
        else:
            for block in self.blocks:
                x, _ = block(x, biases, None, 0, deterministic)
        return rms_norm(x, self.final_norm)

    def _scan_blocks(
        self, x: jax.Array, biases: tuple[jax.Array, ...] | jax.Array, deterministic: bool
    ) -> jax.Array:
        """Applies all blocks by one `scan`, which compiles in a fraction of the time."""
        c = self.config
        block = Block(c, flat=self.lanes == 1, parent=None)
        if self.has_variable("params", LAYERS):
            weights = self.get_variable("params", LAYERS)
        else:
            layers = [block.variables["params"] for block in self.blocks]
            weights = jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)
        dropping = not deterministic and c.dropout > 0
        keys = jax.random.split(self.make_rng("dropout"), c.layers) if dropping else None

        def apply(x: jax.Array, layer: tuple[Any, jax.Array | None]) -> jax.Array:
            weights, key = layer
            rngs = {} if key is None else {"dropout": key}
            return block.apply({"params": weights}, x, biases, None, 0, deterministic, rngs=rngs)[0]

        apply = jax.checkpoint(apply) if self.remat else apply
        return scan_layers(apply, x, (weights, keys), c.layers)

    # --- cached decoding ---

    def empty_cache(self, batch: int, length: int, dtype: Any) -> Cache:
        """Returns a cache of zeros for `length` positions, in the weights' dtype."""
        c, pack = self.config, heads_per_pack(self.config, self.lanes)
        zeros = jnp.zeros((batch, c.heads // pack, length, pack * c.head_width), dtype)
        return [(zeros, zeros) for _ in range(c.layers)]

    def extend(
        self, x: jax.Array, cache: Cache, start: jax.Array | int, bias: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """Transforms positions start .. start + S - 1, given the cache of those before.

        Args:
          x: [B, S, D].
          cache: of P positions, filled below `start`; or of `start` positions.
          start: int32 [], or a Python int for a cache that grows.
          bias: `bias(P)`, computed once outside the loop.

        Returns:
          y [B, S, D], and the cache filled below start + S; or of start + S positions.
        """
        bias = jax.lax.dynamic_slice_in_dim(bias, start, x.shape[1], axis=1)
        if cache[0][0].shape[2] < bias.shape[-1]:
            bias = bias[:, :, : start + x.shape[1]]
        filled = []
        for block, layer in zip(self.blocks, cache, strict=True):
            x, layer = block(x, (bias,), layer, start, True)
            filled.append(layer)
        return rms_norm(x, self.final_norm), filled
