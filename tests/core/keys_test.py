"""Keys depend on seed, step, stream and row, and on nothing else."""

import jax
import numpy as np
import pytest

from musicrl_jax.core.keys import row_keys, step_key


def bits(keys: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(keys)).reshape(-1, 2)


@pytest.mark.exactness(11)
def test_rows_keep_their_keys_in_any_batch():
    key = step_key(3, 7)
    whole = bits(row_keys(key, 8))
    parts = np.concatenate([bits(row_keys(key, 3)), bits(row_keys(key, 5, first_row=3))])
    np.testing.assert_array_equal(whole, parts)


@pytest.mark.exactness(11)
def test_no_two_rows_steps_streams_or_seeds_share_a_key():
    keys = [
        bits(row_keys(step_key(seed, step, stream), 4)) for seed in (0, 1) for step in range(5) for stream in range(3)
    ]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 2 * 5 * 3 * 4
