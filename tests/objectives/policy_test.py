"""The policy's loss against NumPy on the logits of its module."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from musicrl_jax.inputs.tokens import Tokens, write_tokens
from musicrl_jax.models.musiclm import MusicLM, MusicLMConfig
from musicrl_jax.models.tokens import TokenLayout
from musicrl_jax.models.transformer import TransformerConfig
from musicrl_jax.objectives.policy import PolicyObjective

MODEL = MusicLMConfig(
    TransformerConfig(1, 16, 2, 32, dropout=0.5),
    TransformerConfig(1, 16, 2, 16),
    TokenLayout(5, 7, 2),
    3,
    4,
)
RNG = np.random.default_rng(0)
BATCH = {
    "semantic": RNG.integers(0, 5, (2, 6)).astype(np.int32),
    "acoustic": RNG.integers(0, 7, (2, 12, 4)).astype(np.int32),
    "mulan": RNG.integers(0, 4, (2, 3)).astype(np.int32),
}


LAYOUT = {"acoustic_codes": 7, "semantic_codes": 5, "mulan_levels": 3, "mulan_codes": 4}


@pytest.fixture(scope="module")
def objective(tokens_of):
    return PolicyObjective(MODEL, tokens_of(**LAYOUT))


@pytest.fixture(scope="module")
def params(objective):
    return jax.jit(objective.init)(jax.random.key(0), BATCH)["params"]


def test_nats_are_those_of_the_codes_in_the_order_of_a_frame(objective, params):
    """A frame is the semantic code, then the coarse levels of its first codec frame, then of its second."""
    coarse = BATCH["acoustic"][:, :, :2]
    tokens = np.stack(
        [BATCH["semantic"], *(coarse[:, half::2, level] for half in (0, 1) for level in (0, 1))],
        axis=2,
    )
    logits = MusicLM(MODEL).apply({"params": params}, tokens, BATCH["mulan"])
    scores = log_softmax(np.asarray(logits, np.float64), axis=-1)
    nats = -np.take_along_axis(scores, tokens[..., None], -1)[..., 0]  # [B, F, K]
    metrics = jax.jit(objective.evaluate)(params, {}, {}, BATCH, jax.random.key(0))
    assert set(metrics) == {"loss", "semantic", "coarse", "accuracy"}
    np.testing.assert_allclose(metrics["loss"], nats.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["semantic"], nats[:, :, 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["coarse"], nats[:, :, 1:].mean(), rtol=1e-5)
    np.testing.assert_allclose(
        metrics["accuracy"], (scores.argmax(axis=-1) == tokens).mean(), rtol=1e-6
    )


def test_fine_levels_are_not_the_policys(objective, params):
    other = {**BATCH, "acoustic": BATCH["acoustic"].copy()}
    other["acoustic"][:, :, 2:] = 0
    evaluate = jax.jit(objective.evaluate)
    one, two = (evaluate(params, {}, {}, batch, jax.random.key(0)) for batch in (BATCH, other))
    assert one == two


def test_training_has_dropout_and_evaluation_has_none(objective, params):
    loss, evaluate = jax.jit(objective.loss), jax.jit(objective.evaluate)
    losses = [float(loss(params, {}, {}, BATCH, jax.random.key(seed))[0]) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    quiet = [
        float(evaluate(params, {}, {}, BATCH, jax.random.key(seed))["loss"]) for seed in (0, 1)
    ]
    assert quiet[0] == quiet[1] not in losses


def test_a_few_steps_lower_the_loss(objective, params):
    gradient = jax.jit(jax.grad(lambda params, key: objective.loss(params, {}, {}, BATCH, key)[0]))
    evaluate = jax.jit(objective.evaluate)
    moved = params
    for step in range(20):
        moved = jax.tree.map(
            lambda p, g: p - jnp.float32(0.3) * g, moved, gradient(moved, jax.random.key(step))
        )
    before, after = (evaluate(p, {}, {}, BATCH, jax.random.key(0))["loss"] for p in (params, moved))
    assert after < 0.9 * before


def test_the_models_of_its_tokens_travel_with_it(objective, token_models):
    assets = objective.assets()
    assert {name: json.loads(content) for name, content in assets.items()} == {
        "tokens.json": token_models
    }


def test_the_length_of_its_clips_travels_with_it(tmp_path, token_models):
    clip = {**{name: codes[0] for name, codes in BATCH.items()}, "id": "a", "caption": "a reel"}
    write_tokens(str(tmp_path), "train", [clip], token_models, LAYOUT, {})
    assets = PolicyObjective(MODEL, Tokens(str(tmp_path))).assets()
    assert (
        json.loads(assets["clip.json"]) == {"seconds": 6 / 25}
        and json.loads(assets["tokens.json"]) == token_models
    )


@pytest.mark.parametrize("name", LAYOUT)
def test_tokens_of_another_layout_are_refused(tokens_of, name):
    data = tokens_of(**LAYOUT | {name: 9})
    with pytest.raises(ValueError, match=f"{name} is ., and its tokens have 9"):
        PolicyObjective(MODEL, data).check(BATCH)
