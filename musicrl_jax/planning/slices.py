"""Describes TPU slices to JAX by libtpu's compiler, on a machine without any."""

import math
import os
import re
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from musicrl_jax.core import extras, sharding
from musicrl_jax.planning.chips import CHIPS, Chip

# Otherwise libtpu searches for a TPU, its neighbours and a place to log to, and allows only one
# process at a time.
WITHOUT_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
}


def describe(topology: str, slices: int) -> tuple[Callable[[int, int], Mesh], Chip]:
    """Returns (a function from sizes of fsdp and tensor to a mesh of all chips, the kind of chip).

    Raises ValueError if the topology is unknown.
    """
    # The settings.
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape) or slices < 1:
        raise ValueError(
            f"plan.topology={topology!r}, plan.slices={slices}: give one such as v5e:4x4 or "
            f"v5p:4x4x4, of {', '.join(CHIPS)}, and 1 slice or more"
        )
    extras.check("plan", "plan", "libtpu")

    # libtpu reads its variables when JAX loads it. Those that are set already win.
    chips = math.prod(map(int, shape.split("x")))
    names = {"v5e": f"v5litepod-{chips}", "v4": f"v4-{2 * chips}", "v5p": f"v5p-{2 * chips}"}
    accelerator = {"TPU_ACCELERATOR_TYPE": names.get(kind, f"{kind}-{chips}")}
    os.environ.update({**WITHOUT_TPU, **accelerator, **os.environ})
    from jax.experimental import topologies

    # The devices; v4's two cores are one device.
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if kind == "v4":
        options["chip_config_name"] = "megacore"
    described = topologies.get_topology_desc(topology, platform="tpu", **options)
    return lambda fsdp, tensor: sharding.make_mesh(fsdp, tensor, described.devices), CHIPS[kind]
