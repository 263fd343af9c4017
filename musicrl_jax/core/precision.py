"""In which precision weights are multiplied, and what stays in float32."""

from typing import Any

import jax
import jax.numpy as jnp

LOOKED_UP = (
    "table",
    "place",
    "relative",
)  # ends of names of weights that are indexed, not multiplied
LAYERS = "layers"  # name over weights that hold all layers of a network, stacked along a first axis


def at_least_float32(x: jax.Array) -> jax.Array:
    """Returns x in float32, or float64 if it is that: what softmaxes and sums are computed in."""
    return x if jnp.finfo(x.dtype).bits >= 32 else x.astype(jnp.float32)


def in_dtype(weights: Any, dtype: str) -> Any:
    """Casts weights for a forward pass: what is multiplied to `dtype`, 'float32' or 'bfloat16'.

    Weights with fewer than two axes in a layer (scales, biases) and those that are LOOKED_UP stay as
    they are: gradients of a row that is looked up often are summed in float32. Gradients come back
    in the weights' own dtype.

    Raises ValueError for any other dtype.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={dtype!r} must be 'float32' or 'bfloat16'")
    if dtype == "float32":
        return weights

    def cast(path: Any, array: Any) -> Any:
        stays = layer_axes(path, array) < 2
        stays = stays or any(name.endswith(LOOKED_UP) for name in _names(path))
        return array if stays else array.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, weights)


def layer_axes(path: tuple[Any, ...], array: Any) -> int:
    """Counts the axes of a weight in one layer, where the array holds one layer or all."""
    return array.ndim - (LAYERS in _names(path))


def _names(path: tuple[Any, ...]) -> list[str]:
    """Returns the dictionaries' keys on a path."""
    return [str(getattr(key, "key", "")) for key in path]
