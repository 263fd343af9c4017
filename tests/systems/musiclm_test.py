"""MusicLM as a system: cached sampling equals the full pass, and parts must belong together."""

import dataclasses
import functools
import json
from operator import attrgetter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_musiclm
from flax.core import meta

from musicrl_jax.core import checkpoint, sharding
from musicrl_jax.core.keys import Stream, row_keys, step_key
from musicrl_jax.core.precision import LAYERS, in_dtype
from musicrl_jax.losses.policy_gradient import token_log_probs
from musicrl_jax.models.musiclm import MusicLM
from musicrl_jax.models.tokens import TokenLayout
from musicrl_jax.rl.config import RLConfig
from musicrl_jax.rl.learner import Learner
from musicrl_jax.systems import folder
from musicrl_jax.systems.musiclm import MuLanCondition, MusicLMSystem
from musicrl_jax.systems.player import Player, roll_out
from musicrl_jax.systems.sampling import SampledTokens, Sampling
from musicrl_jax.systems.system import Rollout, Weights

CONFIG = tiny_musiclm.CONFIGS["policy"]
SYSTEM = MusicLMSystem({"policy": CONFIG})
BATCH, FRAMES, DEPTH = 3, 20, 5
TOKENS = FRAMES * DEPTH
PLAIN, COLD = Sampling(1.0), Sampling(0.9)


def condition(mulan):
    """Makes the condition of prompts with these MuLan tokens."""
    return MuLanCondition(jnp.zeros((len(mulan), 8)), mulan)


def clips(tokens):
    """Makes sampled tokens whose log-probs are unknown."""
    return SampledTokens(tokens, jnp.zeros(tokens.shape), None)


@pytest.fixture(scope="module")
def policy():
    """Returns the policy's weights with separate layers, as `sample` takes them."""
    return jax.device_put(tiny_musiclm.model("policy").variables["params"])


@pytest.fixture(scope="module")
def batch(policy):
    """Returns the condition and the sampled tokens of three clips."""
    prompts = condition(jax.random.randint(jax.random.key(1), (BATCH, 3), 0, 4))
    with jax.default_matmul_precision("highest"):
        return prompts, sample(SYSTEM, policy, prompts, COLD)


def sample(system, policy, prompts, sampling, length=TOKENS):
    keys = row_keys(jax.random.key(2), len(prompts.tokens))
    arguments = policy, prompts, keys
    return jax.jit(lambda *arguments: system.sample(*arguments, length, sampling))(*arguments)


@functools.partial(jax.jit, static_argnums=3)
def distributions(policy, prompts, sampled, sampling):
    return SYSTEM.distributions(policy, prompts, sampled, sampling)


def log_probs(policy, prompts, sampled, sampling):
    log_distribution = distributions(policy, prompts, sampled, sampling)
    return token_log_probs(log_distribution, sampled.tokens)


@pytest.mark.exactness(8)
@pytest.mark.parametrize("lanes", [12, 128])  # heads of 12 and 8: both at once in depth, in both
def test_heads_side_by_side_sample_the_same(policy, batch, lanes):
    """Tokens are equal, and log-probs differ in float32's last digits, in the layout of TPUs."""
    system, (prompts, expected) = dataclasses.replace(SYSTEM, lanes=lanes), batch
    with jax.default_matmul_precision("highest"):
        sampled = sample(system, policy, prompts, COLD)
    np.testing.assert_array_equal(sampled.tokens, expected.tokens)
    np.testing.assert_allclose(sampled.log_probs, expected.log_probs, atol=1e-5)
    module = MusicLM(CONFIG, lanes=lanes)
    cache = jax.eval_shape(
        lambda p: module.apply({"params": p}, 1, method=MusicLM.empty_depth_cache), policy
    )
    assert cache[0][0].shape == (1, 1, 0, 16)  # both heads side by side, no code yet


@pytest.mark.exactness(8)
@pytest.mark.parametrize("top_k", [None, 3])
def test_cached_sampling_agrees_to_the_last_digits_in_float64(policy, batch, top_k):
    with jax.enable_x64(True):
        policy = jax.tree.map(lambda w: w.astype(jnp.float64), policy)
        sampling = Sampling(0.9, top_k)
        sampled = sample(SYSTEM, policy, batch[0], sampling)
        assert (sampled.allowed is None) == (top_k is None)
        assert top_k is None or (sampled.allowed.sum(axis=-1) == top_k).all()
        rescored = log_probs(policy, batch[0], sampled, sampling)
        assert rescored.dtype == jnp.float64
        assert np.abs(np.asarray(rescored - sampled.log_probs)).max() < 1e-10


def test_only_codes_that_exist_are_sampled(batch):
    tokens = np.asarray(batch[1].tokens).reshape(BATCH, FRAMES, DEPTH)
    assert tokens.min() >= 0 and tokens[:, :, 0].max() < 5 and tokens[:, :, 1:].max() < 7
    assert len(np.unique(tokens[:, :, 1:])) == 7


def test_samples_follow_the_tempered_distribution(policy):
    """The counts of the first code in 4000 clips fit the full pass's probabilities: chi-square."""
    prompts, cold = condition(jnp.ones((4000, 3), jnp.int32)), Sampling(0.7)
    tokens = sample(SYSTEM, policy, prompts, cold, DEPTH).tokens
    one = condition(prompts.tokens[:1])
    scores = distributions(policy, one, clips(tokens[:1]), cold)
    expected = 4000 * np.exp(np.asarray(scores))[0, 0, :5]
    counts = np.bincount(np.asarray(tokens)[:, 0], minlength=5)
    chi_square = (np.square(counts - expected) / expected).sum()
    assert chi_square < 18.5  # the 99.9 % point with 4 degrees of freedom


def test_a_token_changes_only_the_distributions_after_it(policy, batch):
    prompts, sampled = batch
    before = np.asarray(distributions(policy, prompts, sampled, PLAIN))[0]
    for place in (0, 4, 7 * DEPTH + 2, TOKENS - 2):
        changed = sampled.tokens.at[0, place].set((sampled.tokens[0, place] + 1) % 5)
        after = distributions(policy, prompts, sampled.replace(tokens=changed), PLAIN)
        after = np.asarray(after)[0]
        np.testing.assert_array_equal(before[: place + 1], after[: place + 1])
        moved = np.exp(before[place + 1 :]) - np.exp(after[place + 1 :])
        assert np.abs(moved).max() > 1e-5


def test_a_prompt_changes_the_first_frame(policy, batch):
    prompts, sampled = batch
    one = distributions(policy, prompts, sampled, PLAIN)
    other = distributions(policy, condition((prompts.tokens + 1) % 4), sampled, PLAIN)
    assert np.abs(np.asarray(one - other))[:, 0, :5].max() > 1e-3


@pytest.mark.exactness(19)
def test_the_probabilities_of_all_clips_sum_to_one(policy):
    """Enumerates all 5 x 7^4 clips of one frame."""
    grids = np.meshgrid(*[np.arange(n) for n in (5, 7, 7, 7, 7)], indexing="ij")
    tokens = jnp.asarray(np.stack([grid.ravel() for grid in grids], axis=1), jnp.int32)
    prompts = condition(jnp.zeros((len(tokens), 3), jnp.int32))
    joint = log_probs(policy, prompts, clips(tokens), Sampling(1.3)).sum(axis=1)
    np.testing.assert_allclose(np.exp(np.asarray(joint, np.float64)).sum(), 1.0, atol=1e-4)


@pytest.mark.exactness(9)
def test_bfloat16_moves_log_probs_little(policy, batch):
    """Matrix products and activations are in bfloat16, norms and softmax in float32."""
    prompts, sampled = batch
    half = in_dtype(policy, "bfloat16")
    exact, rough = (log_probs(weights, prompts, sampled, PLAIN) for weights in (policy, half))
    inputs = sampled.tokens.reshape(BATCH, FRAMES, DEPTH), prompts.tokens

    def hidden_states(module, *inputs):
        return module.trunk.hidden(*inputs)

    apply = functools.partial(MusicLM(CONFIG).apply, {"params": half}, method=hidden_states)
    hidden = jax.eval_shape(apply, *inputs)
    assert hidden.dtype == jnp.bfloat16 and rough.dtype == jnp.float32
    assert 0 < float(jnp.sqrt(jnp.mean(jnp.square(rough - exact)))) < 0.03


def test_layers_in_a_loop_learn_what_layers_in_a_row_do(policy, batch):
    """With remat, as at the paper's size, a pass has one block for all layers."""

    class Adam:
        def build(self, steps):
            return optax.adam(3e-2)

    prompts, sampled = batch
    rollout = Rollout(prompts, sampled, (), jnp.zeros((BATCH, 1, 1)))
    config = RLConfig(9, BATCH, FRAMES / 25, 0.02, Adam(), Adam(), sampling=COLD)
    base = SYSTEM.restored({"params": policy})
    states, programs = [], []
    for system in (SYSTEM, SYSTEM.tuned("cpu", remat=True)):
        learner = Learner(system, config)
        shapes = meta.unbox(jax.eval_shape(learner.create, jax.random.key(0)))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        state = learner.start_from(zeros, base)
        value = {**state.value, "head": 0.3 * jnp.ones_like(state.value["head"])}
        state = state.replace(value=value)

        def update(state, anchor, learner=learner):
            copy = learner.compute_copy(state, anchor)
            return learner.update(state, copy, rollout, jnp.linspace(0, 1, BATCH))

        with jax.default_matmul_precision("highest"):
            state, metrics = jax.jit(update)(state, base)
        assert float(metrics["kl"]) == 0.0
        states.append(state)
        program = jax.make_jaxpr(system.distributions, static_argnums=3)
        programs.append(str(program(base, prompts, sampled, COLD)))
    for name in ("policy_opt", "value_opt"):
        expected, moments = (getattr(state, name)[0].mu for state in states)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), moments, expected)
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected)) > 1e-4
    assert [program.count("tanh") for program in programs] == [4, 2]  # of gelu; two layers each


@pytest.fixture(scope="module")
def expected_rollout():
    """Samples clips with one program on one device; returns system, weights and clips."""
    models = tiny_musiclm.models()
    system = MusicLMSystem.from_models(models)
    policy = system.restored(models.pop("policy").variables)
    weights = Weights(policy, {name: model.variables for name, model in models.items()})
    keys = row_keys(step_key(0, 0, Stream.ROLLOUT), len(tiny_musiclm.PROMPTS))
    program = jax.jit(lambda *arguments: roll_out(system, *arguments, 3 * DEPTH, COLD))
    copy = jax.device_put(system.compute_copy(weights, "float32"))
    return system, weights, program(copy, system.read(tiny_musiclm.PROMPTS), keys)


@pytest.mark.exactness(15)
@pytest.mark.parametrize("looped", [False, True], ids=["layers_in_a_row", "layers_in_a_loop"])
def test_a_player_on_a_mesh_samples_the_clips_of_one_program(expected_rollout, looped):
    """On TPUs, the layers of frozen networks are in a loop too."""
    system, (policy, frozen), expected = expected_rollout
    prompts, mesh = tiny_musiclm.PROMPTS, sharding.make_mesh(2)
    system = dataclasses.replace(system, looped=looped)
    player = Player(system, mesh, len(prompts), 3 / 25, COLD)
    with jax.set_mesh(mesh):
        placed = player.place(policy, frozen)
        rollout = player.draw(placed, prompts, 0, 0, Stream.ROLLOUT)
    networks = (
        placed.frozen["soundstorm"]["params"]["Conformer_0"],
        placed.frozen["mulan"]["params"]["towers"]["text"],
    )
    assert [LAYERS in network for network in networks] == [looped] * 2
    for name in ("condition.tokens", "sampled.tokens", "codes"):
        one, other = (attrgetter(name)(each) for each in (rollout, expected))
        np.testing.assert_array_equal(one, other, name)
    for name in ("condition.embedding", "sampled.log_probs", "wav"):
        one, other = (attrgetter(name)(each) for each in (rollout, expected))
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5, err_msg=name)
    assert len(np.unique(expected.sampled.tokens)) > 3 and np.ptp(expected.wav) > 0


# --- models that belong together ---


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Writes all parts in the layout of older versions."""
    directory = tmp_path_factory.mktemp("run")
    places = {"policy": "policy", **folder.BESIDE}
    for part, place in places.items():
        model = tiny_musiclm.model(part)
        checkpoint.save_model(directory / place, model.config, model.variables, model.assets)
    return directory


def test_models_that_belong_together_are_loaded(run):
    loaded = folder.load(str(run / "policy"))
    assert loaded.hashes == {name: tiny_musiclm.model(name).hash for name in MusicLMSystem.PLAYING}
    assert set(loaded.lineage) == {"codec", "mulan"} and loaded.config == CONFIG
    assert loaded.system.vocabulary == tiny_musiclm.vocabulary()
    assert LAYERS in loaded.policy["trunk"]["temporal"]
    encoding = folder.load(str(run / "policy"), MusicLMSystem.ENCODING)
    assert encoding.policy is None and set(encoding.frozen) == {"soundstream", "semantic", "mulan"}


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        ("policy", {"layout": TokenLayout(5, 9, 2)}, "layout.acoustic_codes is 9, .* have 7"),
        ("policy", {"mulan_levels": 2}, "mulan_levels is 2, .* have 3"),
        ("policy", {"mulan_codes": 5}, "mulan_codes is 5, .* have 4"),
        ("soundstorm", {"levels": 7}, "levels is 7, .* have 4"),
        ("soundstorm", {"codes": 9}, "codes is 9, .* have 7"),
        ("soundstorm", {"coarse_levels": 3}, "coarse_levels is 3, .* have 2"),
    ],
)
def test_sizes_that_differ_are_named(name, changes, complaint):
    models = tiny_musiclm.models()
    config = dataclasses.replace(models[name].config, **changes)
    models[name] = dataclasses.replace(models[name], config=config)
    with pytest.raises(ValueError, match=f"the part {name}: {complaint}; train it for them"):
        MusicLMSystem.from_models(models)


@pytest.mark.parametrize("name", ["soundstream", "mulan"])
def test_other_weights_of_the_same_sizes_are_refused(name):
    models = tiny_musiclm.models()
    ours, theirs = models[name].hash[:12], "beef" * 3
    models[name] = dataclasses.replace(models[name], hash="beef" * 16)
    spoken = {"soundstream": "codec"}.get(name, name)
    complaint = f"policy was trained on tokens of {spoken} {ours}, not of {theirs}: give"
    with pytest.raises(ValueError, match=complaint):
        MusicLMSystem.from_models(models)


@pytest.mark.parametrize("name", ["policy", "soundstorm"])
def test_a_token_model_of_another_lineage_is_refused(name):
    models = tiny_musiclm.models()
    lineage = {"codec": models["soundstream"].hash, "mulan": "0" * 64}
    assets = {checkpoint.LINEAGE: json.dumps(lineage).encode()}
    models[name] = dataclasses.replace(models[name], assets=assets)
    with pytest.raises(ValueError, match=f"the part {name} was trained on .* mulan 000000000000"):
        MusicLMSystem.from_models(models)


def test_a_mulan_without_its_vocabulary_is_refused():
    models = tiny_musiclm.models()
    models["mulan"] = dataclasses.replace(models["mulan"], assets={})
    with pytest.raises(ValueError, match="the part mulan has no vocabulary in its model's folder"):
        MusicLMSystem.from_models(models)
