"""Checks sums of an estimate, and how the compiler's refusals are read."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from musicrl_jax.core import sharding
from musicrl_jax.planning import estimate
from musicrl_jax.planning.chips import CHIPS


@pytest.mark.parametrize(
    ("message", "bytes_"),
    [
        ("Ran out of memory in memory space hbm. Used 20.17G of 15.75G hbm.", 20.17 * 2**30),
        ("memory for HLO temporaries (15.79G) exceeds available HBM (15.75G).", 15.79 * 2**30),
    ],
)
def test_a_refused_program_has_the_memory_that_the_compiler_names(message, bytes_):
    error = RuntimeError(f"RESOURCE_EXHAUSTED: {message}")
    refused = estimate.refused(error, CHIPS["v5e"], beside=7)
    assert refused.needed == int(bytes_) + 7 and not refused.fits
    with pytest.raises(RuntimeError, match="another mistake"):
        estimate.refused(RuntimeError("another mistake"), CHIPS["v5e"], 0)


def test_an_estimate_adds_up_memory_and_time():
    seconds = {"matrix": 0.2, "memory": 0.5, "network": 0.1, "compiler": 0.4}
    named = {f"{limit}_seconds": value for limit, value in seconds.items()}
    sums = estimate.Estimate(1, 2, 3, 4, 5, memory=15, **named)
    assert sums.needed == 15 and sums.fits and sums.limit == "memory"
    assert sums.seconds == pytest.approx(0.6)
    mesh = sharding.make_mesh(2, 2)
    both = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    tree = {
        "split": jax.ShapeDtypeStruct((8, 6), jnp.bfloat16, sharding=both),
        "whole": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=sharding.replicated(mesh)),
    }
    assert estimate.bytes_a_chip(tree) == 4 * 3 * 2 + 3 * 4
