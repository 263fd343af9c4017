"""Training the semantic encoder: what is learned, what stays frozen, and k-means afterwards."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from musicrl_jax.models import conformer, semantic
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
    return (0.3 * np.sin(2 * np.pi * hz * time) + 0.01 * rng.normal(size=(clips, 16_000))).astype(np.float32)


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
        (_, (state, metrics)), slope = jax.value_and_grad(task.loss, has_aux=True)(params, state, {}, batch, key)
        norm = optax.tree.norm(slope)
        return jax.tree.map(lambda p, g: p - 0.1 * g / norm, params, slope), state, metrics

    seen = []
    for index in range(60):
        params, state, metrics = step(params, state, jax.random.key(index))
        seen.append(metrics)
    return task, before, {"params": params, **state}, seen[0], seen[-1]


def test_learns_and_leaves_the_quantizer_alone(trained):
    _, before, after, first, last = trained
    assert last["loss"] < 0.8 * first["loss"]
    assert last["accuracy"] > first["accuracy"]
    for collection in ("quantizer", "statistics", "kmeans"):
        jax.tree.map(np.testing.assert_array_equal, before[collection], after[collection])
    assert set(before) == {"params", "quantizer", "statistics", "kmeans"}


def test_statistics_are_those_of_the_first_batch(trained):
    _, before, _, _, _ = trained
    use = jax.jit(semantic.SemanticEncoder(CONFIG).apply, static_argnames="method")
    mels = use(before, tones(4), method="log_mels")
    np.testing.assert_allclose(before["statistics"]["mean"], np.mean(mels, axis=(0, 1)), atol=1e-5)
    np.testing.assert_allclose(before["statistics"]["std"], np.maximum(np.std(mels, axis=(0, 1)), 0.1), rtol=1e-4)


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
    nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss, nats[np.asarray(mask)].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], (logits.argmax(-1) == targets)[np.asarray(mask)].mean(), rtol=1e-5)


def test_finish_clusters_standardised_features(trained):
    task, _, after, _, _ = trained
    done = task.finish(after, {}, lambda: task.data.batches("train", 4, 0, epochs=1))
    module = semantic.SemanticEncoder(CONFIG)
    use = jax.jit(module.apply, static_argnames="method")
    features = np.asarray(use(done, tones(8), method="features")).reshape(-1, 16)
    np.testing.assert_allclose(done["kmeans"]["mean"], features.mean(0), atol=1e-4)
    np.testing.assert_allclose(done["kmeans"]["std"], features.std(0), rtol=1e-3, atol=1e-4)
    tokens = np.asarray(use(done, tones(8), method="tokens")).reshape(-1)
    assert set(tokens) == {0, 1, 2, 3}
    standard = (features - features.mean(0)) / features.std(0)
    for code in range(4):
        np.testing.assert_allclose(done["kmeans"]["centroids"][code], standard[tokens == code].mean(0), atol=0.05)


def test_too_few_frames_for_the_codes_is_named(trained):
    task, _, after, _, _ = trained
    many = objective.SemanticObjective(semantic.SemanticConfig(16_000, 16, CONFIG.encoder, 1, 16, 999), task.data)
    with pytest.raises(ValueError, match=r"codes = 999.*200 frames"):
        many.finish(after, {}, lambda: task.data.batches("train", 4, 0, epochs=1))


def test_perplexity_is_the_exponential_of_the_entropy():
    codes = jnp.array([[0, 0], [1, 2]], jnp.int32)
    np.testing.assert_allclose(objective.perplexity(codes, 8), np.exp(1.5 * np.log(2)), rtol=1e-6)
    np.testing.assert_allclose(objective.perplexity(jnp.zeros((3, 3), jnp.int32), 8), 1, rtol=1e-6)
