"""The policy's network: layers apart, stacked, in blocks and side by side compute the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta

from musicrl_jax.core.precision import in_dtype
from musicrl_jax.losses.optimiser import Optimiser, apply_gradients
from musicrl_jax.models import layers, transformer
from musicrl_jax.models.musiclm import MusicLM, MusicLMConfig
from musicrl_jax.models.tokens import TokenLayout
from musicrl_jax.models.transformer import TransformerConfig, relative_bucket

CONFIG = MusicLMConfig(
    TransformerConfig(2, 24, 2, 32, dropout=0.1, relative_buckets=8, relative_distance=16),
    TransformerConfig(2, 16, 2, 24, dropout=0.1),
    TokenLayout(semantic_codes=5, acoustic_codes=7, coarse_levels=2),
    mulan_levels=3,
    mulan_codes=4,
)
BATCH, FRAMES, DEPTH = 3, 20, 5


@pytest.fixture(scope="module")
def model():
    module = MusicLM(CONFIG)
    tokens = jnp.zeros((1, FRAMES, DEPTH), jnp.int32)
    return module, meta.unbox(module.init(jax.random.key(0), tokens, jnp.zeros((1, 3), jnp.int32)))[
        "params"
    ]


@pytest.fixture(scope="module")
def clips():
    """MuLan tokens and tokens of clips."""
    rng = np.random.default_rng(1)
    mulan = jnp.asarray(rng.integers(0, 4, (BATCH, 3)), jnp.int32)
    return mulan, jnp.asarray(rng.integers(0, [5, 7, 7, 7, 7], (BATCH, FRAMES, DEPTH)), jnp.int32)


def test_remat_changes_neither_the_weights_nor_the_gradient(model, clips):
    module, params = model
    mulan, tokens = clips
    again = MusicLM(CONFIG, remat=True)
    born = meta.unbox(again.init(jax.random.key(0), tokens, mulan))["params"]
    jax.tree.map(np.testing.assert_array_equal, born, params)

    def slope(module):
        loss = lambda p: jnp.square(module.apply({"params": p}, tokens, mulan)[..., :5]).mean()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    with jax.default_matmul_precision("highest"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), slope(module), slope(again)
        )
    rngs = {"dropout": jax.random.key(5)}
    one, other, plain = (
        again.apply({"params": params}, tokens, mulan, deterministic=still, rngs=rngs)
        for still in (False, False, True)
    )
    np.testing.assert_array_equal(one, other)
    assert np.abs(np.asarray(one - plain)[..., :5]).max() > 0.01  # dropout drops


@pytest.mark.parametrize("remat", [False, True])
def test_stacked_layers_are_the_same_weights_with_the_same_gradient(model, clips, remat):
    """They are one loop: a block stands once in the program."""
    plain, params = model
    mulan, tokens = clips
    together = layers.stacked(params)
    jax.tree.map(np.testing.assert_array_equal, layers.unstacked(together), params)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(together["trunk"]["temporal"]["layers"])} == {
        2
    }
    assert len(jax.tree.leaves(together)) < len(jax.tree.leaves(params))

    def slope(module, params):
        loss = lambda p: jnp.square(module.apply({"params": p}, tokens, mulan)[..., :5]).mean()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    with jax.default_matmul_precision("highest"):
        loss, gradient = slope(plain, params)
        found_loss, found = slope(MusicLM(CONFIG, remat), together)
    np.testing.assert_allclose(found_loss, loss, atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), layers.unstacked(found), gradient
    )
    program = str(
        jax.make_jaxpr(lambda p: MusicLM(CONFIG, remat).apply({"params": p}, tokens, mulan))(
            together
        )
    )
    assert program.count("tanh") == 2  # of gelu; temporal and depth have two layers each


def test_stacked_layers_lie_on_a_mesh_as_each_of_them_does(model, clips):
    """No rule splits the new axis, and names come back as they were."""
    mulan, tokens = clips
    boxed = jax.eval_shape(MusicLM(CONFIG).init, jax.random.key(0), tokens, mulan)["params"]
    names = jax.tree.map(
        lambda box: box.names, boxed, is_leaf=lambda x: isinstance(x, meta.AxisMetadata)
    )
    together = jax.eval_shape(layers.stacked, boxed)
    assert together["trunk"]["depth"]["layers"]["gate"].names == (
        None,
        *names["trunk"]["depth"]["block_1"]["gate"],
    )
    assert together["trunk"]["depth"]["relative"].names == names["trunk"]["depth"]["relative"]
    back = jax.eval_shape(layers.unstacked, together)
    assert (
        jax.tree.map(
            lambda box: box.names, back, is_leaf=lambda x: isinstance(x, meta.AxisMetadata)
        )
        == names
    )


def test_stacked_layers_are_cast_and_decayed_as_each_of_them_is(model):
    """What tells a scale from a matrix is the axes of one layer."""
    params = model[1]
    together = layers.stacked(params)
    dtypes = jax.tree.map(lambda x: x.dtype, layers.unstacked(in_dtype(together, "bfloat16")))
    assert dtypes == jax.tree.map(lambda x: x.dtype, in_dtype(params, "bfloat16"))
    assert len(set(jax.tree.leaves(dtypes))) == 2
    transform = Optimiser(0.1, warmup_steps=0, weight_decay=0.5).build(2)
    nothing = jax.tree.map(jnp.zeros_like, params)
    apart = apply_gradients(transform, nothing, transform.init(params), params)[0]
    found = apply_gradients(transform, layers.stacked(nothing), transform.init(together), together)[0]
    jax.tree.map(np.testing.assert_array_equal, layers.unstacked(found), apart)
    still = jax.tree.map(lambda a, b: bool((a == b).all()), apart, params)["trunk"]["depth"][
        "block_0"
    ]
    assert still["mlp_norm"] and not still["gate"]


@pytest.mark.parametrize("remat", [False, True])
def test_frames_side_by_side_and_blocks_of_queries_change_neither_logits_nor_gradients(
    model, clips, remat, monkeypatch
):
    """As TPUs do it: four frames of five codes together in 24 lanes, 23 positions of a clip in blocks of 21 and 2."""
    plain, params = model
    mulan, tokens = clips
    blocks = MusicLM(CONFIG, remat, lanes=24)
    monkeypatch.setattr(transformer, "QUERY_BLOCK", 21)

    def logits(module, params, tokens):
        return module.apply({"params": params}, tokens, mulan)

    def slope(module):
        loss = lambda p: jnp.square(logits(module, p, tokens)[..., :5]).mean()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    products = str(jax.make_jaxpr(lambda: logits(blocks, params, tokens))())
    assert f"{BATCH * FRAMES // 4},2,20,20" in products and f"{BATCH},2,2,23" in products
    with jax.default_matmul_precision("highest"):
        found = slope(blocks)
        monkeypatch.setattr(transformer, "QUERY_BLOCK", 256)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, slope(plain))
        # What stands beside a frame is not seen at all: a code that changes in one leaves the others as they are.
        changed = tokens.at[:, -1, 0].set((tokens[:, -1, 0] + 1) % 5)
        np.testing.assert_array_equal(
            *(logits(blocks, params, t)[:, : FRAMES - 1] for t in (tokens, changed))
        )


@pytest.mark.exactness(10)
def test_scoring_has_no_dropout(model, clips):
    module, params = model
    mulan, tokens = clips
    quiet = [
        module.apply({"params": params}, tokens, mulan, rngs={"dropout": jax.random.key(i)})
        for i in (0, 1)
    ]
    np.testing.assert_array_equal(*quiet)
    loud = [
        module.apply({"params": params}, tokens, mulan, False, rngs={"dropout": jax.random.key(i)})
        for i in (0, 1)
    ]
    assert np.abs(np.asarray(loud[0] - loud[1])).max() > 1e-3


def test_relative_buckets_are_t5s():
    """Exact below 16, logarithmic to 128, the last from there on: points computed by hand from arXiv 1910.10683."""
    distance = np.array([-3, 0, 1, 15, 16, 31, 32, 64, 127, 128, 10_000])
    np.testing.assert_array_equal(
        relative_bucket(distance, 32, 128), [0, 0, 1, 15, 16, 21, 21, 26, 31, 31, 31]
    )


def test_the_bias_is_what_a_lookup_finds_to_the_bit(model):
    """And its gradient is the sum over the places that looked an entry up."""
    module, params = model
    relative, length, heads = params["trunk"]["temporal"]["relative"], 21, CONFIG.temporal.heads

    def bias(relative):
        trunk = {
            **params["trunk"],
            "temporal": {**params["trunk"]["temporal"], "relative": relative},
        }
        return module.apply(
            {"params": {**params, "trunk": trunk}}, length - 3, method="temporal_bias"
        )

    distance = np.arange(length)[:, None] - np.arange(length)[None]
    bucket, past = relative_bucket(distance, 8, 16), distance >= 0
    expected = np.where(past[None], np.asarray(relative)[:, bucket], np.float32(transformer.NEVER))
    np.testing.assert_array_equal(bias(relative), expected)
    weight = np.random.default_rng(0).normal(size=(heads, length, length)).astype(np.float32)
    gradient = jax.grad(lambda relative: jnp.sum(bias(relative) * weight))(relative)
    summed = np.stack(
        [(weight * (past & (bucket == b))).sum(axis=(1, 2), dtype=np.float64) for b in range(8)],
        axis=1,
    )
    np.testing.assert_allclose(gradient, summed, rtol=1e-5, atol=1e-5)
