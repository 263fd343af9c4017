"""Arrays -> a safetensors file. All such files are written here, since the library trusts how an array lies in memory.

safetensors 0.8 copies an array's memory from its first byte on, without a look at its strides or its byte order. Of a
transposed, reversed or broadcast array it writes other numbers, and says nothing.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

HEADER = "musicrl"  # the header's text that describes a packed model, as JSON


def save(
    path: str | Path, arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a file, whole or not at all.

    Args:
      path: of the file; what stood there is replaced.
      arrays: by name, of numpy or jax, in any memory layout.
      metadata: texts for the file's header.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    tensors = {name: row_major(array) for name, array in arrays.items()}
    safetensors.numpy.save_file(
        tensors, partial, metadata=None if metadata is None else dict(metadata)
    )
    os.replace(partial, path)


def read_metadata(path: str | Path) -> dict[str, str]:
    """Returns the texts of a file's header, without reading its arrays."""
    with safetensors.safe_open(path, framework="numpy") as file:
        return file.metadata() or {}


def row_major(array: Any) -> np.ndarray:
    """Returns the array with its elements one after the other in memory, in this machine's byte order."""
    array = np.asarray(array)
    return np.asarray(
        array, array.dtype.newbyteorder("="), order="C"
    )  # ascontiguousarray would make [1] of []
