"""Keys depend only on seed, step, stream and row."""

import jax
import numpy as np
import pytest

from musicrl_jax.core.keys import Stream, row_keys, step_key


def bits(keys):
    return np.asarray(jax.random.key_data(keys)).reshape(-1, 2)


@pytest.mark.exactness(11)
def test_rows_keep_their_keys_in_any_batch():
    key = step_key(3, 7, Stream.ROLLOUT)
    # One batch of 8 rows, or batches of 3 and 5.
    whole = bits(row_keys(key, 8))
    parts = np.concatenate([bits(row_keys(key, 3)), bits(row_keys(key, 5, first_row=3))])
    np.testing.assert_array_equal(whole, parts)


@pytest.mark.exactness(11)
def test_no_two_rows_steps_streams_or_seeds_share_a_key():
    keys = [
        bits(row_keys(step_key(seed, step, stream), 4))
        for seed in (0, 1)
        for step in range(5)
        for stream in Stream
    ]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 2 * 5 * len(Stream) * 4


def test_a_stream_keeps_its_number():
    """With another number a resumed run, or a user's seed, would give other clips."""
    names = ["GENERATION", "TRAINING", "VALIDATION", "ROLLOUT"]
    names += ["EVALUATION", "VOTES", "MONITOR", "UNITS"]
    assert {stream.name: stream.value for stream in Stream} == {
        name: number for number, name in enumerate(names)
    }
    # A traced stream gives the same key.
    traced = jax.jit(lambda stream: step_key(3, 7, stream))(np.int32(Stream.VOTES))
    np.testing.assert_array_equal(bits(traced), bits(step_key(3, 7, Stream.VOTES)))
