"""SoundStorm's loss: on the hidden codes of the drawn level, and on nothing else."""

import json

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from musicrl_jax.inputs.tokens import SCHEMA, Tokens
from musicrl_jax.models.conformer import ConformerConfig
from musicrl_jax.models.soundstorm import SoundStorm, SoundStormConfig, training_mask
from musicrl_jax.objectives.fine import FineObjective

MODEL = SoundStormConfig(ConformerConfig(1, 2, 8, 16, 5), levels=5, coarse_levels=2, codes=6, first_passes=4)
CODES = np.random.default_rng(0).integers(0, 6, (4, 10, 5)).astype(np.int32)
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def objective():
    return FineObjective(MODEL, data=None)


@pytest.fixture(scope="module")
def params(objective):
    return jax.jit(objective.init)(jax.random.key(0), {"acoustic": CODES})["params"]


def test_loss_is_the_mean_over_the_hidden_codes_of_the_drawn_level(objective, params):
    masked, target = map(np.asarray, training_mask(KEY, CODES.shape, 2))
    logits = SoundStorm(MODEL).apply({"params": params}, CODES, masked)
    scores = log_softmax(np.asarray(logits, np.float64), axis=-1)  # [B, T, Q - coarse, C]
    clip, frame, level = np.nonzero(target)
    scored = scores[clip, frame, level - 2]
    right = CODES[clip, frame, level]
    loss, (_, metrics) = jax.jit(objective.loss)(params, {}, {}, {"acoustic": CODES}, KEY)
    np.testing.assert_allclose(loss, -scored[np.arange(len(right)), right].mean(), rtol=1e-5)
    assert metrics["loss"] == loss
    np.testing.assert_allclose(metrics["accuracy"], (scored.argmax(axis=-1) == right).mean(), rtol=1e-6)


def test_codes_that_are_hidden_and_not_scored_change_nothing(objective, params):
    masked, target = map(np.asarray, training_mask(KEY, CODES.shape, 2))
    loss = jax.jit(objective.loss)

    def changed(places):
        return float(loss(params, {}, {}, {"acoustic": np.where(places, (CODES + 1) % 6, CODES)}, KEY)[0])

    assert (masked & ~target).any() and (~masked[:, :, 2:]).any()
    assert changed(masked & ~target) == changed(False)
    assert changed(target) != changed(False)
    assert changed(~masked) != changed(False)  # what is given is heard


def test_the_models_of_its_tokens_travel_with_it(tmp_path):
    models = {"codec": "c0", "semantic": "5e", "mulan": "a1"}
    manifest = {"schema": SCHEMA, "models": models, "layout": {}, "counts": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assets = FineObjective(MODEL, Tokens(str(tmp_path))).assets()
    assert {name: json.loads(content) for name, content in assets.items()} == {"tokens.json": models}
