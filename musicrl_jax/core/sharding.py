"""The mesh and the one table that says which axis of an array lies on which axis of the mesh.

Models name the axes of their weights ("embed", "mlp", "heads", ...); this table alone knows the mesh. Arrays are born
sharded: shapes come from `jax.eval_shape`, shardings from the names, and `jax.jit` creates each piece where it stays.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]
RULES: Rules = (
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("vocab", "tensor"),
    ("kv", None),
)
# Weights while clips are drawn: whole but for the tensor axis; gathered from fsdp before the loop, not in each step.
SAMPLING_RULES = tuple((name, None if axis == "fsdp" else axis) for name, axis in RULES)
AXES = ("data", "fsdp", "tensor")
LARGE = 1 << 16  # elements


def make_mesh(fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices with the axes data, fsdp and tensor; data takes what the other two leave.

    Over several slices, which a slower network joins, data alone crosses from one to another. An axis may take a part
    of a torus's side: 4 of the 16 chips of a v5e:16x16's.

    Raises ValueError where fsdp * tensor does not divide the number of devices of a slice.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if len(devices) // slices % (fsdp * tensor):
        raise ValueError(
            f"make_mesh: fsdp={fsdp} times tensor={tensor} must divide the {len(devices) // slices} devices"
            f"{' of a slice' if slices > 1 else ''}; choose other sizes"
        )
    shape = (len(devices) // slices // (fsdp * tensor), fsdp, tensor)
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(
            shape, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis over data and fsdp, the others whole."""
    return NamedSharding(mesh, PartitionSpec(dict(RULES)["batch"]))


def by_row(x: jax.Array) -> jax.Array:
    """x, its first axis over data and fsdp of the mesh that is set, if one is and divides it.

    Activations need to be told: a weight that is split over fsdp would else draw them after itself, and every device
    would compute all rows and a part of each sum.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if set(AXES) - set(mesh.axis_names) or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(dict(RULES)["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def named(array: jax.Array, axes: Sequence[str | None]) -> nn.LogicallyPartitioned:
    """Returns a weight in a box with the names of its axes, which the rules lay on the mesh."""
    return nn.LogicallyPartitioned(array, tuple(axes))


def shapes_and_shardings(
    mesh: Mesh, create: Callable[..., Any], *arguments: Any, rules: Rules = RULES
) -> tuple[Any, Any]:
    """(shapes, shardings) of `create(*arguments)`, each array laid out as its axis names and the rules say.

    Weights without names are replicated. The boxes that carry the names are gone from what is returned.
    """
    boxed = jax.eval_shape(create, *arguments)
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, rules)
    return nn.meta.unbox(boxed), shardings


def create_sharded(mesh: Mesh, create: Callable[..., Any], *arguments: Any) -> tuple[Any, Any]:
    """(tree, shardings) of `create(*arguments)`, each array created where `shapes_and_shardings` puts it."""
    _, shardings = shapes_and_shardings(mesh, create, *arguments)
    with jax.set_mesh(mesh):
        born = jax.jit(
            lambda *a: nn.meta.unbox(create(*a)),
            out_shardings=shardings,
            compiler_options={
                "xla_backend_optimization_level": 0
            },  # runs once: what counts is that it compiles fast
        )
        tree = born(*arguments)
    return tree, shardings


def rows_a_shard(mesh: Mesh, batch_size: int) -> int:
    """The rows of a batch that a device holds; ValueError where the batch does not divide among the devices."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % shards:
        raise ValueError(f"batch_size={batch_size} must be a multiple of the {shards} data shards")
    return batch_size // shards


def own_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a batch that this process's devices hold, int64, ascending; ValueError as for `rows_a_shard`."""
    rows_a_shard(mesh, batch_size)
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held]))


def round_up_rows(mesh: Mesh, rows: int) -> int:
    """Returns the least number of rows, from `rows` up, that divides among the data shards."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-rows // shards) * shards


def local_rows(array: jax.Array) -> np.ndarray:
    """Returns the rows of a batch that this process's devices hold, in the order of `own_rows`."""
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def gather_rows(mesh: Mesh, rows: np.ndarray, batch_size: int) -> np.ndarray:
    """Returns a whole batch on every process.

    It travels as bytes, since JAX would round float64.

    Args:
      mesh: the mesh.
      rows: what this process has computed of its `own_rows`, [n, ...].
      batch_size: of the whole.
    """
    raw = np.frombuffer(rows.tobytes(), np.uint8).reshape(len(rows), -1)
    whole = fetch(put_batch(mesh, {"rows": raw}, batch_size)["rows"])
    return np.frombuffer(whole.tobytes(), rows.dtype).reshape(batch_size, *rows.shape[1:])


def put_batch(
    mesh: Mesh, batch: dict[str, np.ndarray], batch_size: int | None = None
) -> dict[str, jax.Array]:
    """The numeric arrays of a batch, split over the mesh; text stays with the host.

    Args:
      mesh: the mesh.
      batch: all rows, on every process alike; given a batch size, `own_rows` of a batch of that size.
      batch_size: of the whole.
    """
    sharding = batch_sharding(mesh)

    def put(array: np.ndarray) -> jax.Array:
        count = batch_size or len(array)
        held = own_rows(mesh, count)
        place = np.searchsorted(held, np.arange(count)) if batch_size else np.arange(count)
        return jax.make_array_from_callback(
            (count, *array.shape[1:]), sharding, lambda index: array[place[index[0]]]
        )

    return {name: put(value) for name, value in batch.items() if value.dtype != object}


def spread(mesh: Mesh, tree: Any) -> Any:
    """Shardings of weights that carry no names: of each large array the longest axis that fsdp divides is split."""

    def layout(array: Any) -> NamedSharding:
        axes = [axis for axis, size in enumerate(array.shape) if size % mesh.shape["fsdp"] == 0]
        if mesh.shape["fsdp"] == 1 or array.size < LARGE or not axes:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: array.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "fsdp"))

    return jax.tree.map(layout, tree)


def put(tree: Any, shardings: Any) -> Any:
    """Arrays that every process has alike, laid out over the devices of all of them."""

    def laid(array: Any, sharding: NamedSharding) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(laid, tree, shardings)


def fetch(tree: Any) -> Any:
    """The tree as NumPy arrays, each whole, on every process."""

    def whole(array: Any) -> Any:
        if not isinstance(array, jax.Array) or array.is_fully_addressable:
            return jax.device_get(array)
        if not array.is_fully_replicated:
            array = jax.jit(lambda x: x, out_shardings=replicated(array.sharding.mesh))(array)
        return np.asarray(array.addressable_data(0))

    return jax.tree.map(whole, tree)
