"""Shardings of weights and batches, and the rows of each process."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from musicrl_jax.core import sharding


def named(key):
    return {"w": nn.Partitioned(jnp.zeros((8, 4, 2)), ("embed", "heads", "kv")), "b": jnp.zeros(3)}


def test_sampling_replicates_weights_but_for_the_tensor_axis():
    mesh, key = sharding.make_mesh(2, 2), jax.random.key(0)
    shapes, training = sharding.shapes_and_shardings(mesh, named, key)
    rules = sharding.SAMPLING_RULES
    _, sampling = sharding.shapes_and_shardings(mesh, named, key, rules=rules)
    assert training["w"].spec == PartitionSpec("fsdp", "tensor", None)
    assert sampling["w"].spec == PartitionSpec(None, "tensor", None)
    assert shapes["w"].shape == (8, 4, 2) and training["b"].is_fully_replicated


# --- Batches. ---


@pytest.mark.parametrize(("fsdp", "tensor"), [(1, 1), (2, 1), (2, 2), (1, 8)])
def test_each_row_of_a_batch_is_on_the_device_of_its_number(fsdp, tensor):
    mesh = sharding.make_mesh(fsdp, tensor)
    batch = {
        "x": np.arange(16 * 3).reshape(16, 3).astype(np.float32),
        "id": np.array(["t"] * 16, object),
    }
    whole = sharding.put_batch(mesh, batch)
    assert set(whole) == {"x"}
    np.testing.assert_array_equal(whole["x"], batch["x"])
    rows = sharding.own_rows(mesh, 16)  # one process: all
    np.testing.assert_array_equal(rows, np.arange(16))
    own = sharding.put_batch(mesh, {"x": batch["x"][rows]}, 16)
    assert own["x"].sharding == whole["x"].sharding
    assert own["x"].sharding.spec == PartitionSpec(("data", "fsdp"))
    # Every device has the rows of its index.
    for piece in own["x"].addressable_shards:
        np.testing.assert_array_equal(piece.data, batch["x"][piece.index])
    with pytest.raises(ValueError, match=r"batch_size=7 must be a multiple of the \d data shards"):
        sharding.own_rows(sharding.make_mesh(2, 1), 7)


@pytest.mark.parametrize(
    ("devices", "rows", "rounded"), [(8, 8, 8), (8, 9, 16), (3, 8, 9), (1, 7, 7)]
)
def test_rows_are_rounded_up_to_a_multiple_of_the_shards(devices, rows, rounded):
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    assert sharding.round_up_rows(mesh, rows) == rounded
    sharding.rows_a_shard(mesh, rounded)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64])
def test_gathered_rows_are_bit_equal(dtype):
    mesh = sharding.make_mesh(2, 2)  # two devices hold the same rows
    x = (np.random.default_rng(0).normal(size=(8, 3)) * 1e9).astype(dtype)
    placed = sharding.put_batch(mesh, {"x": np.arange(16).reshape(8, 2)})["x"]
    np.testing.assert_array_equal(sharding.local_rows(placed), np.arange(16).reshape(8, 2))
    whole = sharding.gather_rows(mesh, x[sharding.own_rows(mesh, 8)], 8)
    assert whole.dtype == dtype
    np.testing.assert_array_equal(whole, x)


def test_a_host_of_several_puts_only_its_own_rows(monkeypatch):
    """Here another process has the second half of the devices."""
    mesh = sharding.make_mesh(2, 2)
    own = np.array([4, 5, 6, 7, 12, 13, 14, 15])
    monkeypatch.setattr(sharding, "own_rows", lambda mesh, size: own)
    pieces = []

    def make_array(shape, layout, piece):
        assert shape == (16, 2)
        pieces.extend(piece((slice(start, start + 4), slice(None))) for start in (4, 12))

    monkeypatch.setattr(jax, "make_array_from_callback", make_array)
    x = np.arange(32).reshape(16, 2)
    sharding.put_batch(mesh, {"x": x[own]}, 16)
    np.testing.assert_array_equal(np.concatenate(pieces), x[own])


# --- Weights without axis names. ---


def test_large_weights_without_names_are_split_over_fsdp():
    mesh = sharding.make_mesh(4, 1)
    tree = {
        "large": np.zeros((3, 512, 256), np.float32),
        "odd": np.zeros((301, 303), np.float32),
        "small": np.zeros(8),
    }
    shardings = sharding.spread(mesh, tree)
    assert shardings["large"].spec == PartitionSpec(None, "fsdp")
    assert shardings["odd"].is_fully_replicated and shardings["small"].is_fully_replicated
    placed = sharding.put(tree, shardings)
    assert placed["large"].addressable_shards[0].data.shape == (3, 128, 256)
    jax.tree.map(np.testing.assert_array_equal, sharding.fetch(placed), tree)
    alone = sharding.spread(sharding.make_mesh(1, 1), tree)
    assert all(each.is_fully_replicated for each in alone.values())


@pytest.mark.parametrize(
    ("flags", "nproc", "threads"),
    [
        ("", None, None),
        ("--xla_force_host_platform_device_count=1", None, None),
        ("--xla_force_host_platform_device_count=40 --xla_dump_to=x", None, "120"),
        ("--xla_force_host_platform_device_count=40", "64", "64"),
    ],
)
def test_virtual_devices_get_threads_to_start_and_to_gather_at_once(
    flags, nproc, threads, monkeypatch
):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.delenv("NPROC", raising=False)
    if nproc:
        monkeypatch.setenv("NPROC", nproc)
    sharding.reserve_threads()
    assert os.environ.get("NPROC") == threads


def test_xla_starts_the_reserved_threads():
    script = (
        "import os, jax; from musicrl_jax.core import sharding; sharding.reserve_threads(); "
        "jax.block_until_ready(jax.numpy.zeros(3)); print(len(os.listdir('/proc/self/task')))"
    )
    settings = {name: value for name, value in os.environ.items() if name != "NPROC"}
    settings["XLA_FLAGS"] = "--xla_force_host_platform_device_count=64"
    done = subprocess.run(
        [sys.executable, "-c", script], env=settings, capture_output=True, text=True, check=True
    )
    # In each of two pools.
    assert int(done.stdout) >= 2 * sharding.THREADS_PER_DEVICE * 64, done.stderr
