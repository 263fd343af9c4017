"""The mesh and the one table that says which axis of an array lies on which axis of the mesh.

Models name the axes of their weights ("embed", "mlp", "heads", ...); this table alone knows the mesh. Arrays are born
sharded: shapes come from `jax.eval_shape`, shardings from the names, and `jax.jit` creates each piece where it stays.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

RULES = (
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("vocab", "tensor"),
    ("kv", None),
)


def make_mesh(fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over all devices with the axes data, fsdp and tensor; data takes what the other two leave.

    Raises ValueError where fsdp * tensor does not divide the number of devices.
    """
    devices = jax.device_count()
    if devices % (fsdp * tensor):
        raise ValueError(
            f"make_mesh: fsdp={fsdp} times tensor={tensor} must divide the {devices} devices; choose other sizes"
        )
    return jax.make_mesh(
        (devices // (fsdp * tensor), fsdp, tensor), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis over data and fsdp, the others whole."""
    return NamedSharding(mesh, PartitionSpec(dict(RULES)["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def born_sharded(mesh: Mesh, create: Callable[..., Any], *arguments: Any) -> tuple[Any, Any]:
    """(tree, shardings) of `create(*arguments)`, each array laid out as its axis names and RULES say.

    Weights without names are replicated. The boxes that carry the names are gone from what is returned.
    """
    abstract = jax.eval_shape(create, *arguments)
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract), mesh, RULES)
    with jax.set_mesh(mesh):
        born = jax.jit(
            lambda *a: nn.meta.unbox(create(*a)),
            out_shardings=shardings,
            compiler_options={"xla_backend_optimization_level": 0},  # runs once: what counts is that it compiles fast
        )
        tree = born(*arguments)
    return tree, shardings


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The numeric arrays of a batch, split over the mesh; text stays with the host.

    Raises ValueError where the batch does not divide among the devices.
    """
    sharding = batch_sharding(mesh)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    arrays = {name: value for name, value in batch.items() if value.dtype != object}
    for name, value in arrays.items():
        if len(value) % shards:
            raise ValueError(f"batch_size={len(value)} ({name}) must be a multiple of the {shards} data shards")
    return jax.device_put(arrays, sharding)
