"""Arrays come back from a safetensors file as they were, however they lay in memory, and no other code writes one."""

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
def test_an_array_comes_back_however_it_lies_in_memory(tmp_path, name):
    array = np.asarray(LAYOUTS[name])
    tensors.save(tmp_path / "a", {"x": LAYOUTS[name]}, {"made by": "a test"})
    found = safetensors.numpy.load_file(tmp_path / "a")["x"]
    np.testing.assert_array_equal(found, array)
    assert found.shape == array.shape and found.dtype == array.dtype.newbyteorder("=")
    with safetensors.safe_open(tmp_path / "a", framework="numpy") as file:
        assert file.metadata() == {"made by": "a test"}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_all_safetensors_are_written_by_one_function():
    """The library's own functions would write a transposed array as other numbers."""
    writers = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(
                "safetensors.numpy.save"
            ):
                writers.add(path.relative_to(PACKAGE).as_posix())
            assert not (
                isinstance(node, ast.ImportFrom) and str(node.module).startswith("safetensors")
            ), path
    assert writers == {"core/tensors.py"}
