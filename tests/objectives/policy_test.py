"""The policy's loss, against NumPy on the logits of its module."""

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
    mulan_levels=3,
    mulan_codes=4,
)
KEY = jax.random.key(0)
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
    return jax.jit(objective.init)(KEY, BATCH)["params"]


@pytest.fixture(scope="module")
def evaluate(objective):
    """Returns a function (params, batch, key) -> metrics, compiled once."""
    compiled = jax.jit(objective.evaluate)
    return lambda params, batch=BATCH, key=KEY: compiled(params, {}, {}, batch, key)


# --- loss ---


def test_nats_are_those_of_the_codes_in_the_order_of_a_frame(evaluate, params):
    """A frame is a semantic code, then the coarse levels of two codec frames in turn."""
    coarse = BATCH["acoustic"][:, :, :2]
    first, second = coarse[:, ::2], coarse[:, 1::2]
    tokens = np.concatenate([BATCH["semantic"][..., None], first, second], axis=2)
    logits = jax.jit(MusicLM(MODEL).apply)({"params": params}, tokens, BATCH["mulan"])
    scores = [log_softmax(np.asarray(place, np.float64), axis=-1) for place in logits]
    nats = -np.stack(
        [
            np.take_along_axis(place, tokens[:, :, number, None], -1)[..., 0]
            for number, place in enumerate(scores)
        ],
        axis=2,
    )  # [B, F, K]
    metrics = evaluate(params)
    assert set(metrics) == {"loss", "semantic", "coarse", "accuracy"}
    np.testing.assert_allclose(metrics["loss"], nats.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["semantic"], nats[:, :, 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["coarse"], nats[:, :, 1:].mean(), rtol=1e-5)
    likeliest = np.stack([place.argmax(axis=-1) for place in scores], axis=2)
    accuracy = (likeliest == tokens).mean()
    np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-6)


def test_the_policy_ignores_fine_levels(evaluate, params):
    other = {**BATCH, "acoustic": BATCH["acoustic"].copy()}
    other["acoustic"][:, :, 2:] = 0
    assert evaluate(params) == evaluate(params, other)


def test_training_has_dropout_and_lowers_the_loss_of_evaluation(objective, params, evaluate):
    loss = jax.jit(
        jax.value_and_grad(lambda params, key: objective.loss(params, {}, {}, BATCH, key)[0])
    )
    losses = [float(loss(params, jax.random.key(seed))[0]) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    before = [float(evaluate(params, key=jax.random.key(seed))["loss"]) for seed in (0, 1)]
    assert before[0] == before[1] not in losses
    moved = params
    for step in range(20):
        slope = loss(moved, jax.random.key(step))[1]
        moved = jax.tree.map(lambda p, g: p - jnp.float32(0.3) * g, moved, slope)
    assert evaluate(moved)["loss"] < 0.9 * before[0]


# --- assets and checks ---


def test_the_hashes_of_its_tokens_models_are_stored_with_it(objective, token_models):
    (asset,) = objective.assets().items()
    assert asset[0] == "tokens.json" and json.loads(asset[1]) == token_models


def test_the_length_of_its_clips_is_stored_with_it(tmp_path, token_models):
    clip = {**{name: codes[0] for name, codes in BATCH.items()}, "id": "a", "caption": "a reel"}
    write_tokens(str(tmp_path), "train", [clip], token_models, LAYOUT, {})
    assets = PolicyObjective(MODEL, Tokens(str(tmp_path))).assets()
    assert json.loads(assets["clip.json"]) == {"seconds": 6 / 25}
    assert json.loads(assets["tokens.json"]) == token_models


@pytest.mark.parametrize("name", LAYOUT)
def test_tokens_of_another_layout_are_refused(tokens_of, name):
    data = tokens_of(**LAYOUT | {name: 9})
    with pytest.raises(ValueError, match=f"{name} is ., and its tokens have 9"):
        PolicyObjective(MODEL, data).check(BATCH)
