"""Dtypes of a forward pass: which weights are cast to bfloat16 and what stays in float32."""

from typing import Any

import jax
import jax.numpy as jnp

LOOKUP_TABLES = ("table", "place", "relative")  # suffixes of weights that are indexed
LAYERS = "layers"  # key of weights that stack all layers of a network along the first axis


def at_least_float32(x: jax.Array) -> jax.Array:
    """Returns x in float32, or in float64 if it is float64. For softmaxes and sums."""
    return x if jnp.finfo(x.dtype).bits >= 32 else x.astype(jnp.float32)


def in_dtype(weights: Any, dtype: str) -> Any:
    """Casts the weights of matrix products to `dtype`, 'float32' or 'bfloat16'.

    Weights with fewer than two axes per layer (scales, biases) and LOOKUP_TABLES keep their dtype:
    the gradients of a frequent row are then summed in float32. Gradients have the dtype of
    `weights`.

    Raises ValueError for any other dtype.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={dtype!r} must be 'float32' or 'bfloat16'")
    if dtype == "float32":
        return weights

    def cast(path: Any, array: Any) -> Any:
        is_table = any(name.endswith(LOOKUP_TABLES) for name in _names(path))
        return array if is_table or layer_axes(path, array) < 2 else array.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, weights)


def layer_axes(path: tuple[Any, ...], array: Any) -> int:
    """Returns a weight's number of axes within one layer, also if the array stacks all layers."""
    return array.ndim - (LAYERS in _names(path))


def _names(path: tuple[Any, ...]) -> list[str]:
    """Returns the dictionary keys of a tree path."""
    return [str(getattr(key, "key", "")) for key in path]
