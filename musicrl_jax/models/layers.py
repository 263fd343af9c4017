"""The equal layers of a network: apart, each with weights of its own, or stacked and gone through in a loop.

A loop is compiled as one layer is. Where all positions are there at once it takes a TPU as long, by the compiler's
schedule and within 5 %; on CPUs products take a third longer inside one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import meta

from musicrl_jax.core.precision import LAYERS

BLOCK = "block_"  # before a layer's number in its name
UNNAMED = {nn.PARTITION_NAME: None}  # of an axis that no rule of the mesh splits


def _boxed(x: Any) -> bool:
    return isinstance(x, nn.LogicallyPartitioned)


def stacked(weights: Any) -> Any:
    """A tree of weights with the layers of each network in it stacked: one array [layers, ...] in place of each.

    Transformers, where all positions are there at once, conformers and BERT take such weights and go through them in a
    loop. What is done to all weights, as an optimiser does, is so done to a tenth as many arrays, and compiled in half
    of the time. Boxes keep their names, and the layers have none.
    """
    if not isinstance(weights, dict):
        return weights
    depth = sum(name.startswith(BLOCK) for name in weights)
    found = {name: stacked(below) for name, below in weights.items() if not name.startswith(BLOCK)}
    if not depth:
        return found

    def stack(*each: Any) -> Any:
        if _boxed(each[0]):
            return each[0].replace_boxed(stack(*(box.unbox() for box in each))).add_axis(0, UNNAMED)
        return (np if isinstance(each[0], np.ndarray) else jnp).stack(each)

    return {
        **found,
        LAYERS: jax.tree.map(
            stack, *(weights[f"{BLOCK}{n}"] for n in range(depth)), is_leaf=_boxed
        ),
    }


def unstacked(weights: Any) -> Any:
    """The inverse of `stacked`: the layers apart, as decoding takes them and checkpoints hold them."""
    if not isinstance(weights, dict):
        return weights
    found = {name: unstacked(below) for name, below in weights.items() if name != LAYERS}
    if LAYERS not in weights:
        return found

    def layer(number: int, x: Any) -> Any:
        return (
            x.replace_boxed(layer(number, x.unbox())).remove_axis(0, UNNAMED)
            if _boxed(x)
            else x[number]
        )

    depth = len(meta.unbox(jax.tree.leaves(weights[LAYERS], is_leaf=_boxed)[0]))
    parts = {
        f"{BLOCK}{n}": jax.tree.map(partial(layer, n), weights[LAYERS], is_leaf=_boxed)
        for n in range(depth)
    }
    return {**found, **parts}


def in_a_loop(
    block: Callable[[jax.Array, Any], jax.Array], x: jax.Array, layers: Any, depth: int
) -> jax.Array:
    """X through all layers, whose arrays are [depth, ...]: block(x, a layer's arrays) -> the next x.

    ValueError where there are more or fewer.
    """
    return jax.lax.scan(lambda x, layer: (block(x, layer), None), x, layers, length=depth)[0]
