#!/usr/bin/env bash
# safetensors 0.8.0 writes the bytes of a NumPy array in memory order and ignores its strides. An
# array that is not row-major (a transpose, a slice with a step) is read back with other numbers,
# without an error. Weights are often transposed between PyTorch's layout and Flax's.
# Remedy: numpy.ascontiguousarray before each save. NumPy 2.3.5, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.3.5
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
from safetensors.numpy import load, save

weights = np.arange(6, dtype=np.float32).reshape(2, 3)
changed = []
for name, array in {"row-major": weights, "transposed": weights.T, "every second": weights[:, ::2]}.items():
    restored = load(save({"w": array}))["w"]
    print(f"{name}: wrote {array.tolist()}, read {restored.tolist()}")
    if not np.array_equal(restored, array):
        changed.append(name)
sys.exit(changed != ["transposed", "every second"])
PYTHON
# Output:
#   row-major: wrote [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], read [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
#   transposed: wrote [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]], read [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
#   every second: wrote [[0.0, 2.0], [3.0, 5.0]], read [[0.0, 1.0], [2.0, 3.0]]
