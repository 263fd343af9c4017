"""Reward terms and features equal NumPy's figures from the outputs of their models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_musiclm
from flax.core import meta

from musicrl_jax.core import checkpoint
from musicrl_jax.inputs import pieces
from musicrl_jax.models.mulan import MuLan
from musicrl_jax.models.rewards import Preference, PreferenceConfig, Quality
from musicrl_jax.models.semantic import SemanticEncoder
from musicrl_jax.systems.musiclm import MuLanCondition
from musicrl_jax.systems.sampling import SampledTokens
from musicrl_jax.systems.scorers import (
    AcousticQuality,
    SemanticFeatures,
    TextAdherence,
    UserPreference,
)
from musicrl_jax.systems.system import Rollout

BATCH, WINDOW = 3, 2400  # samples of a window: 0.1 s
# Lengths of clips with the starts of their first and last window. Windows overlap in clips shorter
# than two of them; a clip up to one window has one.
ENDS = [(4800, [0, 2400]), (3000, [0, 600]), (2400, [0]), (1920, [0])]


def rollout(wav):
    """Makes a rollout of waveforms [B, C, N] for terms that read nothing else."""
    return Rollout((), None, (), wav)


@pytest.fixture(scope="module")
def wav():
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (BATCH, 3 * WINDOW))
    return jnp.asarray(noise.astype(np.float32))


def windows(x, starts, length):
    """Cuts windows [B, length, ...] from clips [B, N, ...]."""
    return [np.asarray(x)[:, start : start + length] for start in starts]


@pytest.mark.exactness(18)
@pytest.mark.parametrize(
    ("samples", "starts"),  # MusicRL's three windows in a clip, scaled; overlapping ones; one
    [(7200, [0, 2400, 4800]), (6000, [0, 1800, 3600]), (2400, [0]), (1920, [0])],
)
def test_text_adherence_is_the_mean_cosine_of_the_windows(wav, samples, starts):
    config, variables = tiny_musiclm.CONFIGS["mulan"], tiny_musiclm.model("mulan").variables
    text = jnp.array([[3, 4, 0, 0, 0, 0], [5, 6, 7, 0, 0, 0], [8, 0, 0, 0, 0, 0]], jnp.int32)
    embed = jax.jit(lambda variables, part: MuLan(config).apply(variables, part, text)[:2])
    cosines = []
    for part in windows(wav[:, :samples], starts, WINDOW):
        audio, prompt = np.asarray(embed(variables, part), np.float64)
        norms = np.linalg.norm(audio, axis=1) * np.linalg.norm(prompt, axis=1)
        cosines.append((audio * prompt).sum(axis=1) / norms)
    term, clips = TextAdherence("unread", ""), rollout(wav[:, None, :samples])
    scores = jax.jit(term.score, static_argnums=0)(config, variables, clips, {"pieces": text})
    np.testing.assert_allclose(scores, np.mean(cosines, axis=0), atol=1e-6)


@pytest.mark.exactness(18)
@pytest.mark.parametrize(("samples", "starts"), ENDS)
def test_acoustic_quality_is_the_mean_of_the_first_and_the_last_window(wav, samples, starts):
    config, variables = tiny_musiclm.CONFIGS["quality"], tiny_musiclm.model("quality").variables
    predict = jax.jit(Quality(config).apply)
    parts = windows(wav[:, :samples], starts, WINDOW)
    mos = np.mean([predict(variables, part) for part in parts], axis=0)
    term, clips = AcousticQuality("unread", ""), rollout(wav[:, None, :samples])
    score = jax.jit(term.score, static_argnums=0)
    scores = np.asarray(score(config, variables, clips, {}))
    np.testing.assert_allclose(scores, (mos - 1) / 4, rtol=1e-6)
    assert (scores > 0).all() and (scores < 1).all()


@pytest.fixture(scope="module")
def preference():
    """Makes a preference model of random weights that reads ten frames at a time."""
    config = PreferenceConfig(tiny_musiclm.CONFIGS["policy"], window_seconds=0.4)
    arguments = jnp.zeros((1, 1, 5), jnp.int32), jnp.zeros((1, 3), jnp.int32)
    shapes = meta.unbox(jax.eval_shape(Preference(config).init, jax.random.key(0), *arguments))
    rng = np.random.default_rng(5)
    return config, jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), shapes)


@pytest.mark.exactness(18)
@pytest.mark.parametrize(("frames", "starts"), [(20, [0, 10]), (13, [0, 3]), (10, [0]), (7, [0])])
def test_user_preference_is_the_mean_of_the_first_and_the_last_window(preference, frames, starts):
    config, variables = preference
    tokens = jax.random.randint(jax.random.key(3), (BATCH, frames, 5), 0, 5)
    mulan = jax.random.randint(jax.random.key(4), (BATCH, 3), 0, 4)
    score = jax.jit(Preference(config).apply)
    parts = windows(tokens, starts, 10)
    expected = np.mean([score(variables, part, mulan) for part in parts], axis=0)
    condition = MuLanCondition(jnp.zeros((BATCH, 8)), mulan)
    sampled = SampledTokens(tokens.reshape(BATCH, -1), jnp.zeros((BATCH, 5 * frames)), None)
    clips = Rollout(condition, sampled, (), jnp.zeros((BATCH, 1, 8)))
    term = UserPreference("unread", "")
    scores = jax.jit(term.score, static_argnums=0)(config, variables, clips, {})
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
    assert np.std(scores) > 1e-3


def test_stereo_is_scored_by_the_mean_of_its_channels(wav):
    config, variables = tiny_musiclm.CONFIGS["quality"], tiny_musiclm.model("quality").variables
    term = AcousticQuality("unread", "")
    score = jax.jit(lambda wav: term.score(config, variables, rollout(wav), {}))
    stereo = jnp.stack([wav, wav[:, ::-1]], axis=1)[:, :, :WINDOW]
    np.testing.assert_allclose(score(stereo), score(stereo.mean(axis=1, keepdims=True)), rtol=1e-6)


def test_text_adherence_tokenizes_prompts_for_its_mulan(tmp_path):
    """It uses the vocabulary of its own MuLan, and its scores belong to that model."""
    term = TextAdherence(tiny_musiclm.save(tmp_path, "mulan"), "")
    model = term.load()
    text = term.read(model, tiny_musiclm.PROMPTS)
    expected = pieces.encode(tiny_musiclm.vocabulary(), tiny_musiclm.PROMPTS, 6)
    np.testing.assert_array_equal(text["pieces"], expected)
    assert term.lineage(model) == {"mulan": tiny_musiclm.model("mulan").hash}
    assert "windows of 0.1 s" in term.windows(model.config)


def test_a_preference_belongs_to_the_models_of_its_tokens():
    model = checkpoint.Model(None, {}, "5e", {checkpoint.LINEAGE: b'{"codec": "c0"}'})
    assert UserPreference("unread", "").lineage(model) == {"codec": "c0"}
    assert AcousticQuality("unread", "").lineage(model) == {}


def test_semantic_features_are_those_of_the_encoder(tmp_path, wav):
    features = SemanticFeatures(tiny_musiclm.save(tmp_path, "semantic"))
    model = features.load()
    compute = jax.jit(lambda wav: features.features(model.config, model.variables, wav))

    def expected(wav):
        encoder = SemanticEncoder(model.config)
        return encoder.apply(model.variables, wav, method=SemanticEncoder.features)

    result = compute(wav[:, :4800])
    np.testing.assert_array_equal(result, jax.jit(expected)(wav[:, :4800]))
    assert result.shape[:2] == (BATCH, 5)
