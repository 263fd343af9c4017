"""Training masks by their definition; decoding with a model whose answer is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musicrl_jax.core.keys import row_keys
from musicrl_jax.models.conformer import ConformerConfig
from musicrl_jax.models.soundstorm import SoundStorm, SoundStormConfig, fill_fine, training_mask

CONFIG = SoundStormConfig(ConformerConfig(1, 2, 8, 16, 5), levels=5, coarse_levels=2, codes=6, first_passes=4)


def test_training_mask_hides_one_level_in_part_and_all_above():
    shares = []
    for seed in range(200):
        masked, target = map(np.asarray, training_mask(jax.random.key(seed), (2, 20, 5), 2))
        for clip in range(2):
            levels = target[clip].any(axis=0)
            assert levels.sum() == 1  # one level has the loss
            level = int(levels.argmax())
            assert level >= 2
            assert not masked[clip, :, :level].any() and masked[clip, :, level + 1 :].all()
            np.testing.assert_array_equal(masked[clip, :, level], target[clip, :, level])
            shares.append(target[clip, :, level].mean())
    assert min(shares) > 0  # at least one frame
    # E[cos(u pi / 2)] = 2 / pi for u uniform; rounding up to whole frames of 20 adds half a frame.
    assert abs(np.mean(shares) - (2 / np.pi + 0.025)) < 0.03


@dataclasses.dataclass(frozen=True)
class Oracle:
    """A SoundStorm that knows: fine level q's code is (first coarse code + q) mod 6, and early frames are surest."""

    config: SoundStormConfig
    calls: list

    def apply(self, variables, codes, masked):
        self.calls.append(np.asarray(masked))
        right = (codes[:, :, :1] + jnp.arange(2, 5)[None, None]) % 6
        sure = 12.0 - jnp.arange(codes.shape[1], dtype=jnp.float32)[None, :, None, None] * 0.3
        return jax.nn.one_hot(right, 6) * sure


def test_decoding_keeps_the_given_levels_and_follows_the_schedule():
    oracle = Oracle(CONFIG, [])
    coarse = jax.random.randint(jax.random.key(0), (3, 16, 2), 0, 6)
    codes = np.asarray(fill_fine(oracle, {}, coarse, row_keys(jax.random.key(1), 3)))
    np.testing.assert_array_equal(codes[:, :, :2], coarse)
    for level in range(2, 5):
        np.testing.assert_array_equal(codes[:, :, level], (np.asarray(coarse)[:, :, 0] + level) % 6)
    assert len(oracle.calls) == 4 + 1 + 1
    hidden = [call[:, :, 2].sum(axis=1) for call in oracle.calls[:4]]
    for i, count in enumerate(hidden):
        np.testing.assert_array_equal(count, int(16 * np.cos(np.pi / 2 * i / 4)))
    # The frames that the oracle is surest of, the early ones, were kept first.
    assert not oracle.calls[1][:, 0, 2].any() and oracle.calls[1][:, -1, 2].all()


def test_hidden_codes_do_not_leak():
    """The logits may not depend on a code that is masked."""
    module = SoundStorm(CONFIG)
    codes = jax.random.randint(jax.random.key(0), (1, 8, 5), 0, 6)
    masked = jnp.zeros((1, 8, 5), bool).at[:, :, 3:].set(True)
    variables = module.init(jax.random.key(1), codes, masked)
    before = module.apply(variables, codes, masked)
    after = module.apply(variables, codes.at[:, :, 3:].set(0), masked)
    np.testing.assert_array_equal(before, after)
    seen = module.apply(variables, codes.at[:, :, 2].set((codes[:, :, 2] + 1) % 6), masked)
    assert np.abs(np.asarray(before - seen)).max() > 1e-4


def test_a_clip_does_not_depend_on_its_batch():
    module = SoundStorm(CONFIG)
    coarse = jax.random.randint(jax.random.key(0), (3, 8, 2), 0, 6)
    variables = module.init(jax.random.key(1), jnp.zeros((1, 8, 5), jnp.int32), jnp.zeros((1, 8, 5), bool))
    keys = row_keys(jax.random.key(2), 3)
    fill = jax.jit(lambda c, k: fill_fine(module, variables, c, k))
    np.testing.assert_array_equal(fill(coarse, keys)[1], fill(coarse[1:2], keys[1:2])[0])


def test_coarse_levels_must_leave_fine_ones():
    with pytest.raises(ValueError, match="coarse_levels=5"):
        dataclasses.replace(CONFIG, coarse_levels=5)
