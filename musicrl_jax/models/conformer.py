"""The bidirectional conformer (Gulati et al., 2020) that the semantic encoder and SoundStorm share.

A block is: half a feed-forward, self-attention with rotary positions, a convolution module, half a feed-forward,
LayerNorm. Two departures from the paper. The convolution module normalises with LayerNorm where the paper has
BatchNorm, so that a clip's output never depends on the rest of its batch and there are no statistics to carry.
There is no dropout: the same input gives the same output in training and in use. All is computed in the input's dtype,
norms and the attention's softmax in float32.

Legend: B clips, S positions, D width, H heads, A width of a head, W taps of the depthwise convolution.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from musicrl_jax.core import sharding
from musicrl_jax.core.precision import LAYERS, at_least_float32
from musicrl_jax.models.layers import BLOCK, in_a_loop

ROTARY_BASE = 10_000.0


@dataclasses.dataclass(frozen=True)
class ConformerConfig:
    """Size of a conformer.

    Attributes:
        layers: number of blocks.
        heads: attention heads; `embed` is a multiple of twice this (rotary turns pairs of dimensions).
        embed: width D of the stream between the blocks.
        mlp: hidden width of each of a block's two feed-forwards; 4 * embed in the papers.
        kernel: taps of the depthwise convolution, odd: 5 in SoundStorm, 31 in the conformer paper.
    """

    layers: int = 12
    heads: int = 16
    embed: int = 1024
    mlp: int = 4096
    kernel: int = 5

    def __post_init__(self):
        if self.embed % (2 * self.heads):
            raise ValueError(
                f"embed = {self.embed} must be a multiple of 2 * heads = {2 * self.heads}"
            )
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel = {self.kernel} must be odd, so that it has a middle")


def rotary(x: jax.Array, positions: jax.Array) -> jax.Array:
    """X [B, S, H, A] with each pair of dimensions (a, a + A/2) turned by position * 10000^(-2a/A).

    The product of a turned query and a turned key depends on their positions [S] only through the difference.
    The angles are computed in float32; the result has x's dtype.
    """
    half = x.shape[-1] // 2
    frequency = ROTARY_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)  # [A/2]
    angle = positions.astype(jnp.float32)[:, None] * frequency[None, :]  # [S, A/2]
    cosine = jnp.cos(angle).astype(x.dtype)[None, :, None, :]  # [1, S, 1, A/2]
    sine = jnp.sin(angle).astype(x.dtype)[None, :, None, :]
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate(
        [first * cosine - second * sine, second * cosine + first * sine], axis=-1
    )


def depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Each dimension of x [B, S, D] correlated with its own taps, kernel [W, D], zeros beyond both ends.

    Written as W shifted products: XLA fuses them, while its grouped convolution takes twice as long on a CPU.
    """
    taps = kernel.shape[0]
    reach = taps // 2
    padded = jnp.pad(x, ((0, 0), (reach, reach), (0, 0)))  # [B, S + W - 1, D]
    length = x.shape[1]
    return sum(padded[:, tap : tap + length] * kernel[None, None, tap] for tap in range(taps))


def _kernel(*names: str | None):
    return nn.with_logical_partitioning(nn.initializers.lecun_normal(), names)


def _norm(name: str, x: jax.Array) -> jax.Array:
    """LayerNorm, computed in float32 at least."""
    return nn.LayerNorm(name=name)(at_least_float32(x)).astype(x.dtype)


class FeedForward(nn.Module):
    """LayerNorm, D -> mlp, swish, mlp -> D."""

    config: ConformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = _norm("norm", x)
        x = nn.Dense(
            self.config.mlp, dtype=x.dtype, kernel_init=_kernel("embed", "mlp"), name="up"
        )(x)  # [B, S, mlp]
        x = jax.lax.optimization_barrier(
            nn.swish(x)
        )  # XLA would join both products in a loop: longer on a TPU
        return nn.Dense(
            self.config.embed, dtype=x.dtype, kernel_init=_kernel("mlp", "embed"), name="down"
        )(x)


class SelfAttention(nn.Module):
    """LayerNorm, then every position attends to every position, with rotary queries and keys."""

    config: ConformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, heads = self.config.embed, self.config.heads
        x = _norm("norm", x)
        query, key, value = (
            nn.Dense(width, dtype=x.dtype, kernel_init=_kernel("embed", "heads"), name=name)(
                x
            ).reshape(*x.shape[:2], heads, -1)
            for name in ("query", "key", "value")
        )  # [B, S, H, A] each
        positions = jnp.arange(x.shape[1])
        with jax.numpy_dtype_promotion("standard"):  # inside: its softmax is in float32
            mixed = jax.nn.dot_product_attention(
                rotary(query, positions), rotary(key, positions), value
            )
        return nn.Dense(width, dtype=x.dtype, kernel_init=_kernel("heads", "embed"), name="out")(
            mixed.reshape(x.shape)
        )


class Convolution(nn.Module):
    """LayerNorm, D -> 2D, gated linear unit, depthwise convolution, LayerNorm, swish, D -> D."""

    config: ConformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = self.config.embed
        x = _norm("norm", x)
        x = nn.glu(
            nn.Dense(2 * width, dtype=x.dtype, kernel_init=_kernel("embed", "mlp"), name="up")(x)
        )  # [B, S, D]
        taps = self.param("depthwise", _kernel(None, "mlp"), (self.config.kernel, width))
        x = nn.swish(_norm("middle_norm", depthwise(x, taps)))
        return nn.Dense(width, dtype=x.dtype, kernel_init=_kernel("mlp", "embed"), name="down")(x)


class Block(nn.Module):
    """One conformer block, [B, S, D] -> [B, S, D]."""

    config: ConformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + 0.5 * FeedForward(self.config, name="first")(x)
        x = x + SelfAttention(self.config, name="attention")(x)
        x = x + Convolution(self.config, name="convolution")(x)
        x = x + 0.5 * FeedForward(self.config, name="second")(x)
        return _norm("norm", x)


class Conformer(nn.Module):
    """A stack of blocks; every position sees the whole clip. Its weights may be `layers.stacked`."""

    config: ConformerConfig

    @nn.compact
    def __call__(self, x: jax.Array, layers: int | None = None) -> jax.Array:
        """[B, S, D] -> [B, S, D], the output of block number `layers` (1 is the first; None is the last)."""
        if layers is not None and not 1 <= layers <= self.config.layers:
            raise ValueError(
                f"layers = {layers} is not between 1 and the conformer's {self.config.layers}"
            )
        depth = self.config.layers if layers is None else layers
        if self.has_variable("params", LAYERS):
            weights = jax.tree.map(lambda w: w[:layers], self.get_variable("params", LAYERS))
            block = Block(self.config, parent=None)
            return in_a_loop(
                lambda x, layer: block.apply({"params": layer}, sharding.by_row(x)),
                x,
                weights,
                depth,
            )
        for index in range(depth):
            x = Block(self.config, name=f"{BLOCK}{index}")(sharding.by_row(x))
        return x
