"""The conformer against NumPy code written from the paper, with the same weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
import scipy.special
from flax import linen as nn

from musicrl_jax.models import conformer
from musicrl_jax.models.layers import stacked, unstacked

CONFIG = conformer.ConformerConfig(layers=2, heads=2, embed=8, mlp=24, kernel=5)


def _norm(p, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def _dense(p, x):
    return x @ p["kernel"] + p["bias"]


def _swish(x):
    return x * scipy.special.expit(x)


def _feed_forward(p, x):
    return _dense(p["down"], _swish(_dense(p["up"], _norm(p["norm"], x))))


def _turn(x):
    """Rotates x [S, A]: pairs (a, a + A/2) are complex numbers."""
    half = x.shape[1] // 2
    angle = np.arange(len(x))[:, None] / 10_000.0 ** (np.arange(half) / half)
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], 1)


def _attention(p, x, heads):
    x = _norm(p["norm"], x)
    query, key, value = (
        np.split(_dense(p[name], x), heads, axis=1) for name in ("query", "key", "value")
    )
    mixed = []
    for q, k, v in zip(query, key, value, strict=True):
        scores = _turn(q) @ _turn(k).T / np.sqrt(q.shape[1])
        mixed.append(scipy.special.softmax(scores, axis=1) @ v)
    return _dense(p["out"], np.concatenate(mixed, 1))


def _convolution(p, x):
    x = _dense(p["up"], _norm(p["norm"], x))
    x = x[:, :8] * scipy.special.expit(x[:, 8:])
    x = np.stack(
        [scipy.signal.correlate(x[:, d], p["depthwise"][:, d], mode="same") for d in range(8)], 1
    )
    return _dense(p["down"], _swish(_norm(p["middle_norm"], x)))


def _block(p, x):
    x = x + _feed_forward(p["first"], x) / 2
    x = x + _attention(p["attention"], x, heads=2)
    x = x + _convolution(p["convolution"], x)
    x = x + _feed_forward(p["second"], x) / 2
    return _norm(p["norm"], x)


@pytest.fixture(scope="module")
def model():
    """Returns the module, weights without zeros or ones, and an input [3, 11, 8]."""
    module = conformer.Conformer(CONFIG)
    x = jax.random.normal(jax.random.key(1), (3, 11, 8))
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), x))["params"]
    rng = np.random.default_rng(2)
    params = jax.tree.map(
        lambda a: np.asarray(a) + 0.3 * rng.normal(size=a.shape).astype(np.float32), params
    )
    return jax.jit(module.apply, static_argnames="layers"), params, x


def test_the_conformer_equals_numpys(model):
    apply, params, x = model
    got = apply({"params": params}, x)
    one = apply({"params": params}, x, layers=1)
    wide = jax.tree.map(np.float64, params)
    for row in range(3):
        first = _block(wide["block_0"], np.float64(x[row]))
        np.testing.assert_allclose(one[row], first, atol=2e-5)
        np.testing.assert_allclose(got[row], _block(wide["block_1"], first), atol=5e-5)


def test_stacked_layers_are_one_scan_with_the_same_result_and_gradient(model):
    """A block is in the program once."""
    apply, params, x = model
    together = stacked(params)
    assert list(together) == ["layers"]
    assert together["layers"]["first"]["up"]["kernel"].shape == (2, 8, 24)
    for layers in (None, 1):

        def mean_square(params, layers=layers):
            return jnp.square(apply({"params": params}, x, layers=layers)).mean()

        value, slope = jax.value_and_grad(mean_square)(params)
        stacked_value, slopes = jax.value_and_grad(mean_square)(together)
        np.testing.assert_allclose(stacked_value, value, rtol=1e-6)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), unstacked(slopes), slope
        )
    module = conformer.Conformer(CONFIG)
    programs = [
        str(jax.make_jaxpr(lambda p: module.apply({"params": p}, x))(tree))
        for tree in (params, together)
    ]
    with pytest.raises(ValueError, match="length"):
        conformer.Conformer(dataclasses.replace(CONFIG, layers=1)).apply({"params": together}, x)
    # There is one in each of a block's two feed-forwards.
    assert [program.count("optimization_barrier") for program in programs] == [4, 2]


def test_a_clip_does_not_depend_on_its_batch(model):
    apply, params, x = model
    together = apply({"params": params}, x)
    alone = apply({"params": params}, x[1:2])
    # Another batch size may sum in another order.
    np.testing.assert_allclose(together[1], alone[0], atol=1e-5)


def test_every_position_sees_both_directions(model):
    apply, params, x = model
    slope = jax.jit(jax.grad(lambda x: jnp.sum(apply({"params": params}, x, layers=1)[0, 5, 0])))(x)
    assert np.all(np.abs(slope[0]).max(axis=-1) > 0)
    assert np.all(np.asarray(slope[1:]) == 0)


def test_rotary_products_depend_on_distance_only():
    key = jax.random.split(jax.random.key(3))
    query, other = (jax.random.normal(k, (1, 6, 2, 8)) for k in key)
    at = jnp.arange(6)

    def products(shift):
        return jnp.einsum(
            "bqhd,bkhd->bhqk",
            conformer.rotary(query, at + shift),
            conformer.rotary(other, at + shift),
        )

    np.testing.assert_allclose(products(0), products(137), atol=2e-4)
    apart = jnp.einsum(
        "bqhd,bkhd->bhqk", conformer.rotary(query, at + 1), conformer.rotary(other, at)
    )
    assert np.abs(apart - products(0)).max() > 0.1
    lengths = jnp.linalg.norm(conformer.rotary(query, at), axis=-1)
    np.testing.assert_allclose(lengths, jnp.linalg.norm(query, axis=-1), rtol=1e-5)


def test_kernels_carry_logical_axes():
    variables = jax.eval_shape(
        conformer.Conformer(CONFIG).init, jax.random.key(0), jnp.zeros((1, 4, 8))
    )
    specs = nn.get_partition_spec(variables)["params"]["block_1"]
    assert tuple(specs["first"]["up"]["kernel"]) == ("embed", "mlp")
    assert tuple(specs["attention"]["query"]["kernel"]) == ("embed", "heads")
    assert tuple(specs["attention"]["out"]["kernel"]) == ("heads", "embed")
    assert tuple(specs["convolution"]["down"]["kernel"]) == ("mlp", "embed")


@pytest.mark.parametrize(
    ("change", "word"), [({"heads": 3}, "embed = 8"), ({"kernel": 4}, "kernel = 4")]
)
def test_bad_sizes_are_named(change, word):
    with pytest.raises(ValueError, match=word):
        conformer.ConformerConfig(**{"heads": 2, "embed": 8, "mlp": 8, "kernel": 3} | change)


def test_a_layer_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="layers = 3"):
        conformer.Conformer(CONFIG).init(jax.random.key(0), jnp.zeros((1, 4, 8)), layers=3)
