"""BERT's encoder (Devlin et al. 2018, 1810.04805), MuLan's text tower: from scratch or pretrained.

Post-norm transformer blocks over the sum of piece, position and type embeddings. A text is one
segment, so its type is always 0. There is no pooler and no head: the output is the mean over a
text's pieces, as in sentence embeddings.

`params` reads the weights of any model with BERT's architecture. Their names are those of Hugging
Face's `transformers`, with or without the prefix `bert.`. `sizes` returns the matching config.

Legend: B texts, L text pieces (0 is padding), D width.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from musicrl_jax.core.precision import LAYERS
from musicrl_jax.models.layers import BLOCK, kernel_init, named_init, read_tensor, scan_layers

PADDING = 0
TYPES = 2
NORM_EPSILON = 1e-12
# Values of config.json that this architecture supports; an absent setting counts as supported.
SUPPORTED = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "layer_norm_eps": NORM_EPSILON,
    "position_embedding_type": "absolute",
    "is_decoder": False,
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Size of the encoder; the defaults are BERT-base's.

    Attributes:
      layers: transformer blocks.
      heads: attention heads.
      embed: width D.
      mlp: hidden width of the feed-forwards.
      positions: most pieces of a text.
      pieces: size of the vocabulary, with the id 0 for padding.
    """

    layers: int = 12
    heads: int = 12
    embed: int = 768
    mlp: int = 3072
    positions: int = 512
    pieces: int = 30_522

    def __post_init__(self):
        if self.embed % self.heads:
            raise ValueError(f"embed = {self.embed} must be a multiple of heads = {self.heads}")


def _dense(features: int, name: str, *axes: str | None) -> nn.Dense:
    return nn.Dense(features, kernel_init=kernel_init(*axes), name=name)


class Block(nn.Module):
    """Bidirectional attention, then a feed-forward; both residual, with the norm after."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, real: jax.Array) -> jax.Array:
        """Transforms x [B, L, D]; real bool [B, L] is False at padding."""
        c = self.config
        heads = (*x.shape[:2], c.heads, c.embed // c.heads)
        query, key, value = (
            _dense(c.embed, name, "embed", "heads")(x).reshape(heads)
            for name in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(query, key, value, mask=real[:, None, None, :])
        mixed = _dense(c.embed, "attention", "heads", "embed")(mixed.reshape(x.shape))
        x = nn.LayerNorm(NORM_EPSILON, name="attention_norm")(x + mixed)
        y = nn.gelu(_dense(c.mlp, "up", "embed", "mlp")(x), approximate=False)
        y = _dense(c.embed, "down", "mlp", "embed")(y)
        return nn.LayerNorm(NORM_EPSILON, name="norm")(x + y)


class Bert(nn.Module):
    """The encoder. Its weights may be `layers.stacked`."""

    config: BertConfig

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        """Averages the outputs over a text's pieces: int32 [B, L] -> [B, D] float32.

        A text of padding alone gives 0.
        """
        c, length = self.config, text.shape[1]
        if length > c.positions:
            raise ValueError(
                f"texts of {length} pieces, but BertConfig.positions = {c.positions}: cut the texts"
            )
        real = text != PADDING  # [B, L]

        # Embeddings.
        normal = nn.initializers.normal
        vocabulary = named_init(normal(1.0), "vocab", "embed")
        pieces = self.param("pieces", vocabulary, (c.pieces, c.embed))
        table = named_init(normal(0.1), None, "embed")
        positions = self.param("positions", table, (c.positions, c.embed))
        zeros = named_init(nn.initializers.zeros, None, "embed")
        types = self.param("types", zeros, (TYPES, c.embed))
        x = pieces[text] + (positions[:length] + types[:1])[None]  # [B, L, D]
        x = nn.LayerNorm(NORM_EPSILON, name="norm")(x)

        # Blocks.
        if self.has_variable("params", LAYERS):
            block, weights = Block(c, parent=None), self.get_variable("params", LAYERS)
            x = scan_layers(
                lambda x, layer: block.apply({"params": layer}, x, real), x, weights, c.layers
            )
        else:
            for layer in range(c.layers):
                x = Block(c, name=f"{BLOCK}{layer}")(x, real)

        # The mean over the pieces.
        count = jnp.maximum(jnp.sum(real, axis=1, keepdims=True), 1)
        weight = real.astype(x.dtype) / count.astype(x.dtype)
        return jnp.sum(x * weight[:, :, None], axis=1)


# --- pretrained weights ---

# Names of a block's weights in a file, below `encoder.layer.N.`.
DENSE = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
NORMS = {"attention_norm": "attention.output.LayerNorm", "norm": "output.LayerNorm"}
TABLES = {
    "pieces": "embeddings.word_embeddings.weight",
    "positions": "embeddings.position_embeddings.weight",
    "types": "embeddings.token_type_embeddings.weight",
}
UP = "encoder.layer.0.intermediate.dense.weight"


def _unprefixed(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}


def sizes(tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any], where: str) -> BertConfig:
    """Returns the config of a file's tensors.

    Shapes give all sizes but the number of heads, which config.json gives. Without it heads are 64
    wide, as BERT's.

    Args:
      tensors: the file's tensors by name.
      settings: of config.json; may be empty.
      where: the file, for errors.

    Raises:
      ValueError: if a tensor is missing or config.json describes another architecture.
    """
    for name, value in SUPPORTED.items():
        if settings.get(name, value) != value:
            raise ValueError(
                f"{where}: config.json says {name} = {settings[name]!r}, but BERT needs {value!r}"
            )
    # Sizes are the shapes of a few tensors, which every BERT has.
    tensors = _unprefixed(tensors)
    if missing := sorted({*TABLES.values(), UP} - set(tensors)):
        raise ValueError(f"{where} has no tensor {missing[0]}, which a BERT needs")
    layers = {re.match(r"encoder\.layer\.\d+\.", name) for name in tensors} - {None}
    pieces, embed = tensors[TABLES["pieces"]].shape
    return BertConfig(
        layers=len({match[0] for match in layers}),
        heads=settings.get("num_attention_heads", max(1, embed // 64)),
        embed=embed,
        mlp=tensors[UP].shape[0],
        positions=tensors[TABLES["positions"]].shape[0],
        pieces=pieces,
    )


def params(config: BertConfig, tensors: Mapping[str, np.ndarray], where: str) -> dict[str, Any]:
    """Returns `Bert`'s 'params', float32, from a file's tensors.

    Raises ValueError if a tensor is missing or has another shape; `where` names the file.
    """
    tensors, c = _unprefixed(tensors), config

    def read(name: str, *shape: int) -> np.ndarray:
        return read_tensor(tensors, name, shape, where, str(c))

    def dense(name: str, inputs: int, outputs: int) -> dict[str, np.ndarray]:
        kernel = read(f"{name}.weight", outputs, inputs).T
        return {"kernel": kernel, "bias": read(f"{name}.bias", outputs)}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": read(f"{name}.weight", c.embed), "bias": read(f"{name}.bias", c.embed)}

    rows = {"pieces": c.pieces, "positions": c.positions, "types": TYPES}
    tree = {name: read(TABLES[name], rows[name], c.embed) for name in rows}
    tree["norm"] = norm("embeddings.LayerNorm")
    widths = {"up": (c.embed, c.mlp), "down": (c.mlp, c.embed)}
    # PyTorch's kernels are [outputs, inputs].
    for layer in range(c.layers):
        block = tree[f"{BLOCK}{layer}"] = {}
        for name, path in DENSE.items():
            width = widths.get(name, (c.embed, c.embed))
            block[name] = dense(f"encoder.layer.{layer}.{path}", *width)
        for name, path in NORMS.items():
            block[name] = norm(f"encoder.layer.{layer}.{path}")
    return tree
