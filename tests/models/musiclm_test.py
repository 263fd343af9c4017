"""The policy: cached steps are the full forward pass, and no token sees itself or what comes after it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta

from musicrl_jax.core.keys import row_keys
from musicrl_jax.core.precision import in_dtype
from musicrl_jax.losses.optimiser import Optimiser, moved
from musicrl_jax.models.tokens import TokenLayout
from musicrl_jax.models import layers, transformer
from musicrl_jax.models.musiclm import MusicLM, MusicLMConfig, Value
from musicrl_jax.models.transformer import TransformerConfig, relative_bucket
from musicrl_jax.rl import sample as sampling

CONFIG = MusicLMConfig(
    TransformerConfig(2, 24, 2, 32, dropout=0.1, relative_buckets=8, relative_distance=16),
    TransformerConfig(2, 16, 2, 24, dropout=0.1),
    TokenLayout(semantic_codes=5, acoustic_codes=7, coarse_levels=2),
    mulan_levels=3,
    mulan_codes=4,
)
BATCH, FRAMES, DEPTH = 3, 20, 5
PLAIN = sampling.Sampling(1.0)


@pytest.fixture(scope="module")
def model():
    module = MusicLM(CONFIG)
    tokens = jnp.zeros((1, FRAMES, DEPTH), jnp.int32)
    return module, meta.unbox(module.init(jax.random.key(0), tokens, jnp.zeros((1, 3), jnp.int32)))["params"]


@pytest.fixture(scope="module")
def drawn(model):
    module, params = model
    mulan = jax.random.randint(jax.random.key(1), (BATCH, 3), 0, 4)
    draw = jax.jit(lambda p, m, k: sampling.sample(module, p, m, k, FRAMES, sampling.Sampling(0.9)))
    with jax.default_matmul_precision("highest"):
        tokens, log_probs, _ = draw(params, mulan, row_keys(jax.random.key(2), BATCH))
    return mulan, tokens, log_probs


@pytest.mark.exactness(8)
def test_cached_sampling_agrees_with_the_full_forward_pass(model, drawn):
    module, params = model
    mulan, tokens, log_probs = drawn
    with jax.default_matmul_precision("highest"):
        rescored = sampling.token_log_probs(
            sampling.log_probs(module, params, tokens, mulan, sampling.Sampling(0.9), None), tokens
        )
    assert np.abs(np.asarray(rescored - log_probs)).max() < 2e-5


def test_remat_changes_neither_the_weights_nor_the_gradient(model, drawn):
    module, params = model
    mulan, tokens, _ = drawn
    again = MusicLM(CONFIG, remat=True)
    born = meta.unbox(again.init(jax.random.key(0), tokens, mulan))["params"]
    jax.tree.map(np.testing.assert_array_equal, born, params)

    def slope(module):
        loss = lambda p: jnp.square(module.apply({"params": p}, tokens, mulan)[..., :5]).mean()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    with jax.default_matmul_precision("highest"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), slope(module), slope(again))
    rngs = {"dropout": jax.random.key(5)}
    one, other, plain = (
        again.apply({"params": params}, tokens, mulan, deterministic=still, rngs=rngs) for still in (False, False, True)
    )
    np.testing.assert_array_equal(one, other)
    assert np.abs(np.asarray(one - plain)[..., :5]).max() > 0.01  # dropout drops


@pytest.mark.parametrize("remat", [False, True])
def test_stacked_layers_are_the_same_weights_with_the_same_gradient(model, drawn, remat):
    """They are one loop: a block stands once in the program."""
    plain, params = model
    mulan, tokens, _ = drawn
    together = layers.stacked(params)
    jax.tree.map(np.testing.assert_array_equal, layers.unstacked(together), params)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(together["trunk"]["temporal"]["layers"])} == {2}
    assert len(jax.tree.leaves(together)) < len(jax.tree.leaves(params))

    def slope(module, params):
        loss = lambda p: jnp.square(module.apply({"params": p}, tokens, mulan)[..., :5]).mean()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    with jax.default_matmul_precision("highest"):
        loss, gradient = slope(plain, params)
        found_loss, found = slope(MusicLM(CONFIG, remat), together)
    np.testing.assert_allclose(found_loss, loss, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), layers.unstacked(found), gradient)
    program = str(jax.make_jaxpr(lambda p: MusicLM(CONFIG, remat).apply({"params": p}, tokens, mulan))(together))
    assert program.count("tanh") == 2  # of gelu; temporal and depth have two layers each


def test_stacked_layers_lie_on_a_mesh_as_each_of_them_does(model, drawn):
    """No rule splits the new axis, and names come back as they were."""
    mulan, tokens, _ = drawn
    boxed = jax.eval_shape(MusicLM(CONFIG).init, jax.random.key(0), tokens, mulan)["params"]
    names = jax.tree.map(lambda box: box.names, boxed, is_leaf=lambda x: isinstance(x, meta.AxisMetadata))
    together = jax.eval_shape(layers.stacked, boxed)
    assert together["trunk"]["depth"]["layers"]["gate"].names == (None, *names["trunk"]["depth"]["block_1"]["gate"])
    assert together["trunk"]["depth"]["relative"].names == names["trunk"]["depth"]["relative"]
    back = jax.eval_shape(layers.unstacked, together)
    assert jax.tree.map(lambda box: box.names, back, is_leaf=lambda x: isinstance(x, meta.AxisMetadata)) == names


def test_stacked_layers_are_cast_and_decayed_as_each_of_them_is(model):
    """What tells a scale from a matrix is the axes of one layer."""
    params = model[1]
    together = layers.stacked(params)
    dtypes = jax.tree.map(lambda x: x.dtype, layers.unstacked(in_dtype(together, "bfloat16")))
    assert dtypes == jax.tree.map(lambda x: x.dtype, in_dtype(params, "bfloat16"))
    assert len(set(jax.tree.leaves(dtypes))) == 2
    transform = Optimiser(0.1, warmup_steps=0, weight_decay=0.5).build(2)
    nothing = jax.tree.map(jnp.zeros_like, params)
    apart = moved(transform, nothing, transform.init(params), params)[0]
    found = moved(transform, layers.stacked(nothing), transform.init(together), together)[0]
    jax.tree.map(np.testing.assert_array_equal, layers.unstacked(found), apart)
    still = jax.tree.map(lambda a, b: bool((a == b).all()), apart, params)["trunk"]["depth"]["block_0"]
    assert still["mlp_norm"] and not still["gate"]


@pytest.mark.parametrize("remat", [False, True])
def test_frames_side_by_side_and_blocks_of_queries_change_neither_logits_nor_gradients(
    model, drawn, remat, monkeypatch
):
    """As TPUs do it: four frames of five codes together in 24 lanes, 23 positions of a clip in blocks of 21 and 2."""
    plain, params = model
    mulan, tokens, _ = drawn
    blocks = MusicLM(CONFIG, remat, lanes=24)
    monkeypatch.setattr(transformer, "QUERIES", 21)

    def logits(module, params, tokens):
        return module.apply({"params": params}, tokens, mulan)

    def slope(module):
        loss = lambda p: jnp.square(logits(module, p, tokens)[..., :5]).mean()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    products = str(jax.make_jaxpr(lambda: logits(blocks, params, tokens))())
    assert f"{BATCH * FRAMES // 4},2,20,20" in products and f"{BATCH},2,2,23" in products
    with jax.default_matmul_precision("highest"):
        found = slope(blocks)
        monkeypatch.setattr(transformer, "QUERIES", 256)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, slope(plain))
        # What stands beside a frame is not seen at all: a code that changes in one leaves the others as they are.
        changed = tokens.at[:, -1, 0].set((tokens[:, -1, 0] + 1) % 5)
        np.testing.assert_array_equal(*(logits(blocks, params, t)[:, : FRAMES - 1] for t in (tokens, changed)))


@pytest.mark.exactness(8)
@pytest.mark.parametrize("lanes", [12, 128])  # heads of 12 and 8: both at once in depth alone, in both
def test_heads_side_by_side_draw_the_same(model, drawn, lanes):
    """As TPUs do it: the same tokens, and log-probs to float32's last digits."""
    module, params = MusicLM(CONFIG, lanes=lanes), model[1]
    mulan, tokens, log_probs = drawn
    draw = jax.jit(lambda p, m, k: sampling.sample(module, p, m, k, FRAMES, sampling.Sampling(0.9)))
    with jax.default_matmul_precision("highest"):
        found = draw(params, mulan, row_keys(jax.random.key(2), BATCH))
    np.testing.assert_array_equal(found.tokens, tokens)
    np.testing.assert_allclose(found.log_probs, log_probs, atol=1e-5)
    cache = jax.eval_shape(lambda p: module.apply({"params": p}, 1, method="empty_depth_cache"), params)
    assert cache[0][0].shape == (1, 1, DEPTH, 16)


@pytest.mark.exactness(8)
@pytest.mark.parametrize("top_k", [None, 3])
def test_cached_sampling_agrees_to_the_last_digits_in_float64(model, drawn, top_k):
    module, params = model
    with jax.enable_x64(True):
        params = jax.tree.map(lambda w: w.astype(jnp.float64), params)
        keys = row_keys(jax.random.key(2), BATCH)
        how = sampling.Sampling(0.9, top_k)
        tokens, log_probs, allowed = sampling.sample(module, params, drawn[0], keys, FRAMES, how)
        assert (allowed is None) == (top_k is None) and (top_k is None or (allowed.sum(axis=-1) == top_k).all())
        scored = sampling.log_probs(module, params, tokens, drawn[0], how, allowed)
        rescored = sampling.token_log_probs(scored, tokens)
        assert rescored.dtype == jnp.float64
        assert np.abs(np.asarray(rescored - log_probs)).max() < 1e-10


def test_only_codes_that_exist_are_drawn(drawn):
    tokens = np.asarray(drawn[1])
    assert tokens.min() >= 0 and tokens[:, :, 0].max() < 5 and tokens[:, :, 1:].max() < 7
    assert len(np.unique(tokens[:, :, 1:])) == 7


def test_samples_follow_the_tempered_distribution(model):
    """The first code of many clips: counts against the probabilities of the full forward pass, by chi-square."""
    module, params = model
    mulan = jnp.ones((4000, 3), jnp.int32)
    keys = row_keys(jax.random.key(5), 4000)
    cold = sampling.Sampling(0.7)
    tokens = jax.jit(lambda p, m, k: sampling.sample(module, p, m, k, 1, cold))(params, mulan, keys).tokens
    probabilities = np.exp(np.asarray(sampling.log_probs(module, params, tokens[:1], mulan[:1], cold, None)))[0, 0, 0]
    counts = np.bincount(np.asarray(tokens)[:, 0, 0], minlength=7)
    expected = 4000 * probabilities
    assert np.square(counts[:5] - expected[:5]).sum() < 30 * expected.max()
    chi_square = (np.square(counts[:5] - expected[:5]) / expected[:5]).sum()
    assert chi_square < 18.5  # the 99.9 % point with 4 degrees of freedom


@pytest.mark.exactness(11)
def test_a_row_does_not_depend_on_its_batch(model, drawn):
    module, params = model
    mulan, tokens, _ = drawn
    keys = row_keys(jax.random.key(2), BATCH)[1:2]
    draw = jax.jit(lambda p, m, k: sampling.sample(module, p, m, k, FRAMES, sampling.Sampling(0.9)))
    np.testing.assert_array_equal(draw(params, mulan[1:2], keys).tokens[0], tokens[1])


def test_logits_and_values_see_the_past_alone(model, drawn):
    """A changed token at (f, k) moves no logit and no value at or before (f, k), and moves some after it."""
    module, params = model
    mulan, tokens, _ = drawn
    critic = Value(CONFIG)
    weights = meta.unbox(critic.init(jax.random.key(3), tokens, mulan))["params"]
    weights = {**weights, "head": jax.random.normal(jax.random.key(4), weights["head"].shape)}
    for f, k in ((0, 0), (0, 4), (7, 2), (FRAMES - 1, 3)):
        changed = tokens.at[0, f, k].set((tokens[0, f, k] + 1) % 5)
        for score in (
            lambda t: sampling.log_probs(module, params, t, mulan, PLAIN, None),
            lambda t: sampling.values(critic, weights, t, mulan),
        ):
            before, after = (np.asarray(score(t))[0].reshape(FRAMES * DEPTH, -1) for t in (tokens, changed))
            place = f * DEPTH + k
            np.testing.assert_array_equal(before[: place + 1], after[: place + 1])
            if place + 1 < FRAMES * DEPTH:
                assert np.abs(before[place + 1 :] - after[place + 1 :]).max() > 1e-4


def test_prompt_moves_the_first_frame(model, drawn):
    module, params = model
    mulan, tokens, _ = drawn
    one = sampling.log_probs(module, params, tokens, mulan, PLAIN, None)
    other = sampling.log_probs(module, params, tokens, (mulan + 1) % 4, PLAIN, None)
    assert np.abs(np.asarray(one - other))[:, 0, 0, :5].max() > 1e-3


@pytest.mark.exactness(19)
def test_joint_of_a_tiny_clip_sums_to_one(model):
    """All 5 x 7^4 clips of one frame, enumerated: the chain of conditionals is a distribution."""
    module, params = model
    grids = np.meshgrid(*[np.arange(n) for n in (5, 7, 7, 7, 7)], indexing="ij")
    tokens = jnp.asarray(np.stack([grid.ravel() for grid in grids], axis=1)[:, None, :], jnp.int32)
    mulan = jnp.zeros((len(tokens), 3), jnp.int32)
    scored = sampling.log_probs(module, params, tokens, mulan, sampling.Sampling(1.3), None)
    joint = sampling.token_log_probs(scored, tokens).sum(axis=(1, 2))
    np.testing.assert_allclose(np.exp(np.asarray(joint, np.float64)).sum(), 1.0, atol=1e-4)


@pytest.mark.exactness(10)
def test_scoring_has_no_dropout(model, drawn):
    module, params = model
    mulan, tokens, _ = drawn
    quiet = [module.apply({"params": params}, tokens, mulan, rngs={"dropout": jax.random.key(i)}) for i in (0, 1)]
    np.testing.assert_array_equal(*quiet)
    loud = [module.apply({"params": params}, tokens, mulan, False, rngs={"dropout": jax.random.key(i)}) for i in (0, 1)]
    assert np.abs(np.asarray(loud[0] - loud[1])).max() > 1e-3


def test_relative_buckets_are_t5s():
    """Exact below 16, logarithmic to 128, the last from there on: points computed by hand from arXiv 1910.10683."""
    distance = np.array([-3, 0, 1, 15, 16, 31, 32, 64, 127, 128, 10_000])
    np.testing.assert_array_equal(relative_bucket(distance, 32, 128), [0, 0, 1, 15, 16, 21, 21, 26, 31, 31, 31])


def test_the_bias_is_what_a_lookup_finds_to_the_bit(model):
    """And its gradient is the sum over the places that looked an entry up."""
    module, params = model
    relative, length, heads = params["trunk"]["temporal"]["relative"], 21, CONFIG.temporal.heads

    def bias(relative):
        trunk = {**params["trunk"], "temporal": {**params["trunk"]["temporal"], "relative": relative}}
        return module.apply({"params": {**params, "trunk": trunk}}, length - 3, method="temporal_bias")

    distance = np.arange(length)[:, None] - np.arange(length)[None]
    bucket, past = relative_bucket(distance, 8, 16), distance >= 0
    expected = np.where(past[None], np.asarray(relative)[:, bucket], np.float32(transformer.NEVER))
    np.testing.assert_array_equal(bias(relative), expected)
    weight = np.random.default_rng(0).normal(size=(heads, length, length)).astype(np.float32)
    gradient = jax.grad(lambda relative: jnp.sum(bias(relative) * weight))(relative)
    summed = np.stack([(weight * (past & (bucket == b))).sum(axis=(1, 2), dtype=np.float64) for b in range(8)], axis=1)
    np.testing.assert_allclose(gradient, summed, rtol=1e-5, atol=1e-5)


@pytest.mark.exactness(9)
def test_bfloat16_moves_log_probs_little(model, drawn):
    """Activations and what is multiplied in bfloat16; norms and softmax are in float32 even so."""
    module, params = model
    mulan, tokens, _ = drawn
    half = in_dtype(params, "bfloat16")
    exact, rough = (sampling.log_probs(module, weights, tokens, mulan, PLAIN, None) for weights in (params, half))
    hidden = module.apply({"params": half}, tokens, mulan, method=lambda module, *given: module.trunk.hidden(*given))
    assert hidden.dtype == jnp.bfloat16
    assert rough.dtype == jnp.float32
    gap = sampling.token_log_probs(rough, tokens) - sampling.token_log_probs(exact, tokens)
    assert 0 < float(jnp.sqrt(jnp.mean(jnp.square(gap)))) < 0.03
