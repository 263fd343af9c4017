#!/usr/bin/env bash
# jax 0.10.2 installs without flatbuffers, but jax.export needs it to write or read an exported
# function. So an environment with only jax and its stated requirements cannot serve an exported
# model. TensorFlow installs the package, so a training environment does not show the problem.
# Remedy: require flatbuffers beside jax wherever exported functions are read. Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import importlib.util
import sys

import jax
import jax.numpy as jnp
from jax import export

exported = export.export(jax.jit(jnp.sin))(jax.ShapeDtypeStruct((2,), jnp.float32))
try:
    exported.serialize()
    outcome = "serialised"
except ImportError as error:  # ModuleNotFoundError among them
    outcome = f"{type(error).__name__}: {str(error).splitlines()[0]}"
installed = importlib.util.find_spec("flatbuffers") is not None
print(f"jax {jax.__version__}, flatbuffers installed: {installed}; serialize(): {outcome}")
sys.exit(installed or outcome == "serialised")
PYTHON
# Output:
#   jax 0.10.2, flatbuffers installed: False; serialize(): ImportError: Please install 'flatbuffers' in order to use
#   Exported serialization
