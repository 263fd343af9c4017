"""Writes safetensors files. All writes go through `save`, because the library ignores strides.

safetensors 0.8 copies an array's memory without regard to strides or byte order. For a transposed,
reversed or broadcast array it silently writes wrong numbers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from musicrl_jax.core.manifest import replacing

HEADER = "musicrl"  # name of the header's text that describes a packed model, as JSON


def save(
    path: str | Path, arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a file, whole or not at all, in place of an existing one.

    Args:
      path: the file.
      arrays: NumPy or JAX arrays by name, in any memory layout.
      metadata: texts for the file's header.
    """
    tensors = {name: row_major(array) for name, array in arrays.items()}
    texts = None if metadata is None else dict(metadata)
    with replacing(Path(path)) as partial:
        safetensors.numpy.save_file(tensors, partial, texts)


def read_metadata(path: str | Path) -> dict[str, str]:
    """Reads the metadata strings of a safetensors file, but not its arrays."""
    with safetensors.safe_open(path, framework="numpy") as file:
        return file.metadata() or {}


def row_major(array: Any) -> np.ndarray:
    """Returns the array in C order and native byte order."""
    array = np.asarray(array)
    # Not np.ascontiguousarray, which turns shape [] into [1].
    return np.asarray(array, array.dtype.newbyteorder("="), order="C")
