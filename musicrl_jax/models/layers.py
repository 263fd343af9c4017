"""Shared parts of networks: initial weights with named axes, stacked layers, imported weights.

A network's layers are separate, each with a name, or stacked along a first axis and applied by
`jax.lax.scan`. A scan compiles as fast as one layer. For whole clips on a TPU it runs within 5 % of
separate layers; on CPUs its products take a third longer.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import meta

from musicrl_jax.core.precision import LAYERS

# Prefix of a layer's name; its number follows.
BLOCK = "block_"
# For an axis that no rule of the mesh shards.
UNNAMED = {nn.PARTITION_NAME: None}
# Names of weights that `joined` puts side by side, and the names of their parts.
QKV, GATE_UP = "qkv", "gate_up"
JOINED = {QKV: ("query", "key", "value"), GATE_UP: ("gate", "up")}


# --- initial weights ---


def named_init(init: nn.initializers.Initializer, *axes: str | None) -> nn.initializers.Initializer:
    """Returns an initialiser whose weights carry the logical names of their axes, for the mesh."""
    return nn.with_logical_partitioning(init, axes)


def kernel_init(*axes: str | None, fan_in_axes: int = 1) -> nn.initializers.Initializer:
    """Returns a truncated normal of variance 1 / fan-in, over the first axes, with named axes."""
    inputs, outputs = range(fan_in_axes), range(fan_in_axes, len(axes))
    init = nn.initializers.lecun_normal(in_axis=tuple(inputs), out_axis=tuple(outputs))
    return named_init(init, *axes)


# --- stacked layers ---


def _boxed(x: Any) -> bool:
    return isinstance(x, nn.LogicallyPartitioned)


def stacked(weights: Any) -> Any:
    """Returns weights with each network's layers stacked into arrays [layers, ...].

    Transformers (except in decoding), conformers and BERT accept such weights and scan over them.
    An optimiser then updates a tenth as many arrays and compiles in half the time. Boxed arrays
    keep their axis names; the new axis has none.
    """
    if not isinstance(weights, dict):
        return weights
    depth = sum(name.startswith(BLOCK) for name in weights)
    tree = {name: stacked(below) for name, below in weights.items() if not name.startswith(BLOCK)}
    if not depth:
        return tree

    layers = [weights[f"{BLOCK}{number}"] for number in range(depth)]
    return tree | {LAYERS: jax.tree.map(partial(_stack, 0), *layers, is_leaf=_boxed)}


def _stack(axis: int, *arrays: Any) -> Any:
    """Stacks arrays, on the host or on devices; boxed ones get an axis without a name."""
    first = arrays[0]
    if _boxed(first):
        unboxed = _stack(axis, *map(meta.unbox, arrays))
        return first.replace_boxed(unboxed).add_axis(axis, UNNAMED)
    return (np if isinstance(first, np.ndarray) else jnp).stack(arrays, axis)


def unstacked(weights: Any) -> Any:
    """Inverts `stacked`: returns separate layers, as decoding and checkpoints use them."""
    if not isinstance(weights, dict):
        return weights
    tree = {name: unstacked(below) for name, below in weights.items() if name != LAYERS}
    if LAYERS not in weights:
        return tree

    def layer(number: int, x: Any) -> Any:
        if _boxed(x):
            return x.replace_boxed(layer(number, x.unbox())).remove_axis(0, UNNAMED)
        return x[number]

    depth = len(jax.tree.leaves(meta.unbox(weights[LAYERS]))[0])
    for number in range(depth):
        tree[f"{BLOCK}{number}"] = jax.tree.map(
            partial(layer, number), weights[LAYERS], is_leaf=_boxed
        )
    return tree


def joined(weights: Any) -> Any:
    """Returns weights whose blocks hold query, key and value as one array, and gate and up.

    A block joins separate ones each time that it is applied, which takes longer than its products
    if these have few rows.
    """
    if not isinstance(weights, dict):
        return weights
    tree = {name: joined(below) for name, below in weights.items()}
    for name, parts in JOINED.items():
        if all(part in tree for part in parts):
            tree[name] = _stack(1, *[tree.pop(part) for part in parts])
    return tree


def scan_layers(
    block: Callable[[jax.Array, Any], jax.Array], x: jax.Array, layers: Any, depth: int
) -> jax.Array:
    """Applies x = block(x, layer) for each layer of a tree of arrays [depth, ...].

    Raises ValueError if the arrays have another first axis.
    """
    return jax.lax.scan(lambda x, layer: (block(x, layer), None), x, layers, length=depth)[0]


# --- weights of other packages ---


def read_tensor(
    tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], source: str, model: str
) -> np.ndarray:
    """Returns a tensor of a file in float32.

    Args:
      tensors: the file's tensors by name.
      name: of the tensor.
      shape: that it must have.
      source: the file, for errors.
      model: description of the model that needs it, for errors.

    Raises:
      ValueError: if the tensor is missing or has another shape.
    """
    if name not in tensors:
        raise ValueError(f"{source} has no tensor {name}, which {model} needs")
    if tensors[name].shape != shape:
        raise ValueError(
            f"{source}: {name} has the shape {tensors[name].shape}, {model} needs {shape}"
        )
    return np.asarray(tensors[name], np.float32)
