"""Training the semantic encoder: what is learned, what stays frozen, and k-means afterwards."""

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
from musicrl_jax.models import conformer, rvq, semantic
from musicrl_jax.objectives import semantic as objective

CONFIG = semantic.SemanticConfig(
    sample_rate_hz=16_000,
    mels=16,
    encoder=conformer.ConformerConfig(layers=1, heads=2, embed=16, mlp=32, kernel=3),
    layer=1,
    targets=16,
    codes=4,
)


def tones(clips: int) -> np.ndarray:
    """Half-second notes of two pitches in turn, [clips, 16000]."""
    time = np.arange(16_000) / 16_000
    rng = np.random.default_rng(0)
    pitch = rng.choice([300.0, 900.0, 2700.0], size=(clips, 2))
    hz = np.where(time[None] < 0.5, pitch[:, :1], pitch[:, 1:])
    return (0.3 * np.sin(2 * np.pi * hz * time) + 0.01 * rng.normal(size=(clips, 16_000))).astype(
        np.float32
    )


class Tones:
    """Eight clips in batches of four."""

    def batches(self, split, batch_size, seed, start_step=0, epochs=None):
        wav = tones(8)
        return iter([{"audio": wav[:4]}, {"audio": wav[4:]}])

    def count(self, split):
        return 8


@pytest.fixture(scope="module")
def trained():
    """(objective, variables before, variables after 60 steps, first and last metrics)."""
    task = objective.SemanticObjective(CONFIG, Tones())
    batch = {"audio": jnp.asarray(tones(4))}
    before = nn.unbox(jax.jit(task.init)(jax.random.key(0), batch))
    params, state = before["params"], {name: v for name, v in before.items() if name != "params"}

    @jax.jit
    def step(params, state, key):
        (_, (state, metrics)), slope = jax.value_and_grad(task.loss, has_aux=True)(
            params, state, {}, batch, key
        )
        norm = optax.tree.norm(slope)
        return jax.tree.map(lambda p, g: p - 0.1 * g / norm, params, slope), state, metrics

    seen = []
    for index in range(60):
        params, state, metrics = step(params, state, jax.random.key(index))
        seen.append(metrics)
    return task, before, {"params": params, **state}, seen[0], seen[-1]


def test_learns_and_leaves_the_quantizer_alone(trained):
    _, before, after, first, last = trained
    assert last["loss"] < 0.9 * first["loss"]
    assert last["accuracy"] > first["accuracy"]
    for collection in ("quantizer", "statistics", "kmeans"):
        jax.tree.map(np.testing.assert_array_equal, before[collection], after[collection])
    assert set(before) == {"params", "quantizer", "statistics", "kmeans"}


def test_statistics_are_those_of_the_first_batch(trained):
    _, before, _, _, _ = trained
    use = jax.jit(semantic.SemanticEncoder(CONFIG).apply, static_argnames="method")
    mels = use(before, tones(4), method=semantic.SemanticEncoder.log_mels)
    np.testing.assert_allclose(before["statistics"]["mean"], np.mean(mels, axis=(0, 1)), atol=1e-5)
    np.testing.assert_allclose(
        before["statistics"]["std"], np.maximum(np.std(mels, axis=(0, 1)), 0.1), rtol=1e-4
    )


def test_loss_counts_masked_frames_only(trained):
    task, before, _, _, _ = trained
    state = {name: v for name, v in before.items() if name != "params"}
    key = jax.random.key(9)
    wav = jnp.asarray(tones(4))
    loss, (_, metrics) = jax.jit(task.loss)(before["params"], state, {}, {"audio": wav}, key)
    mask_key, noise_key = jax.random.split(key)
    mask = semantic.draw_mask(mask_key, 4, 25)
    noise = jax.random.normal(noise_key, (4, 25, 64))
    logits, targets = jax.jit(semantic.SemanticEncoder(CONFIG).apply)(before, wav, mask, noise)
    logits, targets = np.float64(logits), np.asarray(targets)
    nats = (
        np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    )
    np.testing.assert_allclose(loss, nats[np.asarray(mask)].mean(), rtol=1e-5)
    np.testing.assert_allclose(
        metrics["accuracy"], (logits.argmax(-1) == targets)[np.asarray(mask)].mean(), rtol=1e-5
    )


@pytest.fixture(scope="module")
def finished(trained):
    """The variables after k-means, and what it printed."""
    task, _, after, _, _ = trained
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        done = task.finish(after, {}, lambda: task.data.batches("train", 4, 0, epochs=1))
    return done, printed.getvalue()


def test_finish_clusters_standardised_features(finished):
    done, printed = finished
    module = semantic.SemanticEncoder(CONFIG)
    use = jax.jit(module.apply, static_argnames="method")
    features = np.asarray(use(done, tones(8), method=semantic.SemanticEncoder.features)).reshape(
        -1, 16
    )
    np.testing.assert_allclose(done["kmeans"]["mean"], features.mean(0), atol=1e-4)
    np.testing.assert_allclose(done["kmeans"]["std"], features.std(0), rtol=1e-3, atol=1e-4)
    tokens = np.asarray(use(done, tones(8), method=semantic.SemanticEncoder.tokens)).reshape(-1)
    assert set(tokens) == {0, 1, 2, 3}
    standard = (features - features.mean(0)) / features.std(0)
    for code in range(4):
        np.testing.assert_allclose(
            done["kmeans"]["centroids"][code], standard[tokens == code].mean(0), atol=0.05
        )
    np.testing.assert_allclose(done["kmeans"]["share"], np.bincount(tokens) / 200, atol=0.011)
    assert "200 frames in 4 codes" in printed
    assert "converged 1  used 4" in printed


def test_finish_on_a_mesh_equals_one_device(trained, finished):
    task, _, after, _, _ = trained
    wav = tones(12)

    def batches():  # the last one is smaller
        return iter([{"audio": wav[:8]}, {"audio": wav[8:]}])

    alone = task.finish(after, {}, batches)["kmeans"]
    mesh = sharding.make_mesh(fsdp=2, tensor=1)
    with jax.set_mesh(mesh):
        spread = task.finish(jax.device_put(after, sharding.replicated(mesh)), {}, batches)[
            "kmeans"
        ]
    np.testing.assert_allclose(spread["centroids"], alone["centroids"], atol=1e-4)
    np.testing.assert_array_equal(spread["share"], alone["share"])


def test_evaluation_reports_the_use_of_tokens(trained, finished):
    task, _, _, _, _ = trained
    done, _ = finished
    state = {name: value for name, value in done.items() if name != "params"}
    batch = {"audio": jnp.asarray(tones(8)[2:6])}
    metrics = jax.jit(task.evaluate)(done["params"], state, {}, batch, jax.random.key(0))
    tokens = semantic.SemanticEncoder(CONFIG).apply(
        done, batch["audio"], method=semantic.SemanticEncoder.tokens
    )
    share = np.bincount(np.asarray(tokens).reshape(-1), minlength=4) / 100
    np.testing.assert_allclose(
        metrics["token_perplexity"], np.exp(scipy.stats.entropy(share)), rtol=1e-5
    )
    _, (_, loss_metrics) = jax.jit(task.loss)(done["params"], state, {}, batch, jax.random.key(0))
    np.testing.assert_allclose(metrics["loss"], loss_metrics["loss"], rtol=1e-5)
    shares = np.asarray(done["kmeans"]["share"])
    np.testing.assert_allclose(
        metrics["kmeans_perplexity"], np.exp(scipy.stats.entropy(shares)), rtol=1e-5
    )
    np.testing.assert_allclose(metrics["kmeans_largest_share"], shares.max())
    np.testing.assert_allclose(metrics["kmeans_used"], 4)
    assert 0 < metrics["kmeans_inertia"] < 1
    assert metrics["kmeans_converged"] == 1


def test_without_standardisation_the_target_codebook_collapses():
    rng = np.random.default_rng(3)
    loudness = rng.uniform(0.05, 1, (16, 1, 1)) * rng.uniform(
        0.3, 1, (16, 20, 1)
    )  # of each clip and each 50 ms of it
    wav = (loudness * tones(16).reshape(16, 20, 800)).reshape(16, 16_000).astype(np.float32)
    many = objective.SemanticObjective(dataclasses.replace(CONFIG, targets=64), Tones())
    variables = nn.unbox(jax.jit(many.init)(jax.random.key(0), {"audio": jnp.asarray(wav)}))
    module = semantic.SemanticEncoder(many.model)

    @jax.jit
    def used(variables):
        stacked = module.apply(variables, wav, method=semantic.SemanticEncoder.stacked)
        targets = module.apply(variables, stacked, method=semantic.SemanticEncoder.targets)
        return rvq.perplexity(targets[..., None], 64)[0]

    raw = {"mean": jnp.zeros(16), "std": jnp.ones(16)}
    assert used(variables) > 3 * used(variables | {"statistics": raw})


def test_too_few_frames_for_the_codes_are_named_before_training():
    many = objective.SemanticObjective(dataclasses.replace(CONFIG, codes=201), Tones())
    with pytest.raises(ValueError, match="codes = 201, but the training clips have 200 frames"):
        many.check({"audio": jnp.asarray(tones(4))})
