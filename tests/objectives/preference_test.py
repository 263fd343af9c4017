"""Preference and DPO on tiny trunks: the same vote either way round, the base's weights, and votes that are learned."""

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
    3,
    4,
)
LAYOUT = {"acoustic_codes": 7, "semantic_codes": 5, "mulan_levels": 3, "mulan_codes": 4}
PAIRS, FRAMES = 64, 6
KEY = jax.random.key(0)


def batch(seed):
    """Pairs of which the clip with more zeros among its semantic codes was chosen."""
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
def base(tmp_path_factory):
    """The folder of a policy, and its weights."""
    folder = tmp_path_factory.mktemp("base")
    tokens, mulan = jnp.zeros((1, 1, 5), jnp.int32), jnp.zeros((1, 3), jnp.int32)
    weights = meta.unbox(jax.jit(MusicLM(POLICY).init)(KEY, tokens, mulan))
    checkpoint.save_model(folder, POLICY, weights, {"tokens.json": b'{"codec": "c0"}'})
    return str(folder), weights["params"]


@pytest.fixture(scope="module", params=["preference", "dpo"])
def objective(request, tokens_of, base):
    if request.param == "dpo":
        return DPOObjective(POLICY, tokens_of(**LAYOUT), base[0], kl_strength=1 / 3)
    return PreferenceObjective(PreferenceConfig(POLICY), tokens_of(**LAYOUT), base[0])


@pytest.fixture(scope="module")
def begun(objective):
    """The weights before the first step, the frozen ones, and the compiled loss with its gradient."""
    params = objective.start(meta.unbox(jax.jit(objective.init)(KEY, batch(0)))["params"])
    return params, objective.frozen(), jax.jit(jax.value_and_grad(objective.loss, has_aux=True))


def test_before_the_first_step_nothing_is_preferred(begun):
    params, frozen, step = begun
    (loss, _), _ = step(params, {}, frozen, batch(0), KEY)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-5)


def test_votes_are_learned_and_hold_for_other_clips(begun):
    params, frozen, step = begun
    for number in range(60):
        _, slope = step(params, {}, frozen, batch(number), KEY)
        scale = jnp.float32(0.5) / jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(slope)))
        params = jax.tree.map(jnp.subtract, params, jax.tree.map(scale.__mul__, slope))
    (_, (_, metrics)), slope = step(params, {}, frozen, batch(1000), KEY)
    assert metrics["accuracy"] > 0.8
    # The same vote with its clips exchanged is the same loss and the same gradient.
    (loss, (_, other)), back = step(params, {}, frozen, swapped(batch(1000)), KEY)
    np.testing.assert_allclose(loss, metrics["loss"], rtol=1e-4)
    np.testing.assert_allclose(other["accuracy"], metrics["accuracy"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=2e-4), slope, back)


@pytest.mark.parametrize("name", LAYOUT)
def test_clips_of_another_layout_are_refused(tokens_of, base, name):
    data = tokens_of(**LAYOUT | {name: 9})
    for objective in (
        PreferenceObjective(PreferenceConfig(POLICY), data),
        DPOObjective(POLICY, data, base[0], kl_strength=1 / 3),
    ):
        with pytest.raises(ValueError, match=f"{name} is ., and its tokens have 9"):
            objective.check(batch(0))


def test_the_trunk_starts_from_the_policys_or_from_random_weights(tokens_of, base):
    folder, policy = base
    random = {"trunk": {"w": 1}, "score": {"kernel": 2}}
    started = PreferenceObjective(PreferenceConfig(POLICY), tokens_of(**LAYOUT), folder).start(
        random
    )
    assert started["score"] == random["score"]
    jax.tree.map(np.testing.assert_array_equal, started["trunk"], policy["trunk"])
    assert (
        PreferenceObjective(PreferenceConfig(POLICY), tokens_of(**LAYOUT)).start(random) == random
    )


def test_a_system_stands_for_its_policy(tokens_of, base, tmp_path):
    system, data = str(tmp_path / "system"), tokens_of(**LAYOUT)
    systems.write(system, "musiclm", {"policy": base[0]})
    for make in (
        lambda folder: PreferenceObjective(PreferenceConfig(POLICY), data, folder),
        lambda folder: DPOObjective(POLICY, data, folder, kl_strength=0.5),
    ):
        objective, same = make(system), make(base[0])
        random = {"trunk": {"w": 1}, "score": {"kernel": 2}}
        jax.tree.map(np.testing.assert_array_equal, objective.start(random), same.start(random))
        assert objective.assets() == same.assets()
        assert checkpoint.describe(objective) == checkpoint.describe(
            same
        )  # a run goes on with either
    checkpoint.save_model(tmp_path / "other", POLICY, {"params": {"w": np.ones(3)}})
    systems.write(system, "musiclm", {"policy": str(tmp_path / "other")}, {"policy": "0" * 64})
    with pytest.raises(
        ValueError, match=r"the part policy in .*other is .*, not 000000000000: restore it"
    ):
        objective.start({})


def test_a_policy_of_another_size_is_named(tokens_of, base):
    other = PreferenceConfig(MusicLMConfig(POLICY.temporal, POLICY.depth, POLICY.layout, 3, 5))
    with pytest.raises(ValueError, match="mulan_codes is 4, and MusicLMConfig's is 5"):
        PreferenceObjective(other, tokens_of(**LAYOUT), base[0]).start({})


def test_crops_are_windows_of_both_clips(tokens_of):
    """A linear trunk's stand-in: the margin of a crop is that of one of its windows."""
    config = PreferenceConfig(POLICY)
    objective = PreferenceObjective(config, tokens_of(**LAYOUT), crop=0.5)
    data = {name: array[:1] for name, array in batch(0).items()}
    params = meta.unbox(objective.init(KEY, data))["params"]
    params = {**params, "score": {"kernel": jnp.ones_like(params["score"]["kernel"])}}
    tokens = interleave(jnp.asarray(data["semantic"]), jnp.asarray(data["acoustic"][..., :2]))[
        0
    ]  # [2, F, K]
    windows = jnp.concatenate(
        [tokens[:, start : start + 3] for start in range(4)]
    )  # [8, 3, K]: a, b, a, b, ...
    scores = Preference(config).apply(
        {"params": params}, windows, jnp.repeat(data["mulan"], 8, axis=0)
    )
    possible = scores[::2][:, None] - scores[1::2][None]  # [4, 4]
    seen = {
        int(jnp.abs(possible - objective.margin(params, data, jax.random.key(i))[0]).argmin())
        for i in range(40)
    }
    found = [
        float(jnp.abs(possible - objective.margin(params, data, jax.random.key(i))[0]).min())
        for i in range(5)
    ]
    assert max(found) < 1e-5 and len(seen) > 8


@pytest.mark.parametrize("crop", [0.0, 1.1, float("nan")])
def test_a_crop_that_is_no_share_is_refused(tokens_of, crop):
    with pytest.raises(ValueError, match=r"crop = .* must be above 0 and at most 1"):
        PreferenceObjective(PreferenceConfig(POLICY), tokens_of(**LAYOUT), crop=crop)


@pytest.mark.parametrize("strength", [0.0, 1.0, float("nan")])
def test_a_strength_that_is_none_is_refused(tokens_of, strength):
    with pytest.raises(ValueError, match=r"kl_strength = .* must lie between 0 and 1"):
        DPOObjective(POLICY, tokens_of(**LAYOUT), "base", kl_strength=strength)


def test_a_policy_of_dpo_names_whose_tokens_it_speaks_and_its_anchor(tokens_of, token_models, base):
    assets = DPOObjective(POLICY, tokens_of(**LAYOUT), base[0], kl_strength=0.5).assets()
    assert json.loads(assets["tokens.json"]) == token_models
    assert json.loads(assets["anchor.json"]) == {"anchor": checkpoint.model_hash(base[0])}


def test_long_clips_are_read_in_their_first_and_last_window():
    config = PreferenceConfig(POLICY, window_seconds=0.12)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 5, (2, 5, 5)).astype(np.int32))
    mulan = jnp.asarray([[0, 1, 2], [3, 2, 1]], jnp.int32)
    params = meta.unbox(Preference(config).init(KEY, tokens, mulan))["params"]
    params = {**params, "score": {"kernel": jnp.ones_like(params["score"]["kernel"])}}

    def score(tokens, mulan=mulan, config=config):
        return Preference(config).apply({"params": params}, tokens, mulan)

    expected = (score(tokens[:, :3]) + score(tokens[:, 2:])) / 2
    np.testing.assert_allclose(score(tokens), expected, rtol=1e-5)
    assert np.abs(np.asarray(score(tokens) - score(tokens, mulan[::-1]))).max() > 1e-4
    deaf = PreferenceConfig(POLICY, 0.12, captioned=False)
    np.testing.assert_array_equal(score(tokens, config=deaf), score(tokens, mulan[::-1], deaf))


def test_a_window_must_hold_a_frame():
    with pytest.raises(ValueError, match=r"window_seconds = 0\.01 must hold at least one frame"):
        PreferenceConfig(POLICY, 0.01)
