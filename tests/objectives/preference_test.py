"""Preference and DPO on tiny trunks: symmetry, the base's weights, and learning from votes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta

from musicrl_jax.core import checkpoint
from musicrl_jax.models.musiclm import MusicLM, MusicLMConfig
from musicrl_jax.models.rewards import Preference, PreferenceConfig
from musicrl_jax.models.tokens import TokenLayout, interleave
from musicrl_jax.models.transformer import TransformerConfig
from musicrl_jax.objectives.dpo import DPOObjective
from musicrl_jax.objectives.preference import PreferenceObjective
from musicrl_jax.systems import folder as systems

POLICY = MusicLMConfig(
    TransformerConfig(1, 16, 2, 32, dropout=0.1),
    TransformerConfig(1, 16, 2, 16),
    TokenLayout(5, 7, 2),
    mulan_levels=3,
    mulan_codes=4,
)
CONFIG = PreferenceConfig(POLICY)
LAYOUT = {"acoustic_codes": 7, "semantic_codes": 5, "mulan_levels": 3, "mulan_codes": 4}
PAIRS, FRAMES = 64, 6
KEY = jax.random.key(0)
RANDOM = {"trunk": {"w": 1}, "score": {"kernel": 2}}  # in place of random weights
score = jax.jit(lambda config, *a: Preference(config).apply(*a), static_argnums=0)


# --- data and models ---


def batch(seed):
    """Returns pairs whose clip with more zeros among its semantic codes was chosen."""
    rng = np.random.default_rng(seed)
    semantic = rng.integers(0, 5, (PAIRS, 2, FRAMES)).astype(np.int32)
    zeros = (semantic == 0).sum(axis=2)
    return {
        "semantic": semantic,
        "acoustic": rng.integers(0, 7, (PAIRS, 2, 2 * FRAMES, 4)).astype(np.int32),
        "mulan": rng.integers(0, 4, (PAIRS, 3)).astype(np.int32),
        "vote": (0.5 * (1 + np.sign(zeros[:, 0] - zeros[:, 1]))).astype(np.float32),
    }


def swapped(batch):
    other = {name: batch[name][:, ::-1] for name in ("semantic", "acoustic")}
    return {**batch, **other, "vote": 1 - batch["vote"]}


@pytest.fixture(scope="module")
def data(tokens_of):
    return tokens_of(**LAYOUT)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Returns the folder of a policy, and its weights."""
    folder = tmp_path_factory.mktemp("base")
    tokens, mulan = jnp.zeros((1, 1, 5), jnp.int32), jnp.zeros((1, 3), jnp.int32)
    weights = meta.unbox(jax.jit(MusicLM(POLICY).init)(KEY, tokens, mulan))
    checkpoint.save_model(folder, POLICY, weights, {"tokens.json": b'{"codec": "c0"}'})
    return str(folder), weights["params"]


@pytest.fixture(scope="module", params=["preference", "dpo"])
def objective(request, data, base):
    if request.param == "dpo":
        return DPOObjective(POLICY, data, base[0], kl_strength=1 / 3)
    return PreferenceObjective(CONFIG, data, base[0])


@pytest.fixture(scope="module")
def start(objective):
    """Returns the first weights, the frozen ones, and the jitted loss with its gradient."""
    params = objective.start(meta.unbox(jax.jit(objective.init)(KEY, batch(0)))["params"])
    return params, objective.frozen(), jax.jit(jax.value_and_grad(objective.loss, has_aux=True))


# --- learning ---


def test_before_the_first_step_nothing_is_preferred(start):
    params, frozen, step = start
    (loss, _), _ = step(params, {}, frozen, batch(0), KEY)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-5)


def test_votes_are_learned_and_generalise_to_other_clips(start):
    params, frozen, step = start
    for number in range(60):
        _, slope = step(params, {}, frozen, batch(number), KEY)
        scale = jnp.float32(0.5) / jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(slope)))
        params = jax.tree.map(jnp.subtract, params, jax.tree.map(scale.__mul__, slope))
    (_, (_, metrics)), slope = step(params, {}, frozen, batch(1000), KEY)
    assert metrics["accuracy"] > 0.8
    # Exchanging the clips of a vote changes neither loss nor gradient.
    (loss, (_, other)), back = step(params, {}, frozen, swapped(batch(1000)), KEY)
    np.testing.assert_allclose(loss, metrics["loss"], rtol=1e-4)
    np.testing.assert_allclose(other["accuracy"], metrics["accuracy"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=2e-4), slope, back)


# --- policies and layouts ---


@pytest.mark.parametrize("name", LAYOUT)
def test_clips_of_another_layout_are_refused(tokens_of, base, name):
    data = tokens_of(**LAYOUT | {name: 9})
    dpo = DPOObjective(POLICY, data, base[0], kl_strength=1 / 3)
    for objective in (PreferenceObjective(CONFIG, data), dpo):
        with pytest.raises(ValueError, match=f"{name} is ., and its tokens have 9"):
            objective.check(batch(0))


def test_the_trunk_starts_from_the_policys_or_from_random_weights(data, base):
    folder, policy = base
    params = PreferenceObjective(CONFIG, data, folder).start(RANDOM)
    assert params["score"] == RANDOM["score"]
    jax.tree.map(np.testing.assert_array_equal, params["trunk"], policy["trunk"])
    assert PreferenceObjective(CONFIG, data).start(RANDOM) == RANDOM


def test_a_systems_folder_stands_for_that_of_its_policy(data, base, tmp_path):
    system = str(tmp_path / "system")
    systems.write(system, "musiclm", {"policy": base[0]})
    for make in (
        lambda folder: PreferenceObjective(CONFIG, data, folder),
        lambda folder: DPOObjective(POLICY, data, folder, kl_strength=0.5),
    ):
        objective, same = make(system), make(base[0])
        jax.tree.map(np.testing.assert_array_equal, objective.start(RANDOM), same.start(RANDOM))
        assert objective.assets() == same.assets()
        # A run continues with either.
        assert checkpoint.describe(objective) == checkpoint.describe(same)
    checkpoint.save_model(tmp_path / "other", POLICY, {"params": {"w": np.ones(3)}})
    systems.write(system, "musiclm", {"policy": str(tmp_path / "other")}, {"policy": "0" * 64})
    complaint = r"the part policy in .*other is .*, not 000000000000: restore it"
    with pytest.raises(ValueError, match=complaint):
        objective.start({})


def test_a_policy_of_another_size_is_named(data, base):
    other = PreferenceConfig(MusicLMConfig(POLICY.temporal, POLICY.depth, POLICY.layout, 3, 5))
    with pytest.raises(ValueError, match="mulan_codes is 4, and MusicLMConfig's is 5"):
        PreferenceObjective(other, data, base[0]).start({})


# --- crops and windows ---


def random_preference(config, tokens, mulan):
    """Returns params whose scores differ between clips."""
    params = meta.unbox(jax.jit(Preference(config).init)(KEY, tokens, mulan))["params"]
    return {**params, "score": {"kernel": jnp.ones_like(params["score"]["kernel"])}}


def test_crops_are_windows_of_both_clips(data):
    """The margin of a crop is that of one pair of its windows."""
    objective = PreferenceObjective(CONFIG, data, crop=0.5)
    pair = {name: array[:1] for name, array in batch(0).items()}
    tokens = interleave(jnp.asarray(pair["semantic"]), jnp.asarray(pair["acoustic"][..., :2]))[0]
    params = random_preference(CONFIG, tokens, jnp.repeat(pair["mulan"], 2, axis=0))
    windows = jnp.concatenate([tokens[:, start : start + 3] for start in range(4)])  # a, b, a, ...
    scores = score(CONFIG, {"params": params}, windows, jnp.repeat(pair["mulan"], 8, axis=0))
    possible = scores[::2][:, None] - scores[1::2][None]  # [4, 4]
    margin = jax.jit(objective.margin)
    margins = jnp.stack([margin(params, pair, jax.random.key(i))[0] for i in range(40)])
    gaps = np.abs(possible.reshape(1, -1) - margins[:, None])
    assert gaps.min(axis=1).max() < 1e-5 and len(set(gaps.argmin(axis=1))) > 8


@pytest.mark.parametrize("crop", [0.0, 1.1, float("nan")])
def test_a_crop_that_is_no_share_is_refused(data, crop):
    with pytest.raises(ValueError, match=r"crop = .* must be above 0 and at most 1"):
        PreferenceObjective(CONFIG, data, crop=crop)


@pytest.mark.parametrize("strength", [0.0, 1.0, float("nan")])
def test_a_strength_out_of_range_is_refused(data, strength):
    with pytest.raises(ValueError, match=r"kl_strength = .* must lie between 0 and 1"):
        DPOObjective(POLICY, data, "base", kl_strength=strength)


def test_dpo_stores_the_hashes_of_its_tokens_models_and_anchor(data, token_models, base):
    assets = DPOObjective(POLICY, data, base[0], kl_strength=0.5).assets()
    assert json.loads(assets["tokens.json"]) == token_models
    assert json.loads(assets["anchor.json"]) == {"anchor": checkpoint.model_hash(base[0])}


def test_long_clips_are_read_in_their_first_and_last_window():
    config = PreferenceConfig(POLICY, window_seconds=0.12)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 5, (2, 5, 5)).astype(np.int32))
    mulan = jnp.asarray([[0, 1, 2], [3, 2, 1]], jnp.int32)
    params = {"params": random_preference(config, tokens, mulan)}
    whole, other = score(config, params, tokens, mulan), score(config, params, tokens, mulan[::-1])
    first, last = (score(config, params, part, mulan) for part in (tokens[:, :3], tokens[:, 2:]))
    np.testing.assert_allclose(whole, (first + last) / 2, rtol=1e-5)
    assert np.abs(np.asarray(whole - other)).max() > 1e-4
    captionless = PreferenceConfig(POLICY, 0.12, captioned=False)
    one, two = (score(captionless, params, tokens, text) for text in (mulan, mulan[::-1]))
    np.testing.assert_array_equal(one, two)


def test_a_window_must_hold_a_frame():
    with pytest.raises(ValueError, match=r"window_seconds = 0\.01 must hold at least one frame"):
        PreferenceConfig(POLICY, 0.01)
