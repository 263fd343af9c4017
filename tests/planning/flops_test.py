"""Compares counts with closed forms, and with XLA's count of programs without loops."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from musicrl_jax.models.fused_attention import fused_attention
from musicrl_jax.models.transformer import Transformer, TransformerConfig
from musicrl_jax.planning.flops import Flops, flops


def count_of(function, *shapes) -> Flops:
    """Counts a function of float32 arrays."""
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return flops(jax.jit(function).trace(*arrays).jaxpr)


def by_xla(function, *shapes) -> float:
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arrays).cost_analysis()["flops"]


def mlp(weights, x):
    for w in weights:
        x = jnp.tanh(x @ w)
    return jnp.sum(x)


WIDTHS = (11, 7, 5, 3)
WEIGHTS = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in itertools.pairwise(WIDTHS)]
INPUT = jax.ShapeDtypeStruct((13, WIDTHS[0]), jnp.float32)
PRODUCTS = [2 * 13 * a * b for a, b in itertools.pairwise(WIDTHS)]


# --- products ---


def test_a_matmul_counts_apart_from_elementwise_operations():
    assert count_of(lambda x, w: jnp.tanh(x @ w) + 1.0, (3, 5), (5, 7)) == Flops(
        2 * 3 * 5 * 7, 2 * 3 * 7
    )


def test_a_batched_einsum_counts_both_contracted_axes():
    assert count_of(
        lambda x, w: jnp.einsum("bsde,bdef->bsf", x, w), (2, 3, 5, 7), (2, 5, 7, 11)
    ).matmul == (2 * 2 * 3 * 11 * 5 * 7)


@pytest.mark.parametrize(
    ("stride", "dilation", "groups"), [(1, 1, 1), (3, 1, 1), (1, 4, 1), (2, 3, 4)]
)
def test_a_convolution_counts_its_windows(stride, dilation, groups):
    x, w = (2, 50, 8), (5, 8 // groups, 12)

    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x,
            w,
            (stride,),
            "SAME",
            rhs_dilation=(dilation,),
            feature_group_count=groups,
            dimension_numbers=("NHC", "HIO", "NHC"),
        )

    expected = 2 * 2 * math.ceil(50 / stride) * 12 * 5 * (8 // groups)
    assert count_of(convolve, x, w).matmul == expected
    gradient = count_of(lambda x, w: jax.grad(lambda x: jnp.sum(convolve(x, w)))(x), x, w).matmul
    # The gradient visits the same pairs of output and tap, except for taps on padding.
    assert gradient == pytest.approx(expected, rel=0.15)


def test_a_valid_convolution_counts_as_in_xla():
    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (2, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    shapes = (2, 16, 9, 4), (3, 3, 4, 6)
    assert count_of(convolve, *shapes) == Flops(int(by_xla(convolve, *shapes)))


# --- control flow and derivatives ---


def test_a_scan_counts_once_for_each_round():
    def inner(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    def outer(x, w):
        return jax.lax.scan(lambda x, _: (inner(x, w), None), x, length=3)[0]

    once = 2 * 3 * 5 * 5
    assert count_of(inner, (3, 5), (24, 5, 5)).matmul == 24 * once
    assert count_of(outer, (3, 5), (24, 5, 5)).matmul == 3 * 24 * once


def test_a_gradient_adds_two_forward_passes_except_for_the_input():
    count = flops(jax.jit(jax.grad(mlp)).trace(WEIGHTS, INPUT).jaxpr)
    assert count.matmul == 3 * sum(PRODUCTS) - PRODUCTS[0]
    assert flops(jax.jit(mlp).trace(WEIGHTS, INPUT).jaxpr).matmul == sum(PRODUCTS)


def test_a_checkpointed_function_counts_its_recomputation():
    count = flops(jax.jit(jax.value_and_grad(jax.checkpoint(mlp))).trace(WEIGHTS, INPUT).jaxpr)
    assert count.matmul == 4 * sum(PRODUCTS) - PRODUCTS[0]


def test_unused_results_do_not_count():
    once = 2 * 3 * 5 * 7
    assert count_of(lambda x, w: (x @ w, x)[1], (3, 5), (5, 7)).matmul == 0
    assert (
        count_of(lambda x, w: jax.grad(lambda x: jnp.sum(x @ w))(x), (3, 5), (5, 7)).matmul == once
    )


def test_a_vmap_counts_each_row():
    batch = [jax.ShapeDtypeStruct((6, *w.shape), w.dtype) for w in WEIGHTS]
    assert flops(jax.jit(jax.vmap(mlp, (0, None))).trace(batch, INPUT).jaxpr).matmul == 6 * sum(
        PRODUCTS
    )


def test_custom_derivatives_count():
    @jax.custom_vjp
    def square(x):
        return x @ x

    square.defvjp(lambda x: (square(x), x), lambda x, g: (g @ x.T @ x,))
    once = 2 * 5**3
    assert count_of(square, (5, 5)).matmul == once
    assert count_of(jax.value_and_grad(lambda x: jnp.sum(square(x))), (5, 5)).matmul == 3 * once


def test_a_cond_counts_its_most_expensive_branch():
    def choose(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x + 1, x)

    assert count_of(choose, (5, 5)) == Flops(2 * 5**3, 0)


def test_a_while_loop_counts_once():
    def loop(x):
        return jax.lax.while_loop(lambda s: jnp.sum(s) < 9.0, lambda s: s @ x, x)

    count = count_of(lambda x: loop(loop(x)), (5, 5))
    assert count == Flops(2 * 2 * 5**3, 2 * 25)


def test_a_shard_map_counts_every_device():
    mesh = Mesh(np.asarray(jax.devices()[:4]), ("data",))
    product = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")
    )
    assert count_of(product, (8, 5), (5, 7)).matmul == 2 * 8 * 5 * 7


def test_a_kernel_counts_what_its_author_says():
    """Of five positions in blocks of two, a product computes six blocks of scores."""
    length, width, block, rows, heads = 5, 8, 2, 3, 2
    arguments = [jax.ShapeDtypeStruct((rows, heads, length, width), jnp.float32)] * 3
    diagonals = jax.ShapeDtypeStruct((heads, 1, 2 * block), jnp.float32)
    loss = jax.grad(lambda *arrays: jnp.sum(fused_attention(*arrays)))
    count = flops(jax.jit(loss).trace(*arguments, diagonals).jaxpr)
    assert count.matmul == (2 + 5) * 2 * rows * heads * width * 6 * block**2


# --- all other operations ---


def test_reductions_moves_scatters_and_ffts_count_as_documented():
    assert count_of(jnp.sum, (3, 5)).other == 15
    assert count_of(lambda x: jnp.transpose(x)[1:, ::-1].astype(jnp.bfloat16), (3, 5)).other == 0
    assert count_of(lambda x, y: x.at[jnp.asarray([0, 1, 1])].add(y), (9, 5), (3, 5)).other == 15
    assert count_of(lambda x: jnp.arange(7) + 1, (3,)).other == 0
    assert count_of(lambda x: jnp.fft.rfft(x), (3, 64)).other == 3 * 2.5 * 64 * 6


def test_a_program_without_loops_counts_as_in_xla():
    """XLA counts transcendental functions apart, so the program has none."""

    def block(x, w, v):
        h = jnp.einsum("bsd,df->bsf", x, w)
        return jnp.sum(jnp.maximum(h, 0.0) @ v * 2.0)

    shapes = (4, 32, 64), (64, 256), (256, 64)
    for function in (block, jax.grad(block, (0, 1, 2))):
        count = count_of(function, *shapes)
        assert count.matmul + count.other == pytest.approx(by_xla(function, *shapes), rel=0.01)


def test_a_transformer_counts_six_for_each_weight_and_token_plus_attention():
    config = TransformerConfig(layers=3, embed=64, heads=4, mlp=256, dropout=0.0)
    model, batch, length = Transformer(config), 2, 24
    x = jax.ShapeDtypeStruct((batch, length, config.embed), jnp.float32)
    params = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), x))
    loss = jax.grad(lambda params, x: jnp.sum(model.apply(params, x)), (0, 1))
    weights = sum(math.prod(w.shape) for w in jax.tree.leaves(params["params"]) if w.ndim > 1)
    weights -= config.heads * config.relative_buckets
    attention = config.layers * 2 * 2 * batch * length**2 * config.embed
    # The position bias is looked up once for all layers; it has a gradient too.
    bias = 2 * config.heads * config.relative_buckets * length**2
    count = flops(jax.jit(loss).trace(params, x).jaxpr)
    assert count.matmul == 6 * weights * batch * length + 3 * attention + 2 * bias
