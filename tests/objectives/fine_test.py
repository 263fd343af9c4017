"""SoundStorm's loss: only the masked codes of a clip's random level count."""

import json

import jax
import numpy as np
import pytest
from flax import linen as nn
from scipy.special import log_softmax

from musicrl_jax.core import sharding
from musicrl_jax.models.conformer import ConformerConfig
from musicrl_jax.models.soundstorm import SoundStorm, SoundStormConfig, training_mask
from musicrl_jax.objectives.fine import FineObjective

MODEL = SoundStormConfig(
    ConformerConfig(1, 2, 8, 16, 5), levels=5, coarse_levels=2, codes=6, first_passes=4
)
CODES = np.random.default_rng(0).integers(0, 6, (4, 10, 5)).astype(np.int32)
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def objective(tokens_of):
    return FineObjective(MODEL, tokens_of(acoustic_levels=5, acoustic_codes=6))


@pytest.fixture(scope="module")
def params(objective):
    return jax.jit(objective.init)(jax.random.key(0), {"acoustic": CODES})["params"]


@pytest.fixture(scope="module")
def masking(params):
    """Returns the mask of KEY, and log-probs of the fine levels under it, [B, T, Q - coarse, C]."""
    hidden = jax.tree.map(np.asarray, training_mask(KEY, CODES.shape, 2))
    apply = jax.jit(SoundStorm(MODEL).apply)
    logits = [apply({"params": params}, CODES, hidden.masked, level) for level in range(2, 5)]
    return hidden, log_softmax(np.stack(logits, axis=2).astype(np.float64), axis=-1)


@pytest.fixture(scope="module")
def step(objective, params):
    """Returns a function codes -> (loss, metrics, gradient) under the mask of KEY."""
    compiled = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))

    def step(codes):
        (loss, (_, metrics)), gradient = compiled(params, {}, {}, {"acoustic": codes}, KEY)
        return loss, metrics, gradient

    return step


# --- loss ---


def scored(scores, where):
    """Returns mean nats of the true codes at `where`, bool [B, T, Q]."""
    clip, frame, level = np.nonzero(where)
    return -scores[clip, frame, level - 2, CODES[clip, frame, level]].mean()


def test_loss_is_the_mean_over_the_masked_codes_of_the_random_level(step, masking):
    (masked, level, target), scores = masking
    of_level = np.broadcast_to(np.arange(5) == level[:, None, None], masked.shape)
    own = target[:, :, None] & of_level
    loss, metrics, _ = step(CODES)
    np.testing.assert_allclose(loss, scored(scores, own), rtol=1e-5)
    assert metrics["loss"] == loss
    clip, frame, q = np.nonzero(own)
    hits = scores[clip, frame, q - 2].argmax(axis=-1) == CODES[clip, frame, q]
    np.testing.assert_allclose(metrics["accuracy"], hits.mean(), rtol=1e-6)
    # Two common mistakes: scoring all masked codes, or all frames of the level.
    assert abs(loss - scored(scores, masked)) > 1e-3
    assert abs(loss - scored(scores, of_level)) > 1e-3


def test_only_the_head_of_a_random_level_learns(step, masking):
    (_, level, _), _ = masking
    moved = np.abs(np.asarray(step(CODES)[2]["head"].unbox())).max(axis=(1, 2)) > 0
    np.testing.assert_array_equal(moved, [q in level for q in range(2, 5)])
    assert not moved.all()


def test_codes_that_are_masked_and_not_scored_change_nothing(step, masking):
    (masked, level, target), _ = masking
    target = target[:, :, None] & (np.arange(5) == level[:, None, None])

    def changed(places):
        return float(step(np.where(places, (CODES + 1) % 6, CODES))[0])

    assert (masked & ~target).any() and (~masked[:, :, 2:]).any()
    assert changed(masked & ~target) == changed(False)
    assert changed(target) != changed(False)
    assert changed(~masked) != changed(False)  # unmasked codes are inputs


# --- meshes, assets and checks ---


def test_weights_of_the_papers_size_divide_over_a_mesh(tokens_of):
    """The 1025 rows of 1024 codes and a mask must not be sharded."""
    batch = {"acoustic": np.zeros((8, 4, 12), np.int32)}
    objective = FineObjective(
        SoundStormConfig(), tokens_of(acoustic_levels=12, acoustic_codes=1024)
    )
    abstract = jax.eval_shape(objective.init, jax.random.key(0), batch)
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    layout = nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract), mesh, sharding.RULES)
    shapes = jax.tree.map(
        lambda leaf, place: place.shard_shape(leaf.shape), nn.meta.unbox(abstract), layout
    )["params"]
    assert shapes["table"] == (12, 1025, 512) and shapes["head"] == (8, 512, 512)


def test_the_hashes_of_its_tokens_models_are_stored_with_it(objective, token_models):
    assert json.loads(objective.assets()["tokens.json"]) == token_models


@pytest.mark.parametrize(("name", "size"), [("acoustic_levels", 8), ("acoustic_codes", 7)])
def test_tokens_of_another_layout_are_refused(tokens_of, name, size):
    """Indices out of range would be clamped silently."""
    data = tokens_of(**{"acoustic_levels": 5, "acoustic_codes": 6} | {name: size})
    with pytest.raises(ValueError, match=f"{name} is ., and its tokens have {size}"):
        FineObjective(MODEL, data).check({"acoustic": CODES})
