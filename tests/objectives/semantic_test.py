"""Training the semantic encoder: what it learns, what stays frozen, and k-means afterwards."""

import contextlib
import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from flax import linen as nn

from musicrl_jax.core import sharding
from musicrl_jax.models import conformer, rvq
from musicrl_jax.models.semantic import SemanticConfig, SemanticEncoder, draw_mask
from musicrl_jax.objectives.semantic import SemanticObjective

CONFIG = SemanticConfig(
    sample_rate_hz=16_000,
    mels=16,
    encoder=conformer.ConformerConfig(layers=1, heads=2, embed=16, mlp=32, kernel=3),
    layer=1,
    targets=16,
    codes=4,
)
apply = jax.jit(SemanticEncoder(CONFIG).apply, static_argnames="method")


def tones(clips: int) -> np.ndarray:
    """Returns half-second notes of two pitches in turn, [clips, 16000]."""
    time = np.arange(16_000) / 16_000
    rng = np.random.default_rng(0)
    pitch = rng.choice([300.0, 900.0, 2700.0], size=(clips, 2))
    hz = np.where(time[None] < 0.5, pitch[:, :1], pitch[:, 1:])
    wav = 0.3 * np.sin(2 * np.pi * hz * time) + 0.01 * rng.normal(size=(clips, 16_000))
    return wav.astype(np.float32)


class Tones:
    """Eight clips in batches of four."""

    def batches(self, split, batch_size, seed, start_step=0, epochs=None):
        wav = tones(8)
        return iter([{"audio": wav[:4]}, {"audio": wav[4:]}])

    def count(self, split):
        return 8


OBJECTIVE = SemanticObjective(CONFIG, Tones())
loss_of = jax.jit(OBJECTIVE.loss)


def split(variables):
    """Returns (params, the other collections)."""
    state = dict(variables)
    return state.pop("params"), state


# --- training ---


@pytest.fixture(scope="module")
def trained():
    """Returns (variables before, variables after 60 steps, first and last metrics)."""
    batch = {"audio": jnp.asarray(tones(4))}
    before = nn.unbox(jax.jit(OBJECTIVE.init)(jax.random.key(0), batch))
    params, state = split(before)

    @jax.jit
    def step(params, state, key):
        gradient = jax.value_and_grad(OBJECTIVE.loss, has_aux=True)
        (_, (state, metrics)), slope = gradient(params, state, {}, batch, key)
        norm = optax.tree.norm(slope)
        return jax.tree.map(lambda p, g: p - 0.1 * g / norm, params, slope), state, metrics

    history = []
    for index in range(60):
        params, state, metrics = step(params, state, jax.random.key(index))
        history.append(metrics)
    return before, {"params": params, **state}, history[0], history[-1]


def test_training_lowers_the_loss_and_leaves_the_quantizer_alone(trained):
    before, after, first, last = trained
    assert last["loss"] < 0.9 * first["loss"]
    assert last["accuracy"] > first["accuracy"]
    for collection in ("quantizer", "statistics", "kmeans"):
        jax.tree.map(np.testing.assert_array_equal, before[collection], after[collection])
    assert set(before) == {"params", "quantizer", "statistics", "kmeans"}


def test_statistics_are_those_of_the_first_batch(trained):
    statistics = trained[0]["statistics"]
    mels = apply(trained[0], tones(4), method=SemanticEncoder.log_mels)
    np.testing.assert_allclose(statistics["mean"], np.mean(mels, axis=(0, 1)), atol=1e-5)
    std = np.maximum(np.std(mels, axis=(0, 1)), 0.1)
    np.testing.assert_allclose(statistics["std"], std, rtol=1e-4)


def test_loss_counts_masked_frames_only(trained):
    key, wav = jax.random.key(9), jnp.asarray(tones(4))
    loss, (_, metrics) = loss_of(*split(trained[0]), {}, {"audio": wav}, key)
    mask_key, noise_key = jax.random.split(key)
    mask = np.asarray(draw_mask(mask_key, 4, 25))
    logits, targets = apply(trained[0], wav, mask, jax.random.normal(noise_key, (4, 25, 64)))
    logits, targets = np.float64(logits), np.asarray(targets)
    own = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    nats = np.log(np.exp(logits).sum(-1)) - own
    correct = logits.argmax(-1) == targets
    np.testing.assert_allclose(loss, nats[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], correct[mask].mean(), rtol=1e-5)


# --- k-means ---


@pytest.fixture(scope="module")
def finished(trained):
    """Returns the variables after k-means, and the printed text."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        done = OBJECTIVE.finish(trained[1], {}, lambda: Tones().batches("train", 4, 0, epochs=1))
    return done, printed.getvalue()


def test_finish_clusters_standardised_features(finished):
    done, printed = finished
    features = np.asarray(apply(done, tones(8), method=SemanticEncoder.features)).reshape(-1, 16)
    fit = done["kmeans"]
    np.testing.assert_allclose(fit["mean"], features.mean(0), atol=1e-4)
    np.testing.assert_allclose(fit["std"], features.std(0), rtol=1e-3, atol=1e-4)
    tokens = np.asarray(apply(done, tones(8), method=SemanticEncoder.tokens)).reshape(-1)
    assert set(tokens) == {0, 1, 2, 3}
    standard = (features - features.mean(0)) / features.std(0)
    for code in range(4):
        mean = standard[tokens == code].mean(0)
        np.testing.assert_allclose(fit["centroids"][code], mean, atol=0.05)
    np.testing.assert_allclose(fit["share"], np.bincount(tokens) / 200, atol=0.011)
    assert "200 frames in 4 codes" in printed
    assert "converged 1  used 4" in printed


def test_finish_on_a_mesh_equals_one_device(trained):
    wav = tones(12)

    def batches():  # the last one is smaller
        return iter([{"audio": wav[:8]}, {"audio": wav[8:]}])

    alone = OBJECTIVE.finish(trained[1], {}, batches)["kmeans"]
    mesh = sharding.make_mesh(fsdp=2, tensor=1)
    with jax.set_mesh(mesh):
        after = jax.device_put(trained[1], sharding.replicated(mesh))
        spread = OBJECTIVE.finish(after, {}, batches)["kmeans"]
    np.testing.assert_allclose(spread["centroids"], alone["centroids"], atol=1e-4)
    np.testing.assert_array_equal(spread["share"], alone["share"])


# --- evaluation and checks ---


def test_evaluation_reports_the_use_of_tokens(finished):
    done, _ = finished
    batch = {"audio": jnp.asarray(tones(8)[2:6])}
    arguments = *split(done), {}, batch, jax.random.key(0)
    metrics = jax.jit(OBJECTIVE.evaluate)(*arguments)
    tokens = apply(done, tones(8), method=SemanticEncoder.tokens)[2:6]
    share = np.bincount(np.asarray(tokens).reshape(-1), minlength=4) / 100
    clusters = np.asarray(done["kmeans"]["share"])
    expected = {
        "loss": loss_of(*arguments)[0],
        "token_perplexity": np.exp(scipy.stats.entropy(share)),
        "kmeans_perplexity": np.exp(scipy.stats.entropy(clusters)),
        "kmeans_largest_share": clusters.max(),
        "kmeans_used": 4,
        "kmeans_converged": 1,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    assert 0 < metrics["kmeans_inertia"] < 1


def test_without_standardisation_the_target_codebook_collapses():
    # Each clip and each 50 ms of it has its own loudness.
    rng = np.random.default_rng(3)
    loudness = rng.uniform(0.05, 1, (16, 1, 1)) * rng.uniform(0.3, 1, (16, 20, 1))
    wav = (loudness * tones(16).reshape(16, 20, 800)).reshape(16, 16_000).astype(np.float32)
    objective = SemanticObjective(dataclasses.replace(CONFIG, targets=64), Tones())
    variables = nn.unbox(jax.jit(objective.init)(jax.random.key(0), {"audio": jnp.asarray(wav)}))
    module = SemanticEncoder(objective.model)

    @jax.jit
    def perplexity(variables):
        stacked = module.apply(variables, wav, method=SemanticEncoder.stacked)
        targets = module.apply(variables, stacked, method=SemanticEncoder.targets)
        return rvq.perplexity(targets[..., None], 64)[0]

    raw = {"mean": jnp.zeros(16), "std": jnp.ones(16)}
    assert perplexity(variables) > 3 * perplexity(variables | {"statistics": raw})


def test_too_few_frames_for_the_codes_are_named_before_training():
    objective = SemanticObjective(dataclasses.replace(CONFIG, codes=201), Tones())
    with pytest.raises(ValueError, match="codes = 201, but the training clips have 200 frames"):
        objective.check({"audio": jnp.asarray(tones(4))})
