"""Checks the names of TPU slices, and which of their chips are neighbours."""

import importlib.util
import json
import os
import sys

import numpy as np
import pytest

from musicrl_jax.planning import slices


@pytest.mark.parametrize("topology", ["v5e", "v7x:4x4", "v5e:4", "v5e:4x4x4x4", "v5e:axb"])
def test_an_unknown_topology_is_refused(topology):
    with pytest.raises(ValueError, match=r"plan\.topology=.*give one such as v5e:4x4"):
        slices.describe(topology, 1)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra 'plan'")
@pytest.mark.parametrize(
    ("topology", "count", "chips"),
    [
        ("v5e:4x4", 1, 16),
        ("v5e:16x16", 1, 256),
        ("v5e:16x16", 2, 512),
        ("v5p:4x4x4", 1, 64),
        ("v6e:8x8", 1, 64),
    ],
)
def test_four_chips_of_any_slice_share_a_weight(topology, count, chips, processes):
    """The base size shards over four chips; they must be neighbours in one slice."""
    code = f"""
import json
from musicrl_jax.planning import slices
mesh = slices.describe({topology!r}, {count})[0](4, 1)
groups = []
for group in mesh.devices[:, :, 0]:
    groups.append([(getattr(each, "slice_index", 0), each.coords) for each in group.flat])
print("RESULT", json.dumps([dict(mesh.shape), groups]))
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = processes.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    shape, groups = json.loads(done.stdout.partition("RESULT ")[2])
    assert shape == {"data": chips // 4, "fsdp": 4, "tensor": 1}
    for group in groups:
        assert len({place for place, _ in group}) == 1
        spans = np.ptp([coords for _, coords in group], axis=0)
        assert spans.sum() <= 3
