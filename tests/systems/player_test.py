"""The player on a mesh gives the clips, scores and KLs of pure functions on one device."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musicrl_jax.core import sharding
from musicrl_jax.core.keys import Stream, row_keys, step_key
from musicrl_jax.systems import folder, tiny
from musicrl_jax.systems.player import Player, keys_by_seed, roll_out
from musicrl_jax.systems.sampling import Beginning, Sampling
from musicrl_jax.systems.system import Weights

BATCH, SECONDS, TOKENS = 8, 0.16, 8
PROMPTS = [f"tune {i}" for i in range(BATCH)]
SAMPLING = Sampling(0.9, top_k=4)


@dataclasses.dataclass(frozen=True)
class Loudness:
    """A scorer of two terms, one of which reads the prompts."""

    variables: ClassVar = {"peak": {"factor": np.float32(2)}, "words": {}}

    def read(self, prompts):
        letters = np.array([len(prompt) for prompt in prompts], np.int32)
        return {"peak": {}, "words": {"letters": letters}}

    def score(self, variables, rollout, texts):
        peak = variables["peak"]["factor"] * rollout.mono.max(axis=1)
        return {"peak": peak, "words": texts["words"]["letters"].astype(jnp.float32)}

    def total(self, scores, units):
        return sum((score - units[name][0]) / units[name][1] for name, score in scores.items())


UNITS = {"peak": (0.5, 2.0), "words": (0.0, 10.0)}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    return folder.load(tiny.write(directory, tiny.TinyConfig(channels=2)))


@pytest.fixture(scope="module", params=[(1, 1), (2, 2)], ids=str)
def player(request, loaded):
    mesh = sharding.make_mesh(*request.param)
    return Player(loaded.system, mesh, BATCH, SECONDS, SAMPLING, mixture=Loudness())


@pytest.fixture(scope="module")
def expected(loaded):
    """Samples the clips with one program on one device."""
    keys = row_keys(step_key(3, 5, Stream.VOTES), BATCH, 16)
    weights = jax.device_put(Weights(loaded.policy, loaded.frozen))
    sample = jax.jit(lambda *arguments: roll_out(loaded.system, *arguments, TOKENS, SAMPLING))
    return sample(weights, loaded.system.read(PROMPTS), keys)


def assert_close(rollout, expected):
    """Compares two rollouts: tokens are equal, and floats differ by rounding."""
    assert jax.tree.structure(rollout) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(rollout), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(other.dtype, jnp.floating):
            np.testing.assert_allclose(one, other, atol=1e-5)
        else:
            np.testing.assert_array_equal(one, other)


@pytest.mark.exactness(11, 15)
def test_a_player_on_a_mesh_samples_the_clips_of_one_program(player, loaded, expected):
    with jax.set_mesh(player.mesh):
        weights = player.place(loaded.policy, loaded.frozen)
        rollout = player.draw(weights, PROMPTS, 3, 5, Stream.VOTES, first_row=16)
        reward, terms = player.score(Loudness.variables, rollout, PROMPTS, UNITS)
        other = jax.tree.map(lambda x: x + 0.5, weights.policy)
        kl = player.kl(weights.policy, other, rollout)
        no_kl = player.kl(weights.policy, weights.policy, rollout)
    assert_close(rollout, expected)
    by_row = sharding.batch_sharding(player.mesh)
    for leaf in jax.tree.leaves((rollout, reward, terms, kl)):
        assert leaf.sharding.is_equivalent_to(by_row, leaf.ndim)
    assert len(np.unique(expected.sampled.tokens, axis=0)) > 3 and np.ptp(expected.wav) > 0
    # Scores and KLs.
    peak = 2 * np.asarray(expected.mono).max(axis=1)
    np.testing.assert_allclose(terms["peak"], peak, rtol=1e-5)
    np.testing.assert_allclose(reward, (peak - 0.5) / 2 + len("tune 0") / 10, rtol=1e-5)
    np.testing.assert_array_equal(no_kl, 0)
    assert (
        kl.shape == (BATCH, TOKENS) and np.abs(kl).max() < 1e-5
    )  # the same number added to all logits


def test_clips_have_their_own_seeds_temperatures_and_beginnings(player, loaded, expected):
    text, count = loaded.system.read(PROMPTS), np.arange(BATCH)
    seeds, candidates = (count // 2).astype(np.uint32), (count % 2).astype(np.uint32)
    temperatures = np.linspace(0.5, 1.5, BATCH).astype(np.float32)
    beginning = Beginning(np.asarray(expected.sampled.tokens), (count % 3 * 2).astype(np.int32))
    with jax.set_mesh(player.mesh):
        weights = player.place(loaded.policy, loaded.frozen)
        rollout = player.draw_by_seed(weights, text, seeds, candidates, temperatures, beginning)
    keys = keys_by_seed(jnp.asarray(seeds), jnp.asarray(candidates))
    key = jax.random.fold_in(step_key(3, 0, Stream.GENERATION), 1)
    np.testing.assert_array_equal(jax.random.key_data(keys[7]), jax.random.key_data(key))

    # The same clips one by one, without a mesh.
    weights, rollout = (
        jax.device_put(Weights(loaded.policy, loaded.frozen)),
        jax.device_get(rollout),
    )

    @jax.jit
    def sample(text, key, temperature, beginning):
        sampling = Sampling(temperature[:, None], SAMPLING.top_k)
        return roll_out(loaded.system, weights, text, key, TOKENS, sampling, beginning)

    for row in (0, 3, 7):
        one = slice(row, row + 1)
        inputs = jax.tree.map(lambda x, one=one: x[one], (text, keys, temperatures, beginning))
        assert_close(jax.tree.map(lambda x, one=one: x[one], rollout), sample(*inputs))


@pytest.mark.parametrize(
    ("rows", "seconds", "complaint"),
    [(12, SECONDS, "batch_size=12 must be a multiple of the 8"), (8, 0.1, "clip_seconds=0.1 must")],
)
def test_rows_and_seconds_that_do_not_divide_are_refused(loaded, rows, seconds, complaint):
    with pytest.raises(ValueError, match=complaint):
        Player(loaded.system, sharding.make_mesh(), rows, seconds, SAMPLING)
