#!/usr/bin/env bash
# flax 0.12.8 with jax 0.10.2: jax.make_mesh makes axes of type Explicit by default, and a Linen
# module with logical axis names (flax.linen.with_logical_constraint) fails on them with an
# assertion of JAX. So the mesh of JAX's guide cannot run the module of Flax's guide.
# Remedy: jax.make_mesh(..., axis_types=(AxisType.Auto, ...)).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 flax==0.12.8
JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=2 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType

outcomes = {}
for name, types in {"as made by default": None, "Auto": (AxisType.Auto,)}.items():
    mesh = jax.make_mesh((2,), ("data",), axis_types=types)
    with jax.set_mesh(mesh), nn.logical_axis_rules([("batch", "data")]):
        try:
            jax.jit(lambda x: nn.with_logical_constraint(x, ("batch", None)))(jnp.ones((2, 3)))
            outcomes[name] = "runs"
        except Exception as error:
            outcomes[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:110]}"
    print(f"axes {name} ({mesh.axis_types[0]}): {outcomes[name]}")
sys.exit(not (outcomes["Auto"] == "runs" and outcomes["as made by default"] != "runs"))
PYTHON
# Output:
#   axes as made by default (AxisType.Explicit): AssertionError: `with_sharding_constraint` acts as an assert when all
#   axes of mesh are of type `Explicit`. The array sharding:
#   axes Auto (AxisType.Auto): runs
