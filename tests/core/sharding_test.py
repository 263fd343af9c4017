"""Where arrays lie: whose rows are whose, what is gathered for drawing, what has no names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from musicrl_jax.core import sharding


def named(key):
    return {"w": nn.Partitioned(jnp.zeros((8, 4, 2)), ("embed", "heads", "kv")), "b": jnp.zeros(3)}


def test_weights_are_whole_but_for_tensor_while_clips_are_drawn():
    mesh = sharding.make_mesh(2, 2)
    shapes, spread = sharding.shapes_and_shardings(mesh, named, jax.random.key(0))
    drawing = sharding.shapes_and_shardings(
        mesh, named, jax.random.key(0), rules=sharding.SAMPLING_RULES
    )[1]
    assert spread["w"].spec == PartitionSpec("fsdp", "tensor", None)
    assert drawing["w"].spec == PartitionSpec(None, "tensor", None)
    assert shapes["w"].shape == (8, 4, 2) and spread["b"].is_fully_replicated


@pytest.mark.parametrize(("fsdp", "tensor"), [(1, 1), (2, 1), (2, 2), (1, 8)])
def test_every_row_of_a_batch_lies_where_its_number_says(fsdp, tensor):
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
    assert own["x"].sharding == whole["x"].sharding and own["x"].sharding.spec == PartitionSpec(
        ("data", "fsdp")
    )
    for piece in own["x"].addressable_shards:
        np.testing.assert_array_equal(piece.data, batch["x"][piece.index])
    with pytest.raises(ValueError, match=r"batch_size=7 must be a multiple of the \d data shards"):
        sharding.own_rows(sharding.make_mesh(2, 1), 7)


@pytest.mark.parametrize(("devices", "rows", "up"), [(8, 8, 8), (8, 9, 16), (3, 8, 9), (1, 7, 7)])
def test_rows_are_rounded_up_to_the_devices(devices, rows, up):
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    assert sharding.round_up_rows(mesh, rows) == up
    sharding.rows_a_shard(mesh, up)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64])
def test_rows_that_hosts_computed_come_back_to_the_bit(dtype):
    mesh = sharding.make_mesh(2, 2)  # two devices hold the same rows
    x = (np.random.default_rng(0).normal(size=(8, 3)) * 1e9).astype(dtype)
    placed = sharding.put_batch(mesh, {"x": np.arange(16).reshape(8, 2)})["x"]
    np.testing.assert_array_equal(sharding.local_rows(placed), np.arange(16).reshape(8, 2))
    whole = sharding.gather_rows(mesh, x[sharding.own_rows(mesh, 8)], 8)
    assert whole.dtype == dtype
    np.testing.assert_array_equal(whole, x)


def test_a_host_of_several_puts_the_rows_that_it_has(monkeypatch):
    """As where another process holds the second half of the devices: only its own rows are asked of it."""
    mesh = sharding.make_mesh(2, 2)
    held = np.array([4, 5, 6, 7, 12, 13, 14, 15])
    monkeypatch.setattr(sharding, "own_rows", lambda mesh, size: held)
    asked = []

    def made(shape, layout, piece):
        assert shape == (16, 2)
        asked.extend(piece((slice(start, start + 4), slice(None))) for start in (4, 12))

    monkeypatch.setattr(jax, "make_array_from_callback", made)
    x = np.arange(32).reshape(16, 2)
    sharding.put_batch(mesh, {"x": x[held]}, 16)
    np.testing.assert_array_equal(np.concatenate(asked), x[held])


def test_large_weights_without_names_are_split_over_fsdp():
    mesh = sharding.make_mesh(4, 1)
    tree = {
        "large": np.zeros((3, 512, 256), np.float32),
        "odd": np.zeros((301, 303), np.float32),
        "small": np.zeros(8),
    }
    found = sharding.spread(mesh, tree)
    assert found["large"].spec == PartitionSpec(None, "fsdp")
    assert found["odd"].is_fully_replicated and found["small"].is_fully_replicated
    placed = sharding.put(tree, found)
    assert placed["large"].addressable_shards[0].data.shape == (3, 128, 256)
    jax.tree.map(np.testing.assert_array_equal, sharding.fetch(placed), tree)
    assert all(
        sharding.spread(sharding.make_mesh(1, 1), tree)[name].is_fully_replicated for name in tree
    )
