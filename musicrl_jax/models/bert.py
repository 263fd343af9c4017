"""BERT's encoder (Devlin et al. 2018, 1810.04805): MuLan's text tower, trained from nothing or from a file's weights.

Post-norm transformer blocks over the sum of piece, position and type embeddings; a text here is one segment, so its
type is always 0. No pooler and no head: what comes out is the mean over a text's pieces, as in sentence embeddings.

Weights of any model with BERT's architecture, named as Hugging Face's `transformers` names them, with or without the
prefix `bert.`, are read by `params`; `sizes` says what config they are of.

Legend: B texts, L text pieces (0 fills up), D width.
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
from musicrl_jax.models.layers import BLOCK, in_a_loop

PADDING = 0
TYPES = 2
NORM_EPSILON = 1e-12
SETTINGS = {  # what config.json may say of the architecture, and what is built here
    "model_type": ("bert",),
    "hidden_act": ("gelu",),
    "layer_norm_eps": (NORM_EPSILON,),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Size of the encoder; the defaults are BERT-base's.

    Attributes:
        layers: transformer blocks.
        heads: attention heads.
        embed: width D.
        mlp: hidden width of the feed-forwards.
        positions: the most pieces of a text.
        pieces: size of the vocabulary, the id 0 for padding included.
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
    kernel = nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes)
    return nn.Dense(features, kernel_init=kernel, name=name)


class Block(nn.Module):
    """Attention over a text's pieces in both directions, then a feed-forward; each is added, then normalised."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, real: jax.Array) -> jax.Array:
        """X [B, L, D], real [B, L] bool, False where a place is only filled up -> [B, L, D]."""
        c = self.config
        query, key, value = (
            _dense(c.embed, name, "embed", "heads")(x).reshape(
                *x.shape[:2], c.heads, c.embed // c.heads
            )
            for name in ("query", "key", "value")
        )  # [B, L, heads, D / heads] each
        mixed = jax.nn.dot_product_attention(query, key, value, mask=real[:, None, None, :])
        mixed = _dense(c.embed, "attention", "heads", "embed")(mixed.reshape(x.shape))
        x = nn.LayerNorm(NORM_EPSILON, name="attention_norm")(x + mixed)
        y = nn.gelu(_dense(c.mlp, "up", "embed", "mlp")(x), approximate=False)
        return nn.LayerNorm(NORM_EPSILON, name="norm")(
            x + _dense(c.embed, "down", "mlp", "embed")(y)
        )


class Bert(nn.Module):
    """Pieces [B, L] int32, filled up with 0 -> [B, D] float32: the mean over a text's pieces, 0 where it has none.

    Its weights may be `layers.stacked`.
    """

    config: BertConfig

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        c = self.config
        if text.shape[1] > c.positions:
            raise ValueError(
                f"texts of {text.shape[1]} pieces, but BertConfig.positions = {c.positions}: cut them"
            )
        real = text != PADDING  # [B, L]
        normal = nn.initializers.normal(1.0)
        named = nn.with_logical_partitioning
        pieces = self.param("pieces", named(normal, ("vocab", "embed")), (c.pieces, c.embed))
        positions = self.param(
            "positions", named(nn.initializers.normal(0.1), (None, "embed")), (c.positions, c.embed)
        )
        types = self.param("types", named(nn.initializers.zeros, (None, "embed")), (TYPES, c.embed))
        x = pieces[text] + (positions[: text.shape[1]] + types[:1])[None]  # [B, L, D]
        x = nn.LayerNorm(NORM_EPSILON, name="norm")(x)
        if self.has_variable("params", LAYERS):
            block, weights = Block(c, parent=None), self.get_variable("params", LAYERS)
            x = in_a_loop(
                lambda x, layer: block.apply({"params": layer}, x, real), x, weights, c.layers
            )
        else:
            for layer in range(c.layers):
                x = Block(c, name=f"{BLOCK}{layer}")(x, real)
        weight = real.astype(x.dtype) / jnp.maximum(jnp.sum(real, axis=1, keepdims=True), 1).astype(
            x.dtype
        )
        return jnp.sum(x * weight[:, :, None], axis=1)


# Where each weight of a block stands in a file, under `encoder.layer.N.`.
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
    "pieces": "word_embeddings",
    "positions": "position_embeddings",
    "types": "token_type_embeddings",
}


def _unprefixed(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}


def sizes(tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any], where: str) -> BertConfig:
    """The config of a file's tensors, by their shapes; the heads, which no shape tells, by config.json's `settings`.

    Without these, heads are 64 wide, as in BERT. ValueError that names what is missing or unlike BERT.
    """
    for name, known in SETTINGS.items():
        if settings.get(name, known[0]) not in known:
            raise ValueError(
                f"{where}: config.json says {name} = {settings[name]!r}, but this BERT has {known[0]!r}"
            )
    found = _unprefixed(tensors)
    layers = len({name.split(".")[2] for name in found if re.match(r"encoder\.layer\.\d+\.", name)})
    needed = {f"embeddings.{name}.weight" for name in TABLES.values()} | {
        "encoder.layer.0.intermediate.dense.weight"
    }
    if missing := sorted(needed - set(found)):
        raise ValueError(f"{where} is no BERT: it has no tensor {missing[0]}")
    pieces, embed = found["embeddings.word_embeddings.weight"].shape
    return BertConfig(
        layers=layers,
        heads=settings.get("num_attention_heads", max(1, embed // 64)),
        embed=embed,
        mlp=found["encoder.layer.0.intermediate.dense.weight"].shape[0],
        positions=found["embeddings.position_embeddings.weight"].shape[0],
        pieces=pieces,
    )


def params(config: BertConfig, tensors: Mapping[str, np.ndarray], where: str) -> dict[str, Any]:
    """`Bert`'s 'params', float32, from a file's tensors; ValueError that names one missing or misshapen."""
    found = _unprefixed(tensors)

    def take(name: str, *shape: int) -> np.ndarray:
        if name not in found:
            raise ValueError(
                f"{where} is no BERT of {config.layers} layers: it has no tensor {name}"
            )
        if found[name].shape != shape:
            raise ValueError(
                f"{where}: {name} has the shape {found[name].shape}, {config} needs {shape}"
            )
        return np.asarray(found[name], np.float32)

    def dense(name: str, inputs: int, outputs: int) -> dict[str, np.ndarray]:
        return {
            "kernel": take(f"{name}.weight", outputs, inputs).T,
            "bias": take(f"{name}.bias", outputs),
        }

    def norm(name: str) -> dict[str, np.ndarray]:
        return {
            "scale": take(f"{name}.weight", config.embed),
            "bias": take(f"{name}.bias", config.embed),
        }

    rows = {"pieces": config.pieces, "positions": config.positions, "types": TYPES}
    tree = {
        name: take(f"embeddings.{TABLES[name]}.weight", rows[name], config.embed) for name in rows
    }
    tree["norm"] = norm("embeddings.LayerNorm")
    for layer in range(config.layers):
        place = f"encoder.layer.{layer}"
        widths = {"up": (config.embed, config.mlp), "down": (config.mlp, config.embed)}
        block = {
            name: dense(f"{place}.{path}", *widths.get(name, (config.embed, config.embed)))
            for name, path in DENSE.items()
        }
        tree[f"{BLOCK}{layer}"] = block | {
            name: norm(f"{place}.{path}") for name, path in NORMS.items()
        }
    return tree
