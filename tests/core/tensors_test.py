"""Arrays of any memory layout come back from a safetensors file; one function writes them."""

import ast
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from musicrl_jax.core import tensors

PACKAGE = Path(tensors.__file__).parents[1]
ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)
# Views and dtypes that differ in strides, byte order or axes.
LAYOUTS = {
    "row-major": ARRAY,
    "column-major": np.asfortranarray(ARRAY),
    "transposed": ARRAY.T,
    "reversed": ARRAY[::-1],
    "every second": ARRAY[:, ::2],
    "broadcast": np.broadcast_to(ARRAY[:1], (2, 3)),
    "big-endian": ARRAY.astype(">f4"),
    "without axes": np.float32(3),
    "empty": ARRAY[:0],
    "half": ARRAY.T.astype(ml_dtypes.bfloat16),
    "of jax": jnp.asarray(ARRAY).T,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_array_comes_back_whatever_its_memory_layout(tmp_path, name):
    array = np.asarray(LAYOUTS[name])
    tensors.save(tmp_path / "a", {"x": LAYOUTS[name]}, {"made by": "a test"})
    loaded = safetensors.numpy.load_file(tmp_path / "a")["x"]
    np.testing.assert_array_equal(loaded, array)
    assert loaded.shape == array.shape and loaded.dtype == array.dtype.newbyteorder("=")
    assert tensors.read_metadata(tmp_path / "a") == {"made by": "a test"}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_only_one_function_writes_safetensors():
    """The library's own function would write a transposed array as other numbers."""
    writers = set()
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text()
        for node in ast.walk(ast.parse(source)) if "safetensors" in source else ():
            is_call = isinstance(node, ast.Call)
            if is_call and ast.unparse(node.func).startswith("safetensors.numpy.save"):
                writers.add(path.relative_to(PACKAGE).as_posix())
            is_import = isinstance(node, ast.ImportFrom)
            assert not (is_import and str(node.module).startswith("safetensors")), path
    assert writers == {"core/tensors.py"}
