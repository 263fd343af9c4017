"""The bidirectional conformer (Gulati et al., 2020) of the semantic encoder and SoundStorm.

A block is: half a feed-forward, self-attention with rotary positions, a convolution module, half a
feed-forward, LayerNorm. Two departures from the paper: the convolution module has LayerNorm in
place of BatchNorm, so a clip's output does not depend on its batch; and there is no dropout.
Everything is computed in the input's dtype, norms and softmax in float32.

Legend: B clips, S positions, D width, H heads, A width of a head, W taps of the convolution.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from musicrl_jax.core import sharding
from musicrl_jax.core.precision import LAYERS, at_least_float32
from musicrl_jax.models.attention import attend
from musicrl_jax.models.layers import BLOCK, kernel_init, scan_layers

ROTARY_BASE = 10_000.0


@dataclasses.dataclass(frozen=True)
class ConformerConfig:
    """Size of a conformer.

    Attributes:
      layers: number of blocks.
      heads: attention heads. `embed` is a multiple of twice this: rotary turns pairs of dimensions.
      embed: width D of the residual stream.
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
            raise ValueError(f"kernel = {self.kernel} must be odd")


def rotary(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotates each pair of dimensions (a, a + A/2) of x by position * 10000^(-2a/A).

    The product of a rotated query and a rotated key depends only on the difference of positions.

    Args:
      x: [B, S, H, A].
      positions: [S].

    Returns:
      [B, S, H, A] in x's dtype; angles are computed in float32.
    """
    half = x.shape[-1] // 2
    frequency = ROTARY_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)  # [A/2]
    angle = positions.astype(jnp.float32)[:, None] * frequency[None, :]  # [S, A/2]
    cosine = jnp.cos(angle).astype(x.dtype)[None, :, None, :]  # [1, S, 1, A/2]
    sine = jnp.sin(angle).astype(x.dtype)[None, :, None, :]
    first, second = x[..., :half], x[..., half:]
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(turned, axis=-1)


def depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Correlates each dimension of x [B, S, D] with its own taps, kernel [W, D]; pads with zeros.

    It sums W shifted products, which XLA fuses. XLA's grouped convolution takes twice as long on a
    CPU.
    """
    taps, length = kernel.shape[0], x.shape[1]
    padded = jnp.pad(x, ((0, 0), (taps // 2, taps // 2), (0, 0)))  # [B, S + W - 1, D]
    return sum(padded[:, tap : tap + length] * kernel[None, None, tap] for tap in range(taps))


def _norm(name: str, x: jax.Array) -> jax.Array:
    """Applies LayerNorm, computed in float32."""
    return nn.LayerNorm(name=name)(at_least_float32(x)).astype(x.dtype)


def _dense(name: str, features: int, x: jax.Array, *axes: str) -> jax.Array:
    return nn.Dense(features, dtype=x.dtype, kernel_init=kernel_init(*axes), name=name)(x)


class FeedForward(nn.Module):
    """LayerNorm, D -> mlp, swish, mlp -> D."""

    config: ConformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Transforms x [B, S, D]."""
        x = nn.swish(_dense("up", self.config.mlp, _norm("norm", x), "embed", "mlp"))
        # Without the barrier XLA fuses both products into one loop, which is slower on a TPU.
        x = jax.lax.optimization_barrier(x)
        return _dense("down", self.config.embed, x, "mlp", "embed")


class SelfAttention(nn.Module):
    """LayerNorm, then attention between all positions, with rotary queries and keys."""

    config: ConformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Transforms x [B, S, D]."""
        width, heads, positions = self.config.embed, self.config.heads, jnp.arange(x.shape[1])
        x = _norm("norm", x)
        query, key, value = (
            _dense(name, width, x, "embed", "heads").reshape(*x.shape[:2], heads, -1)
            for name in ("query", "key", "value")
        )
        query, key = rotary(query, positions), rotary(key, positions)
        query = query * (width // heads) ** -0.5
        mixed = attend(*(x.swapaxes(1, 2) for x in (query, key, value)))
        return _dense("out", width, mixed.reshape(x.shape), "heads", "embed")


class Convolution(nn.Module):
    """LayerNorm, D -> 2D, gated linear unit, depthwise convolution, LayerNorm, swish, D -> D."""

    config: ConformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Transforms x [B, S, D]."""
        width = self.config.embed
        x = nn.glu(_dense("up", 2 * width, _norm("norm", x), "embed", "mlp"))  # [B, S, D]
        taps = self.param("depthwise", kernel_init(None, "mlp"), (self.config.kernel, width))
        x = nn.swish(_norm("middle_norm", depthwise(x, taps)))
        return _dense("down", width, x, "mlp", "embed")


class Block(nn.Module):
    """One conformer block."""

    config: ConformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Transforms x [B, S, D]."""
        x = x + 0.5 * FeedForward(self.config, name="first")(x)
        x = x + SelfAttention(self.config, name="attention")(x)
        x = x + Convolution(self.config, name="convolution")(x)
        x = x + 0.5 * FeedForward(self.config, name="second")(x)
        return _norm("norm", x)


class Conformer(nn.Module):
    """A stack of blocks. Each position sees the whole clip. Weights may be `layers.stacked`."""

    config: ConformerConfig

    @nn.compact
    def __call__(self, x: jax.Array, layers: int | None = None) -> jax.Array:
        """Applies the first `layers` blocks, by default all: [B, S, D] -> [B, S, D]."""
        depth = self.config.layers if layers is None else layers
        if layers is not None and not 1 <= layers <= self.config.layers:
            raise ValueError(
                f"layers = {layers} is not between 1 and the conformer's {self.config.layers}"
            )
        if self.has_variable("params", LAYERS):
            weights = jax.tree.map(lambda w: w[:layers], self.get_variable("params", LAYERS))
            block = Block(self.config, parent=None)

            def apply(x: jax.Array, layer: dict) -> jax.Array:
                return block.apply({"params": layer}, sharding.by_row(x))

            return scan_layers(apply, x, weights, depth)
        for index in range(depth):
            x = Block(self.config, name=f"{BLOCK}{index}")(sharding.by_row(x))
        return x
