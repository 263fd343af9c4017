"""The network against NumPy, masks by their definition, decoding against loops, an enumeration and mistakes."""

import collections
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax
from scipy.stats import chisquare

from musicrl_jax.core.keys import row_keys
from musicrl_jax.core.precision import in_dtype
from musicrl_jax.models.conformer import ConformerConfig
from musicrl_jax.models.soundstorm import (
    SoundStorm,
    SoundStormConfig,
    fill_fine,
    schedule,
    training_mask,
)

CONFIG = SoundStormConfig(
    ConformerConfig(1, 2, 8, 16, 5), levels=5, coarse_levels=2, codes=6, first_passes=4
)
MODULE = SoundStorm(CONFIG)
CODES = np.random.default_rng(0).integers(0, 6, (8, 12, 5)).astype(np.int32)


@pytest.fixture(scope="module")
def variables():
    """Weights that tell codes apart."""
    start = jax.jit(MODULE.init)(jax.random.key(1), CODES, np.zeros(CODES.shape, bool), 2)
    return {
        "params": {
            **start["params"],
            "head": jax.tree.map(lambda w: 3.0 * w, start["params"]["head"]),
        }
    }


apply = jax.jit(MODULE.apply)


def test_a_frame_is_the_sum_of_its_levels_and_every_level_has_a_head():
    """Without conformer blocks the network is two products, here in NumPy."""
    bare = SoundStorm(dataclasses.replace(CONFIG, conformer=ConformerConfig(0, 2, 8, 16, 5)))
    masked = np.random.default_rng(1).random(CODES.shape) < 0.4
    start = bare.init(jax.random.key(0), CODES, masked, 2)
    table, head = (
        np.asarray(start["params"][name].unbox(), np.float64) for name in ("table", "head")
    )
    assert table.shape == (5, 7, 8) and head.shape == (3, 8, 6)
    x = np.zeros((8, 12, 8))
    for clip, frame, level in np.ndindex(CODES.shape):
        x[clip, frame] += table[
            level, 6 if masked[clip, frame, level] else CODES[clip, frame, level]
        ]
    for level in range(2, 5):
        logits = bare.apply(start, CODES, masked, level)
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, x @ head[level - 2], atol=1e-5)
    levels = np.array([4, 2, 3, 3, 4, 2, 2, 4], np.int32)  # one a clip, as in training
    each = np.stack([x[clip] @ head[level - 2] for clip, level in enumerate(levels)])
    np.testing.assert_allclose(bare.apply(start, CODES, masked, levels), each, atol=1e-5)


def test_bfloat16_moves_its_logits_little(variables):
    masked = np.zeros(CODES.shape, bool)
    masked[:, :, 3:] = True
    half = in_dtype(variables, "bfloat16")
    assert {w.dtype for w in jax.tree.leaves(half)} == {
        jnp.dtype("bfloat16"),
        jnp.dtype("float32"),
    }  # matrices; biases and scales
    exact, rough = apply(variables, CODES, masked, 3), apply(half, CODES, masked, 3)
    assert rough.dtype == jnp.float32
    assert 0 < np.sqrt(np.square(rough - exact).mean()) < 0.02 * np.asarray(exact).std()
    with pytest.raises(ValueError, match="'float16' must be 'float32' or 'bfloat16'"):
        in_dtype(variables, "float16")


def test_hidden_codes_do_not_leak_and_seen_ones_are_heard(variables):
    masked = np.zeros(CODES.shape, bool)
    masked[:, :, 3:] = True
    before = apply(variables, CODES, masked, 3)
    np.testing.assert_array_equal(before, apply(variables, np.where(masked, 0, CODES), masked, 3))
    for level in range(3):
        changed = CODES.copy()
        changed[:, 5, level] = (changed[:, 5, level] + 1) % 6
        assert (
            np.abs(np.asarray(before - apply(variables, changed, masked, 3))).max(axis=(1, 2))
            > 1e-4
        ).all()


def test_training_hides_part_of_one_level_and_all_above():
    shares, levels = [], []
    draw = jax.jit(lambda key: training_mask(key, (64, 20, 5), 2))
    for seed in range(40):
        masked, level, target = map(np.asarray, draw(jax.random.key(seed)))
        for clip in range(64):
            q = level[clip]
            assert not masked[clip, :, :q].any() and masked[clip, :, q + 1 :].all()
            np.testing.assert_array_equal(masked[clip, :, q], target[clip])
        shares.append(target.mean(axis=1))
        levels.append(level)
    shares, levels = np.concatenate(shares), np.concatenate(levels)
    assert chisquare([np.sum(levels == q) for q in range(2, 5)]).pvalue > 0.01
    # P(ceil(20 cos u) <= k) = P(u >= arccos(k / 20)) = 1 - 2 / pi arccos(k / 20), u uniform up to pi / 2.
    steps = 1 - 2 / np.pi * np.arccos(np.arange(21) / 20)
    counts = [np.sum(np.round(shares * 20) == k) for k in range(1, 21)]
    assert chisquare(counts, np.diff(steps) * len(shares)).pvalue > 0.01
    np.testing.assert_allclose(
        np.mean(target, axis=0), shares[-64:].mean(), atol=0.25
    )  # no frame is favoured


@pytest.mark.parametrize(("first", "frames"), [(16, 250), (16, 7), (4, 20), (1, 9)])
def test_schedule_is_the_papers(first, frames):
    config = dataclasses.replace(CONFIG, levels=12, coarse_levels=4, first_passes=first)
    level, number, last, hidden = schedule(config, frames)
    assert list(level) == [4] * first + list(
        range(5, 12)
    )  # (16, 1, ..., 1): 23 passes for eight levels
    assert list(number[:first]) == list(range(1, first + 1)) and (number[first:] == 1).all()
    np.testing.assert_array_equal(last, number == np.where(level == 4, first, 1))
    assert (hidden[last] == 0).all()  # nothing is left out
    expected = [np.floor(frames * np.cos(np.pi / 2 * i / first)) for i in range(1, first)]
    np.testing.assert_array_equal(hidden[: first - 1], expected)
    assert (
        first == 1 or hidden[0] < frames
    )  # every pass over a clip that is long enough decides something


def noise(key, level, number, frames):
    """The random numbers of one clip and pass."""
    return np.asarray(
        jax.random.gumbel(
            jax.random.fold_in(key, level * CONFIG.first_passes + number), (frames, 6)
        )
    )


def decode(score, coarse, keys, mistake=""):
    """SoundStorm 3.3 in loops over clips, levels, passes and frames; or with one of the mistakes that people make."""
    clips, frames, _ = coarse.shape
    codes = np.concatenate([coarse, np.zeros((clips, frames, 3), np.int32)], axis=2)
    for clip in range(clips):
        for level in range(2, 5):
            passes = 4 if level == 2 or mistake == "all passes over every level" else 1
            hidden = list(range(frames))
            for i in range(1, passes + 1):
                masked = np.zeros((frames, 5), bool)
                masked[:, level + 1 :] = mistake != "levels above are seen"
                masked[hidden, level] = True
                scores = score(codes[clip], masked, level)
                luck = noise(keys[clip], level, i, frames)
                sure = {frame: np.inf for frame in range(frames)}
                for frame in range(frames):
                    if mistake == "kept frames are ranked again":
                        sure[frame] = scores[frame, codes[clip, frame, level]]
                    if frame in hidden or mistake == "kept frames are drawn again":
                        greedy = {"greedy": True, "the last pass draws": False}.get(
                            mistake, i == passes
                        )
                        chosen = int(
                            np.argmax(scores[frame] if greedy else scores[frame] + luck[frame])
                        )
                        codes[clip, frame, level] = chosen
                        sure[frame] = scores[frame, chosen]
                        if mistake == "noise counts as confidence":
                            sure[frame] += luck[frame, chosen]
                stay = int(
                    frames * np.cos(np.pi / 2 * (i - (mistake == "one pass behind")) / passes)
                )
                if mistake == "a linear schedule":
                    stay = int(frames * (1 - i / passes))
                order = sorted(range(frames), key=lambda frame: sure[frame])
                if mistake == "the least sure are kept":
                    order = sorted(
                        range(frames), key=lambda frame: -sure[frame] if frame in hidden else np.inf
                    )
                hidden = order[:stay]
                if mistake == "sorted once":  # the place in the order taken for the rank
                    hidden = [frame for frame in range(frames) if order[frame] < stay]
    return codes


MISTAKES = (
    "all passes over every level",
    "levels above are seen",
    "kept frames are ranked again",
    "kept frames are drawn again",
    "greedy",
    "the last pass draws",
    "noise counts as confidence",
    "one pass behind",
    "a linear schedule",
    "the least sure are kept",
    "sorted once",
)


@pytest.fixture(scope="module")
def decoded(variables):
    """The network's scores for one clip, keys, and what was decoded with them."""

    def score(codes, masked, level):
        logits = apply(variables, codes[None], masked[None], level)[0]
        return log_softmax(np.asarray(logits, np.float64), axis=-1)

    keys = row_keys(jax.random.key(2), 8)
    filled = jax.jit(lambda coarse, keys: fill_fine(MODULE, variables, coarse, keys))(
        CODES[:, :, :2], keys
    )
    return score, keys, np.asarray(filled)


def test_decoding_is_the_papers_algorithm(decoded):
    score, keys, filled = decoded
    assert filled.dtype == np.int32
    np.testing.assert_array_equal(filled, decode(score, CODES[:, :, :2], keys))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows(decoded, mistake):
    score, keys, filled = decoded
    assert (decode(score, CODES[:, :, :2], keys, mistake) != filled).any()


@dataclasses.dataclass(frozen=True)
class TwoFrames:
    """A SoundStorm for two frames: logits of the first fine level, by what the other frame is seen to be."""

    config: SoundStormConfig
    logits: np.ndarray  # [2, C + 1, C]: by frame and by the other's code, C where that is hidden

    def apply(self, variables, codes, masked, level):
        first = self.config.coarse_levels
        other = jnp.where(masked, self.config.codes, codes)[:, ::-1, first]  # [B, 2]
        chosen = jnp.asarray(self.logits)[jnp.arange(2)[None], other]  # [B, 2, C]
        return jnp.where(level == first, chosen, jnp.zeros_like(chosen))


def test_two_frames_are_drawn_as_often_as_enumeration_says():
    config = dataclasses.replace(CONFIG, codes=3, levels=3, coarse_levels=2, first_passes=2)
    logits = np.random.default_rng(1).normal(size=(2, 4, 3)).astype(np.float32)
    scores = log_softmax(logits.astype(np.float64), axis=-1)
    expected = collections.Counter()
    for pair in itertools.product(range(3), repeat=2):  # what the first of two passes draws
        kept = int(
            scores[1, 3, pair[1]] > scores[0, 3, pair[0]]
        )  # of two frames floor(2 cos(pi / 4)) = 1 stays hidden
        codes = list(pair)
        codes[1 - kept] = int(scores[1 - kept, pair[kept]].argmax())
        expected[tuple(codes)] += np.exp(scores[0, 3, pair[0]] + scores[1, 3, pair[1]])
    clips = 6000
    coarse, keys = np.zeros((clips, 2, 2), np.int32), row_keys(jax.random.key(0), clips)
    filled = jax.jit(lambda coarse, keys: fill_fine(TwoFrames(config, logits), {}, coarse, keys))(
        coarse, keys
    )
    drawn = collections.Counter(map(tuple, np.asarray(filled)[:, :, 2].tolist()))
    assert set(drawn) == set(expected) and len(expected) > 3
    assert (
        chisquare([drawn[c] for c in expected], [clips * p for p in expected.values()]).pvalue
        > 0.01
    )


def test_a_clip_does_not_depend_on_its_batch(variables, decoded):
    _, keys, filled = decoded
    alone = fill_fine(MODULE, variables, CODES[1:2, :, :2], keys[1:2])
    np.testing.assert_array_equal(alone[0], filled[1])


def test_the_network_is_compiled_once_whatever_the_passes(variables):
    def products(first_passes):
        module = SoundStorm(dataclasses.replace(CONFIG, first_passes=first_passes))
        jaxpr = jax.make_jaxpr(lambda c, k: fill_fine(module, variables, c, k))(
            CODES[:, :, :2], row_keys(KEY, 8)
        )
        return str(jaxpr).count("dot_general")

    KEY = jax.random.key(0)
    single = str(jax.make_jaxpr(MODULE.apply)(variables, CODES, CODES == 0, 2)).count("dot_general")
    assert products(1) == products(16) == single


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("coarse_levels", 5, "coarse_levels=5 must be between"),
        ("first_passes", 0, "first_passes=0 must be at least 1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(field, value, complaint):
    with pytest.raises(ValueError, match=complaint):
        dataclasses.replace(CONFIG, **{field: value})
