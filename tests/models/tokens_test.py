"""The layout of tokens is a bijection."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from musicrl_jax.models.tokens import TokenLayout, deinterleave, interleave

sizes = st.integers(1, 5)


@pytest.mark.exactness(19)
@given(sizes, sizes, sizes, st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_interleaving_is_a_bijection(batch, frames, levels, seed):
    rng = np.random.default_rng(seed)
    semantic = rng.integers(0, 99, (batch, frames)).astype(np.int32)
    coarse = rng.integers(0, 99, (batch, 2 * frames, levels)).astype(np.int32)
    tokens = np.asarray(interleave(semantic, coarse))
    back = deinterleave(tokens)
    np.testing.assert_array_equal(back[0], semantic)
    np.testing.assert_array_equal(back[1], coarse)
    # The paper's order: all levels of codec frame 2f, then those of frame 2f + 1.
    for f in range(frames):
        expected = np.concatenate(
            [semantic[:, f, None], coarse[:, 2 * f], coarse[:, 2 * f + 1]], axis=1
        )
        np.testing.assert_array_equal(tokens[:, f], expected)


@pytest.mark.exactness(19)
@given(st.integers(2, 20), st.integers(2, 20), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_every_code_at_every_place_has_an_id_of_its_own(semantic_codes, acoustic_codes, levels):
    layout = TokenLayout(semantic_codes, acoustic_codes, levels)
    sizes = [semantic_codes] + [acoustic_codes] * (layout.depth - 1)
    codes = np.broadcast_to(
        np.arange(layout.vocabulary, dtype=np.int32)[:, None], (layout.vocabulary, layout.depth)
    )
    ids = np.asarray(layout.flat_ids(codes))
    assert sorted(id for place, size in enumerate(sizes) for id in ids[:size, place]) == list(
        range(layout.ids)
    )


def test_codes_of_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="two codec frames"):
        interleave(np.zeros((1, 3), np.int32), np.zeros((1, 5, 4), np.int32))
