"""This project's reward terms and features, against NumPy on what their models say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_musiclm
from flax.core import meta

from musicrl_jax.core import checkpoint
from musicrl_jax.inputs import pieces
from musicrl_jax.models.bert import BertConfig
from musicrl_jax.models.mulan import MuLan, MuLanConfig
from musicrl_jax.models.musiclm import MusicLMConfig
from musicrl_jax.models.resnet import ResNetConfig
from musicrl_jax.models.rewards import Preference, PreferenceConfig, Quality, QualityConfig
from musicrl_jax.models.semantic import SemanticEncoder
from musicrl_jax.models.tokens import TokenLayout
from musicrl_jax.models.transformer import TransformerConfig
from musicrl_jax.systems.musiclm import MuLanCondition
from musicrl_jax.systems.scorers import (
    AcousticQuality,
    SemanticFeatures,
    TextAdherence,
    UserPreference,
)
from musicrl_jax.systems.system import Rollout, SampledTokens

BATCH, SAMPLES = 3, 8000
TOWER = ResNetConfig(mels=16, widths=(4, 8), blocks=1)


def rolled(wav):
    """A rollout of which its sound alone matters."""
    return Rollout((), None, (), wav[:, None])


@pytest.fixture(scope="module")
def wav():
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (BATCH, SAMPLES))
    return jnp.asarray(noise.astype(np.float32))


def rows(x, starts, length):
    """The windows of a clip that NumPy cuts: x [B, N, ...] -> a list of [B, length, ...]."""
    return [np.asarray(x)[:, start : start + length] for start in starts]


# Samples of a clip and where its windows of 0.25 s begin: MusicRL's 3 x 10 s, scaled; some that overlap; and one.
@pytest.mark.exactness(18)
@pytest.mark.parametrize(
    ("samples", "starts"),
    [(12_000, [0, 4000, 8000]), (10_000, [0, 3000, 6000]), (4000, [0]), (3200, [0])],
)
def test_text_adherence_is_the_mean_of_the_windows_cosines(wav, samples, starts):
    text_tower = BertConfig(layers=1, heads=2, embed=16, mlp=32, positions=8, pieces=40)
    config = MuLanConfig(16_000, 0.25, TOWER, text_tower, text_length=8, embed=4, levels=2, codes=4)
    text = jnp.array([[3, 4, 0], [5, 6, 7], [8, 0, 0]], jnp.int32)
    wav = jnp.tile(wav, (1, 2))[:, :samples]
    variables = meta.unbox(MuLan(config).init(jax.random.key(1), wav, text))
    parts = [MuLan(config).apply(variables, part, text)[:2] for part in rows(wav, starts, 4000)]
    cosines = []
    for audio, prompt in np.asarray(parts, np.float64):
        cosines.append(
            (audio * prompt).sum(1) / np.linalg.norm(audio, axis=1) / np.linalg.norm(prompt, axis=1)
        )
    scores = TextAdherence("unread", "").score(config, variables, rolled(wav), {"pieces": text})
    np.testing.assert_allclose(scores, np.mean(cosines, axis=0), atol=1e-6)


# Shorter than two windows they overlap; up to one there is one.
@pytest.mark.exactness(18)
@pytest.mark.parametrize(
    ("samples", "starts"), [(8000, [0, 4000]), (5000, [0, 1000]), (4000, [0]), (3200, [0])]
)
def test_acoustic_quality_is_that_of_the_first_and_the_last_window(wav, samples, starts):
    config = QualityConfig(sample_rate_hz=16_000, window_seconds=0.25, network=TOWER)
    wav = wav[:, :samples]
    variables = meta.unbox(Quality(config).init(jax.random.key(2), wav))
    mos = np.mean(
        [Quality(config).apply(variables, part) for part in rows(wav, starts, 4000)], axis=0
    )
    scores = AcousticQuality("unread", "").score(config, variables, rolled(wav), {})
    np.testing.assert_allclose(scores, (mos - 1) / 4, rtol=1e-6)
    assert (np.asarray(scores) > 0).all() and (np.asarray(scores) < 1).all()


@pytest.mark.exactness(18)
@pytest.mark.parametrize(("frames", "starts"), [(20, [0, 10]), (13, [0, 3]), (10, [0]), (7, [0])])
def test_user_preference_is_that_of_the_first_and_the_last_window(frames, starts):
    size = TransformerConfig(1, 8, 2, 8, dropout=0.0)
    config = PreferenceConfig(
        MusicLMConfig(size, size, TokenLayout(6, 6, 1), 2, 4), window_seconds=0.4
    )
    tokens = jax.random.randint(jax.random.key(3), (BATCH, frames, 3), 0, 6)
    mulan = jax.random.randint(jax.random.key(4), (BATCH, 2), 0, 4)
    variables = meta.unbox(Preference(config).init(jax.random.key(5), tokens, mulan))
    kernel = jax.random.normal(
        jax.random.key(6), variables["params"]["score"]["kernel"].shape
    )  # starts at 0
    variables["params"]["score"]["kernel"] = kernel
    expected = np.mean(
        [Preference(config).apply(variables, part, mulan) for part in rows(tokens, starts, 10)],
        axis=0,
    )
    condition = MuLanCondition(jnp.zeros((BATCH, 4)), mulan)
    sampled = SampledTokens(tokens.reshape(BATCH, -1), jnp.zeros((BATCH, 3 * frames)), None)
    rollout = Rollout(condition, sampled, (), jnp.zeros((BATCH, 1, 8)))
    scores = UserPreference("unread", "").score(config, variables, rollout, {})
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
    assert np.std(scores) > 1e-3


def test_stereo_is_judged_by_the_mean_of_its_channels(wav):
    config = QualityConfig(sample_rate_hz=16_000, window_seconds=0.25, network=TOWER)
    variables = meta.unbox(Quality(config).init(jax.random.key(2), wav[:, :4000]))
    stereo = jnp.stack([wav, wav[:, ::-1]], axis=1)[:, :, :4000]
    term, mono = AcousticQuality("unread", ""), rolled(stereo.mean(axis=1))
    found = term.score(config, variables, Rollout((), None, (), stereo), {})
    np.testing.assert_allclose(found, term.score(config, variables, mono, {}), rtol=1e-6)


def test_text_adherence_reads_prompts_as_its_mulan_does(tmp_path):
    """By its own vocabulary, whatever the system reads with; and it belongs to that MuLan."""
    term = TextAdherence(tiny_musiclm.save(tmp_path, "mulan"), "")
    model = term.load()
    text = term.read(model, tiny_musiclm.PROMPTS)
    expected = pieces.encode(tiny_musiclm.vocabulary(), tiny_musiclm.PROMPTS, 6)
    np.testing.assert_array_equal(text["pieces"], expected)
    assert term.lineage(model) == {"mulan": tiny_musiclm.model("mulan").hash}
    assert "windows of 0.1 s" in term.windows(model.config)


def test_a_preference_belongs_to_the_models_whose_tokens_it_read():
    model = checkpoint.Model(None, {}, "5e", {checkpoint.LINEAGE: b'{"codec": "c0"}'})
    assert UserPreference("unread", "").lineage(model) == {"codec": "c0"}
    assert AcousticQuality("unread", "").lineage(model) == {}


def test_semantic_features_are_those_of_the_encoder(tmp_path, wav):
    features = SemanticFeatures(tiny_musiclm.save(tmp_path, "semantic"))
    model = features.load()
    found = features.features(model.config, model.variables, wav[:, :4800])
    encoder = SemanticEncoder(model.config)
    expected = encoder.apply(model.variables, wav[:, :4800], method=SemanticEncoder.features)
    np.testing.assert_array_equal(found, expected)
    assert found.shape[:2] == (BATCH, 5)
