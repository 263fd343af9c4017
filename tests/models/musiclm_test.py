"""The policy's network: separate, stacked and packed layers compute the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_musiclm
from flax.linen import meta

from musicrl_jax.core.precision import in_dtype
from musicrl_jax.losses.optimiser import Optimiser, apply_gradients
from musicrl_jax.models import fused_attention, layers, transformer
from musicrl_jax.models.musiclm import MusicLM
from musicrl_jax.models.transformer import relative_bucket

CONFIG = tiny_musiclm.CONFIGS["policy"]
MODULE = MusicLM(CONFIG)
BATCH, FRAMES, DEPTH = 3, 20, 5


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, tiny_musiclm.model("policy").variables["params"])


@pytest.fixture(scope="module")
def clips():
    """Returns tokens and MuLan tokens."""
    rng = np.random.default_rng(1)
    mulan = jnp.asarray(rng.integers(0, 4, (BATCH, 3)), jnp.int32)
    return jnp.asarray(rng.integers(0, [5, 7, 7, 7, 7], (BATCH, FRAMES, DEPTH)), jnp.int32), mulan


def value_and_gradient(module, params, clips):
    def loss(params):
        logits = module.apply({"params": params}, *clips)
        return sum(jnp.square(place).mean() for place in logits) / len(logits)

    with jax.default_matmul_precision("highest"):
        return jax.jit(jax.value_and_grad(loss))(params)


@pytest.fixture(scope="module")
def expected(params, clips):
    """Returns the loss and gradient of separate layers."""
    return value_and_gradient(MODULE, params, clips)


def assert_close(*trees):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *trees)


def test_remat_changes_neither_initial_weights_nor_the_gradient(params, clips, expected):
    remat = MusicLM(CONFIG, remat=True)
    first, second = (jax.jit(module.init)(jax.random.key(0), *clips) for module in (MODULE, remat))
    jax.tree.map(np.testing.assert_array_equal, second, first)
    assert_close(value_and_gradient(remat, params, clips), expected)


def test_remat_recomputes_the_same_dropout(params, clips):
    apply = jax.jit(MusicLM(CONFIG, remat=True).apply, static_argnames="deterministic")
    rngs = {"dropout": jax.random.key(5)}
    first, second, plain = (
        apply({"params": params}, *clips, deterministic=deterministic, rngs=rngs)
        for deterministic in (False, False, True)
    )
    for place in range(DEPTH):
        np.testing.assert_array_equal(first[place], second[place])
        assert np.abs(np.asarray(first[place] - plain[place])).max() > 0.01


@pytest.mark.parametrize("remat", [False, True])
def test_stacked_layers_have_the_same_gradient(params, clips, expected, remat):
    """They are one scan: a block is in the program once."""
    stacked = layers.stacked(params)
    jax.tree.map(np.testing.assert_array_equal, layers.unstacked(stacked), params)
    blocks = jax.tree.leaves(stacked["trunk"]["temporal"]["layers"])
    assert {leaf.shape[0] for leaf in blocks} == {2}
    assert len(jax.tree.leaves(stacked)) < len(jax.tree.leaves(params))

    module = MusicLM(CONFIG, remat)
    loss, gradient = value_and_gradient(module, stacked, clips)
    assert_close((loss, layers.unstacked(gradient)), expected)
    program = str(jax.make_jaxpr(lambda p: module.apply({"params": p}, *clips))(stacked))
    assert program.count("tanh") == 2  # of gelu: one temporal, one depth block


def test_a_place_has_logits_of_its_own_codes_alone(params, clips):
    logits = MODULE.apply({"params": params}, *clips)
    assert [place.shape for place in logits] == [(BATCH, FRAMES, 5)] + [(BATCH, FRAMES, 7)] * 4


def test_joined_weights_compute_the_same(params, clips, expected):
    joined = layers.joined(params)
    block = joined["trunk"]["depth"]["block_0"]
    assert block["qkv"].shape == (16, 3, 2, 8) and block["gate_up"].shape == (16, 2, 24)
    assert not {"query", "key", "value", "gate", "up"} & set(block)
    assert_close(value_and_gradient(MODULE, joined, clips)[0], expected[0])
    boxed = jax.eval_shape(MODULE.init, jax.random.key(0), *clips)["params"]
    block = jax.eval_shape(layers.joined, boxed)["trunk"]["depth"]["block_0"]
    assert block["qkv"].names == ("embed", None, "heads", "kv")
    assert block["gate_up"].names == ("embed", None, "mlp")


def test_stacked_layers_keep_the_names_of_their_axes(clips):
    """No rule shards the new axis."""

    def names(boxed):
        return jax.tree.map(
            lambda box: box.names, boxed, is_leaf=lambda x: isinstance(x, meta.AxisMetadata)
        )

    boxed = jax.eval_shape(MODULE.init, jax.random.key(0), *clips)["params"]
    depth, stacked = names(boxed)["trunk"]["depth"], jax.eval_shape(layers.stacked, boxed)
    stacked_depth = stacked["trunk"]["depth"]
    assert stacked_depth["layers"]["gate"].names == (None, *depth["block_1"]["gate"])
    assert stacked_depth["relative"].names == depth["relative"]
    assert names(jax.eval_shape(layers.unstacked, stacked)) == names(boxed)


def test_stacked_layers_are_cast_and_decayed_as_separate_ones(params):
    """The axes of one layer decide whether a weight is a scale or a matrix."""
    params = params["trunk"]["depth"]
    stacked = layers.stacked(params)
    cast = [layers.unstacked(in_dtype(stacked, "bfloat16")), in_dtype(params, "bfloat16")]
    first, second = (jax.tree.map(lambda x: x.dtype, tree) for tree in cast)
    assert first == second and len(set(jax.tree.leaves(first))) == 2

    transform = Optimiser(0.1, warmup_steps=0, weight_decay=0.5).build(2)

    @jax.jit
    def decay(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return apply_gradients(transform, zeros, transform.init(params), params)[0]

    separate = decay(params)
    jax.tree.map(np.testing.assert_array_equal, layers.unstacked(decay(stacked)), separate)
    before, after = params["block_0"], separate["block_0"]
    np.testing.assert_array_equal(before["mlp_norm"], after["mlp_norm"])
    assert (before["gate"] != after["gate"]).any()


@pytest.mark.parametrize("remat", [False, True])
def test_joined_frames_and_blocks_of_queries_change_nothing(
    params, clips, expected, remat, monkeypatch
):
    """As on TPUs: four frames of five codes in 24 lanes, 23 positions in blocks of 21 and 2."""
    module = MusicLM(CONFIG, remat, lanes=24)
    monkeypatch.setattr(transformer, "QUERY_BLOCK", 21)
    logits = jax.jit(lambda tokens: module.apply({"params": params}, tokens, clips[1]))
    products = str(jax.make_jaxpr(logits)(clips[0]))
    assert f"{BATCH * FRAMES // 4},2,20,20" in products and f"{BATCH},2,2,23" in products
    assert_close(value_and_gradient(module, params, clips), expected)

    # Joined frames do not see each other: a code changed in the last leaves the others' logits.
    tokens = clips[0]
    changed = tokens.at[:, -1, 0].set((tokens[:, -1, 0] + 1) % 5)
    for before, after in zip(logits(tokens), logits(changed), strict=True):
        np.testing.assert_array_equal(before[:, : FRAMES - 1], after[:, : FRAMES - 1])


def test_the_fused_kernel_changes_no_logits(params, clips, monkeypatch):
    """As on TPUs, but emulated: 23 positions in blocks of 8, of which three have a bias."""
    block, calls = 8, []

    def emulate(*arguments):
        calls.append([x.shape for x in arguments])
        return fused_attention.fused_attention(*arguments, interpret=True)

    monkeypatch.setattr(transformer, "fused_attention", emulate)
    monkeypatch.setattr(fused_attention, "BLOCKS", (block,))
    module = MusicLM(CONFIG, remat=True, fused=True)
    with jax.default_matmul_precision("highest"):
        logits, expected = (
            jax.jit(each.apply)({"params": params}, *clips) for each in (module, MODULE)
        )
    assert_close(logits, expected)
    # The temporal transformer uses it, all layers in one loop; a frame's five codes do not.
    ((query, _, _, diagonals),) = calls
    assert query[2] == 3 + FRAMES and diagonals[2] == 2 * block


@pytest.mark.exactness(10)
def test_scoring_has_no_dropout(params, clips):
    @jax.jit
    def logits(key):
        arguments, rngs = ({"params": params}, *clips), {"dropout": key}
        return MODULE.apply(*arguments, rngs=rngs), MODULE.apply(*arguments, False, rngs=rngs)

    (scored, trained), (scored_again, trained_again) = (logits(jax.random.key(i)) for i in (0, 1))
    for place in range(DEPTH):
        np.testing.assert_array_equal(scored[place], scored_again[place])
        assert np.abs(np.asarray(trained[place] - trained_again[place])).max() > 1e-3


def test_relative_buckets_are_t5s():
    """Points computed by hand from arXiv 1910.10683: exact below 16, then logarithmic to 128."""
    distance = np.array([-3, 0, 1, 15, 16, 31, 32, 64, 127, 128, 10_000])
    expected = [0, 0, 1, 15, 16, 21, 21, 26, 31, 31, 31]
    np.testing.assert_array_equal(relative_bucket(distance, 32, 128), expected)


def test_the_bias_equals_a_lookup_to_the_bit(params):
    """Its gradient is the sum over all uses of an entry."""
    trunk = params["trunk"]
    relative, length, heads = trunk["temporal"]["relative"], 21, CONFIG.temporal.heads

    def bias(relative):
        tree = params | {"trunk": trunk | {"temporal": trunk["temporal"] | {"relative": relative}}}
        return MODULE.apply({"params": tree}, length - 3, method="temporal_bias")

    distance = np.arange(length)[:, None] - np.arange(length)[None]
    bucket, past = relative_bucket(distance, 8, 16), distance >= 0
    expected = np.where(past[None], np.asarray(relative)[:, bucket], np.float32(transformer.NEVER))
    np.testing.assert_array_equal(bias(relative), expected)

    weight = np.random.default_rng(0).normal(size=(heads, length, length)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda relative: jnp.sum(bias(relative) * weight)))(relative)
    sums = []
    for number in range(8):
        sums.append((weight * (past & (bucket == number))).sum(axis=(1, 2), dtype=np.float64))
    np.testing.assert_allclose(gradient, np.stack(sums, axis=1), rtol=1e-5, atol=1e-5)
