"""The device mesh, and the one table that maps the axes of weights to the axes of the mesh.

Models name the axes of their weights ("embed", "mlp", "heads", ...). Weights are created sharded:
shapes come from `jax.eval_shape`, shardings from the names and the table, and `jax.jit` creates
each shard on its device.
"""

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
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
# For sampling: weights are all-gathered over fsdp once, before the loop, and not in each step.
SAMPLING_RULES = tuple((name, None if axis == "fsdp" else axis) for name, axis in RULES)
AXES = ("data", "fsdp", "tensor")
ROWS = dict(RULES)["batch"]
MIN_SPLIT_SIZE = 1 << 16  # elements; `spread` replicates smaller arrays
# Of a CPU that stands for several devices: one runs a program, one starts the next, one is spare.
THREADS_PER_DEVICE = 3


def reserve_threads() -> None:
    """Gives the virtual devices of a CPU enough threads. Call it before JAX's first computation.

    XLA starts and runs the programs of all devices on one pool, by default of a thread per device
    or core. With many programs in flight, starting ones occupy it, and a collective, which needs a
    thread for each device at once, waits for ever (seen with jax 0.10). The user's NPROC wins.
    """
    flag = re.search(r"--xla_force_host_platform_device_count=(\d+)", os.getenv("XLA_FLAGS", ""))
    devices = max(int(flag[1]) if flag else 1, jax.config.jax_num_cpu_devices)
    if devices > 1:
        os.environ.setdefault("NPROC", str(max(THREADS_PER_DEVICE * devices, os.cpu_count() or 1)))


def make_mesh(fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with the axes data, fsdp and tensor, where data = devices / (fsdp * tensor).

    With several slices, which a slower network joins, only data crosses from one to another. An
    axis may use part of a torus's side, as 4 of the 16 chips of a v5e:16x16's.

    Raises ValueError if fsdp * tensor does not divide the number of devices of a slice.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    per_slice = len(devices) // slices
    if per_slice % (fsdp * tensor):
        raise ValueError(
            f"make_mesh: fsdp={fsdp} times tensor={tensor} must divide the {per_slice} devices"
            f"{' of a slice' if slices > 1 else ''}; choose other sizes"
        )
    # Neighbouring devices get neighbouring places in the mesh.
    shape = (per_slice // (fsdp * tensor), fsdp, tensor)
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(
            shape, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # Not Explicit axes, on which the constraints of Linen assert.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


# --- Weights. ---


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def named(array: jax.Array, axes: Sequence[str | None]) -> nn.LogicallyPartitioned:
    """Returns a weight in a Flax box with the names of its axes."""
    return nn.LogicallyPartitioned(array, tuple(axes))


def shapes_and_shardings(
    mesh: Mesh, create: Callable[..., Any], *arguments: Any, rules: Rules = RULES
) -> tuple[Any, Any]:
    """Returns the shapes of `create(*arguments)` and, by axis names and rules, their shardings.

    Weights without axis names are replicated. Both trees are without Flax boxes.
    """
    boxed = jax.eval_shape(create, *arguments)
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, rules)
    return nn.meta.unbox(boxed), shardings


def create_sharded(mesh: Mesh, create: Callable[..., Any], *arguments: Any) -> tuple[Any, Any]:
    """Returns the tree of `create(*arguments)`, created sharded, and its shardings."""
    _, shardings = shapes_and_shardings(mesh, create, *arguments)
    with jax.set_mesh(mesh):
        jitted = jax.jit(
            lambda *a: nn.meta.unbox(create(*a)),
            out_shardings=shardings,
            # It runs once, so only the time of compilation counts.
            compiler_options={"xla_backend_optimization_level": 0},
        )
        return jitted(*arguments), shardings


def spread(mesh: Mesh, tree: Any) -> Any:
    """Returns FSDP shardings for weights without axis names.

    Each large array is split along the longest axis that fsdp divides. Others are replicated.
    """

    def sharding_of(array: Any) -> NamedSharding:
        axes = [axis for axis, size in enumerate(array.shape) if size % mesh.shape["fsdp"] == 0]
        if mesh.shape["fsdp"] == 1 or array.size < MIN_SPLIT_SIZE or not axes:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: array.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "fsdp"))

    return jax.tree.map(sharding_of, tree)


def put(tree: Any, shardings: Any) -> Any:
    """Returns the tree as sharded arrays. Every process has the same whole arrays."""

    def put_array(array: Any, sharding: NamedSharding) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put_array, tree, shardings)


def fetch(tree: Any) -> Any:
    """Returns the tree as whole NumPy arrays, on every process."""

    def whole(array: Any) -> Any:
        if not isinstance(array, jax.Array) or array.is_fully_addressable:
            return jax.device_get(array)
        if array.is_fully_replicated:  # without the other processes, which may not fetch it
            return np.asarray(array.addressable_data(0))
        return multihost_utils.process_allgather(array, tiled=True)

    return jax.tree.map(whole, tree)


# --- Batches. ---


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: rows over data and fsdp, other axes whole."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def _data_shards(mesh: Any) -> int:
    """Returns the number of shards that a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def by_row(x: jax.Array) -> jax.Array:
    """Constrains activations to be sharded by row, if a mesh is set and divides their rows.

    Otherwise XLA propagates the weights' FSDP sharding to them, and every device computes all rows
    and a part of each sum.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if set(AXES) - set(mesh.axis_names) or x.shape[0] % _data_shards(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(ROWS))


def by_row_and_head(function: Callable[..., jax.Array], arrays: int) -> Callable[..., jax.Array]:
    """Returns the function with every device computing its rows and heads, if a mesh is set.

    XLA cannot divide a kernel over devices by itself. An axis that the mesh does not divide stays
    whole: every device then computes all of it.

    Args:
      function: maps `arrays` arrays [B, H, ...], and weights [H, ...], to an array [B, H, ...].
      arrays: number of arrays before the weights.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if set(AXES) - set(mesh.axis_names):
        return function

    def call(*arguments: jax.Array) -> jax.Array:
        rows, heads = arguments[0].shape[:2]
        row_axis = None if rows % _data_shards(mesh) else ROWS
        head_axis = None if heads % mesh.shape["tensor"] else "tensor"
        activations, weights = PartitionSpec(row_axis, head_axis), PartitionSpec(head_axis)
        specs = tuple(activations if place < arrays else weights for place in range(len(arguments)))
        return jax.shard_map(
            function, mesh=mesh, in_specs=specs, out_specs=activations, check_vma=False
        )(*arguments)

    return call


def rows_a_shard(mesh: Mesh, batch_size: int) -> int:
    """Returns the rows of a batch per shard. Raises ValueError if the shards do not divide it."""
    shards = _data_shards(mesh)
    if batch_size % shards:
        raise ValueError(f"batch_size={batch_size} must be a multiple of the {shards} data shards")
    return batch_size // shards


def own_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Returns the indices, int64, ascending, of the batch's rows on this process's devices.

    Raises ValueError as `rows_a_shard` does.
    """
    rows_a_shard(mesh, batch_size)
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices]))


def round_up_rows(mesh: Mesh, rows: int) -> int:
    """Returns the least multiple of the number of data shards that is at least `rows`."""
    shards = _data_shards(mesh)
    return -(-rows // shards) * shards


def local_rows(array: jax.Array) -> np.ndarray:
    """Returns a batch's rows on this process's devices, in the order of `own_rows`."""
    # Replicas of a shard have one start.
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def gather_rows(mesh: Mesh, rows: np.ndarray, batch_size: int) -> np.ndarray:
    """Returns a whole batch [batch_size, ...] on every process.

    Args:
      mesh: the mesh.
      rows: the results of this process for its `own_rows`, [n, ...].
      batch_size: rows of the whole batch.
    """
    # As bytes, since JAX would round float64.
    raw = np.frombuffer(rows.tobytes(), np.uint8).reshape(len(rows), -1)
    whole = fetch(put_batch(mesh, {"rows": raw}, batch_size)["rows"])
    return np.frombuffer(whole.tobytes(), rows.dtype).reshape(batch_size, *rows.shape[1:])


def put_batch(
    mesh: Mesh, batch: dict[str, np.ndarray], batch_size: int | None = None
) -> dict[str, jax.Array]:
    """Returns the numeric arrays of a batch, sharded by row. Text is dropped.

    Args:
      mesh: the mesh.
      batch: all rows, the same on every process; with a batch size, only the process's `own_rows`.
      batch_size: rows of the whole batch.
    """
    sharding = batch_sharding(mesh)

    def put_rows(array: np.ndarray) -> jax.Array:
        count = batch_size or len(array)
        own = own_rows(mesh, count)
        # Where `array` has each row of the batch.
        places = np.searchsorted(own, np.arange(count)) if batch_size else np.arange(count)
        return jax.make_array_from_callback(
            (count, *array.shape[1:]), sharding, lambda index: array[places[index[0]]]
        )

    return {name: put_rows(value) for name, value in batch.items() if value.dtype != object}
