"""Compares the fused kernel, emulated on a CPU, with `attend` in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from musicrl_jax.core import sharding
from musicrl_jax.models.attention import attend
from musicrl_jax.models.fused_attention import bias_diagonals, block_size, fused_attention
from musicrl_jax.models.transformer import Transformer, TransformerConfig, relative_bucket

BLOCK = 8
LITTLE_EFFORT = {"xla_backend_optimization_level": 0}  # compiles in half the time
ROWS, HEADS, BUCKETS = 2, 2, 8


def inputs(length: int, width: int = 4, dtype=jnp.float32):
    """Returns query, key, value [B, H, S, E], a table [H, K] and an output's gradient."""
    rng = np.random.default_rng(length)
    query, key, value = rng.normal(size=(3, ROWS, HEADS, length, width))
    table, gradient = (
        rng.normal(size=(HEADS, BUCKETS)),
        rng.normal(size=(ROWS, length, HEADS, width)),
    )
    arrays = [jnp.asarray(x, dtype) for x in (query, key, value)]
    return [*arrays, jnp.asarray(table, jnp.float32)], jnp.asarray(gradient, dtype)


def buckets_of(distance: int) -> np.ndarray:
    """Returns the bucket of each distance, up to the one from which all are equal."""
    return relative_bucket(np.arange(distance + 1), BUCKETS, distance)


def reference(distance: int):
    """Returns attention with the transformer's own bias."""
    config = TransformerConfig(1, 8, HEADS, 8, 0.0, BUCKETS, distance)

    def function(query, key, value, table):
        params = {"relative": table, "final_norm": jnp.ones(8)}
        bias = Transformer(config).apply(
            {"params": params}, query.shape[2], method=Transformer.bias
        )
        return attend(query, key, value, bias)

    return function


def fused(buckets: np.ndarray, block: int = BLOCK):
    """Returns attention by the kernel."""

    def function(query, key, value, table):
        diagonals = bias_diagonals(table, buckets, query.shape[2], block)
        return fused_attention(query, key, value, diagonals, interpret=True)

    return function


def value_and_gradients(function, arguments, gradient):
    """Returns the output and the gradients of query, key, value and table."""

    def run(arguments, gradient):
        output, pull = jax.vjp(function, *arguments)
        return output, *pull(gradient)

    with jax.default_matmul_precision("highest"):
        return jax.jit(run, compiler_options=LITTLE_EFFORT)(arguments, gradient)


def largest_difference(length, width, distance, buckets=None):
    """Returns the largest difference of an array from the reference's, relative to its largest."""
    arguments, gradient = inputs(length, width)
    expected = value_and_gradients(reference(distance), arguments, gradient)
    buckets = buckets_of(distance) if buckets is None else buckets
    results = value_and_gradients(fused(buckets), arguments, gradient)
    pairs = zip(results, expected, strict=True)
    return max(float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), 1)) for a, b in pairs)


# Four blocks, of which the last is not full; three of them have a bias.
def test_values_and_gradients_are_those_of_attend():
    assert largest_difference(length=29, width=4, distance=12) < 1e-5


def test_a_bias_one_position_off_differs():
    assert largest_difference(29, 4, 12, buckets=buckets_of(12)[1:]) > 1e-2


@pytest.mark.slow
@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(st.integers(1, 45), st.sampled_from([1, 4, 16]), st.integers(5, 40))
def test_values_and_gradients_are_those_of_attend_at_any_size(length, width, distance):
    assert largest_difference(length, width, distance) < 1e-5


@pytest.mark.slow
def test_values_and_gradients_are_those_of_attend_at_the_size_of_a_tpu():
    """A clip of 12 s, in blocks of 128 positions."""
    arguments, gradient = inputs(312, 64)
    expected = value_and_gradients(reference(128), arguments, gradient)
    function = fused(buckets_of(128), block_size(312))
    for a, b in zip(value_and_gradients(function, arguments, gradient), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


def test_bfloat16_sums_in_float32():
    """Its error is that of rounding inputs, weights and results, which attend rounds too."""
    arguments, gradient = inputs(29, dtype=jnp.bfloat16)
    exact = [x.astype(jnp.float32) for x in arguments], gradient.astype(jnp.float32)
    expected = value_and_gradients(reference(12), *exact)
    results = value_and_gradients(fused(buckets_of(12)), arguments, gradient)
    assert [x.dtype for x in results] == [*[jnp.bfloat16] * 4, jnp.float32]
    for a, b in zip(results, expected, strict=True):
        assert jnp.abs(a.astype(jnp.float32) - b).max() < 0.02 * jnp.abs(b).max()


def test_devices_share_rows_and_heads():
    """The gradient of the table is the sum over the devices that share the rows."""
    arguments, gradient = inputs(13)
    expected = value_and_gradients(fused(buckets_of(12)), arguments, gradient)
    mesh = sharding.make_mesh(1, 2, jax.devices()[:4])
    with jax.set_mesh(mesh):
        results = value_and_gradients(fused(buckets_of(12)), arguments, gradient)
    assert results[0].addressable_shards[0].data.shape == (1, 13, 1, 4)
    for a, b in zip(results, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_a_block_pads_a_clip_least():
    assert [block_size(length) for length in (9, 137, 262, 512, 762)] == [128, 256, 128, 256, 256]
