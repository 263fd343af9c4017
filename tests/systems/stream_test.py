"""A clip that is drawn chunk by chunk has the tokens and, to rounding, the sound of one pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_musiclm

from musicrl_jax.core.keys import row_keys
from musicrl_jax.models.soundstorm import SoundStorm, fill_fine
from musicrl_jax.models.tokens import deinterleave
from musicrl_jax.systems import tiny
from musicrl_jax.systems.musiclm import MuLanCondition, MusicLMSystem
from musicrl_jax.systems.sampling import Sampling
from musicrl_jax.systems.system import Weights

BATCH, FRAMES, PLACES = 2, 14, 5
LENGTH = FRAMES * PLACES
SAMPLING = Sampling(0.9)
CONDITION = MuLanCondition(jnp.zeros((BATCH, 8)), jnp.array([[0, 1, 2], [3, 3, 0]], jnp.int32))
KEYS = row_keys(jax.random.key(2), BATCH)


class Chunked(MusicLMSystem):
    """A MusicLM whose chunks are shorter than a second."""

    STREAM_FRAMES = 4


@pytest.fixture(scope="module")
def system():
    return Chunked.from_models(tiny_musiclm.models())


@pytest.fixture(scope="module")
def weights(system):
    variables = {name: model.variables for name, model in tiny_musiclm.models().items()}
    variables = jax.device_put(variables)
    return system.compute_copy(
        Weights(system.restored(variables.pop("policy")), variables), "float32"
    )


@pytest.fixture(scope="module")
def chunks(system, weights):
    """Returns tokens and waveform of each chunk."""
    step = jax.jit(
        lambda state, first, frames: system.stream(
            weights, state, KEYS, (first, frames), LENGTH, SAMPLING
        ),
        static_argnums=2,
    )
    state = jax.jit(lambda: system.start_stream(weights.policy, CONDITION, LENGTH))()
    first, results = 0, []
    for frames in system.stream_chunks(FRAMES):
        tokens, wav, state = step(state, np.int32(first), frames)
        results.append((np.asarray(tokens), np.asarray(wav)))
        first += frames
    return results


@pytest.fixture(scope="module")
def tokens(system, weights):
    """Returns the tokens of the whole clips."""
    return jax.jit(
        lambda: system.sample(weights.policy, CONDITION, KEYS, LENGTH, SAMPLING).tokens
    )()


def test_tokens_of_the_chunks_are_those_of_the_whole_clip(chunks, tokens):
    assert [each.shape[1] for each, _ in chunks] == [6 * PLACES, 4 * PLACES, 4 * PLACES]
    np.testing.assert_array_equal(np.concatenate([each for each, _ in chunks], axis=1), tokens)


def test_the_sound_is_one_decoding_of_codes_from_windows_that_overlap(
    system, weights, chunks, tokens
):
    """The windows are decoded from the tokens of the whole clip, and the codec runs once."""
    coarse = deinterleave(tokens.reshape(BATCH, FRAMES, PLACES))[1]
    keys = jax.vmap(jax.random.split)(KEYS)[:, 1]
    fill = jax.jit(
        functools.partial(
            fill_fine, SoundStorm(system.configs["soundstorm"]), weights.frozen["soundstorm"]
        )
    )
    codes = np.zeros((BATCH, 0, 4), np.int32)
    for first, end in ((0, 6), (6, 10), (10, 14)):
        window_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, first)
        past = codes[:, max(0, 2 * first - 8) :]
        new = fill(coarse[:, 2 * first : 2 * end], window_keys, past)
        np.testing.assert_array_equal(new[:, :, :2], coarse[:, 2 * first : 2 * end])
        codes = np.concatenate([codes, new], axis=1)
    whole = jax.jit(system.decode)(weights.frozen, codes)
    wav = np.concatenate([each for _, each in chunks], axis=2)
    assert np.abs(wav).max() > 1e-3
    np.testing.assert_allclose(wav, whole, atol=1e-6)  # one wrong code is far more


def test_chunks_share_a_length_but_for_the_first():
    chunks = MusicLMSystem.stream_chunks
    for frames in (1, 3, 4, 7, 8, 13, 125):
        parts = chunks(Chunked, frames)
        assert sum(parts) == frames and set(parts[1:]) <= {4} and parts[0] < 8


def test_a_system_without_streams_says_so():
    with pytest.raises(ValueError, match="TinySystem cannot stream: define STREAM_FRAMES"):
        tiny.TinySystem(tiny.TinyConfig()).stream_chunks(10)
