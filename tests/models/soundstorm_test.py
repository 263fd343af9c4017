"""SoundStorm's network against NumPy, its decoding against loops, enumeration and mistakes."""

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
from musicrl_jax.models.categorical import sample_codes
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
    """Returns weights with a large head, so that codes differ in probability."""
    params = jax.jit(CONFIG.init)(jax.random.key(1))["params"]
    return {"params": params | {"head": jax.tree.map(lambda w: 3.0 * w, params["head"])}}


apply = jax.jit(MODULE.apply)


def test_a_frame_is_the_sum_of_its_levels_and_every_level_has_a_head():
    """Without conformer blocks the network is two products."""
    bare = SoundStorm(dataclasses.replace(CONFIG, conformer=ConformerConfig(0, 2, 8, 16, 5)))
    masked = np.random.default_rng(1).random(CODES.shape) < 0.4
    start = bare.init(jax.random.key(0), CODES, masked, 2)
    table, head = (
        np.asarray(start["params"][name].unbox(), np.float64) for name in ("table", "head")
    )
    assert table.shape == (5, 7, 8) and head.shape == (3, 8, 6)
    x = np.zeros((8, 12, 8))
    for clip, frame, level in np.ndindex(CODES.shape):
        place = clip, frame, level
        x[clip, frame] += table[level, 6 if masked[place] else CODES[place]]
    for level in range(2, 5):
        logits = bare.apply(start, CODES, masked, level)
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, x @ head[level - 2], atol=1e-5)
    levels = np.array([4, 2, 3, 3, 4, 2, 2, 4], np.int32)  # one a clip, as in training
    each = np.stack([x[clip] @ head[level - 2] for clip, level in enumerate(levels)])
    np.testing.assert_allclose(bare.apply(start, CODES, masked, levels), each, atol=1e-5)


def test_bfloat16_changes_logits_by_little(variables):
    masked = np.zeros(CODES.shape, bool)
    masked[:, :, 3:] = True
    half = in_dtype(variables, "bfloat16")
    # Matrices are cast, biases and scales are not.
    assert {str(w.dtype) for w in jax.tree.leaves(half)} == {"bfloat16", "float32"}
    exact, rough = apply(variables, CODES, masked, 3), apply(half, CODES, masked, 3)
    assert rough.dtype == jnp.float32
    assert 0 < np.sqrt(np.square(rough - exact).mean()) < 0.02 * np.asarray(exact).std()
    with pytest.raises(ValueError, match="'float16' must be 'float32' or 'bfloat16'"):
        in_dtype(variables, "float16")


def test_logits_depend_on_visible_codes_alone(variables):
    masked = np.zeros(CODES.shape, bool)
    masked[:, :, 3:] = True
    before = apply(variables, CODES, masked, 3)
    np.testing.assert_array_equal(before, apply(variables, np.where(masked, 0, CODES), masked, 3))
    for level in range(3):
        changed = CODES.copy()
        changed[:, 5, level] = (changed[:, 5, level] + 1) % 6
        difference = np.asarray(before - apply(variables, changed, masked, 3))
        assert (np.abs(difference).max(axis=(1, 2)) > 1e-4).all()


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
    # P(ceil(20 cos u) <= k) = P(u >= arccos(k / 20)) = 1 - 2 / pi arccos(k / 20) for a uniform u.
    steps = 1 - 2 / np.pi * np.arccos(np.arange(21) / 20)
    counts = [np.sum(np.round(shares * 20) == k) for k in range(1, 21)]
    assert chisquare(counts, np.diff(steps) * len(shares)).pvalue > 0.01
    # All frames are hidden equally often.
    np.testing.assert_allclose(np.mean(target, axis=0), shares[-64:].mean(), atol=0.25)


@pytest.mark.parametrize(("first", "frames"), [(16, 250), (16, 7), (4, 20), (1, 9)])
def test_schedule_is_the_papers(first, frames):
    config = dataclasses.replace(CONFIG, levels=12, coarse_levels=4, first_passes=first)
    level, number, last, hidden = schedule(config, frames)
    assert list(level) == [4] * first + list(range(5, 12))
    assert list(number[:first]) == list(range(1, first + 1)) and (number[first:] == 1).all()
    np.testing.assert_array_equal(last, number == np.where(level == 4, first, 1))
    assert (hidden[last] == 0).all()
    expected = [np.floor(frames * np.cos(np.pi / 2 * i / first)) for i in range(1, first)]
    np.testing.assert_array_equal(hidden[: first - 1], expected)
    assert first == 1 or hidden[0] < frames


def uniforms(key, level, number, frames):
    """Returns the random numbers of one clip and pass."""
    step_key = jax.random.fold_in(key, level * CONFIG.first_passes + number)
    return np.asarray(jax.random.uniform(step_key, (frames, 2)), np.float64)


def sample(scores, numbers):
    """Returns one of 6 codes: a half of them by the first number, one of the half by the second."""
    halves = np.exp(scores).reshape(2, 3)
    half = int(halves[0].sum() <= numbers[0] * halves.sum())
    return 3 * half + int(np.sum(halves[half].cumsum() <= numbers[1] * halves[half].sum()))


def decode(score, coarse, keys, mistake="", past=None):
    """Decodes in loops as SoundStorm, section 3.3, or with one of the known mistakes."""
    clips, new, _ = coarse.shape
    codes = np.concatenate([coarse, np.zeros((clips, new, 3), np.int32)], axis=2)
    if past is not None:
        codes = np.concatenate([past, codes], axis=1)
    frames = codes.shape[1]
    for clip in range(clips):
        for level in range(2, 5):
            passes = 4 if level == 2 or mistake == "all passes over every level" else 1
            hidden = list(range(frames - new, frames))
            for i in range(1, passes + 1):
                # The network's scores.
                masked = np.zeros((frames, 5), bool)
                masked[:, level + 1 :] = mistake != "levels above are seen"
                masked[hidden, level] = True
                scores = score(codes[clip], masked, level)
                # New codes for hidden frames.
                luck = uniforms(keys[clip], level, i, frames)
                sure = dict.fromkeys(range(frames), np.inf)
                last = {"greedy": True, "the last pass draws": False}.get(mistake, i == passes)
                for frame in range(frames):
                    if mistake == "kept frames are ranked again":
                        sure[frame] = scores[frame, codes[clip, frame, level]]
                    if frame in hidden or mistake == "kept frames are drawn again":
                        likeliest = int(np.argmax(scores[frame]))
                        chosen = likeliest if last else sample(scores[frame], luck[frame])
                        codes[clip, frame, level] = chosen
                        sure[frame] = scores[frame, chosen]
                        if mistake == "luck counts as confidence":
                            sure[frame] += luck[frame, 0]
                # The least confident frames stay hidden.
                number = i - (mistake == "one pass behind")
                stay = int(new * np.cos(np.pi / 2 * number / passes))
                if mistake == "a linear schedule":
                    stay = int(new * (1 - i / passes))
                if mistake == "the least sure are kept":
                    sure = {f: -sure[f] if f in hidden else np.inf for f in sure}
                order = sorted(range(frames), key=sure.get)
                hidden = order[:stay]
                if mistake == "sorted once":  # takes the place in the order for the rank
                    hidden = [frame for frame in range(frames) if order[frame] < stay]
    return codes[:, frames - new :]


MISTAKES = (
    "all passes over every level",
    "levels above are seen",
    "kept frames are ranked again",
    "kept frames are drawn again",
    "greedy",
    "the last pass draws",
    "luck counts as confidence",
    "one pass behind",
    "a linear schedule",
    "the least sure are kept",
    "sorted once",
)


@pytest.fixture(scope="module")
def decoded(variables):
    """Returns the network's scores of one clip, keys, and the codes decoded with them."""

    def score(codes, masked, level):
        logits = apply(variables, codes[None], masked[None], level)[0]
        return log_softmax(np.asarray(logits, np.float64), axis=-1)

    keys = row_keys(jax.random.key(2), 8)
    filled = jax.jit(fill_fine, static_argnums=0)(MODULE, variables, CODES[:, :, :2], keys)
    return score, keys, np.asarray(filled)


def test_decoding_is_the_papers_algorithm(decoded):
    score, keys, filled = decoded
    assert filled.dtype == np.int32
    np.testing.assert_array_equal(filled, decode(score, CODES[:, :, :2], keys))


def test_a_window_continues_the_codes_of_its_past(variables, decoded):
    score, keys, whole = decoded
    past, coarse = CODES[:, :5], CODES[:, 5:, :2]
    filled = jax.jit(fill_fine, static_argnums=0)(MODULE, variables, coarse, keys, past)
    np.testing.assert_array_equal(filled, decode(score, coarse, keys, past=past))
    assert filled.shape == (8, 7, 5) and (filled != whole[:, 5:]).any()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught(decoded, mistake):
    score, keys, filled = decoded
    assert (decode(score, CODES[:, :, :2], keys, mistake) != filled).any()


@dataclasses.dataclass(frozen=True)
class TwoFrames:
    """A network for two frames: logits of the first fine level, given the other frame's code."""

    config: SoundStormConfig
    logits: np.ndarray  # [2, C + 1, C], of a frame given the other's code, C if hidden

    def apply(self, variables, codes, masked, level):
        first = self.config.coarse_levels
        other = jnp.where(masked, self.config.codes, codes)[:, ::-1, first]  # [B, 2]
        chosen = jnp.asarray(self.logits)[jnp.arange(2)[None], other]  # [B, 2, C]
        return jnp.where(level == first, chosen, jnp.zeros_like(chosen))


def test_two_frames_have_the_enumerated_distribution():
    config = dataclasses.replace(CONFIG, codes=3, levels=3, coarse_levels=2, first_passes=2)
    logits = np.random.default_rng(1).normal(size=(2, 4, 3)).astype(np.float32)
    scores = log_softmax(logits.astype(np.float64), axis=-1)
    expected = collections.Counter()
    # The first of two passes draws a pair and hides floor(2 cos(pi / 4)) = 1 frame again.
    for pair in itertools.product(range(3), repeat=2):
        sure = int(scores[1, 3, pair[1]] > scores[0, 3, pair[0]])
        codes = list(pair)
        codes[1 - sure] = int(scores[1 - sure, pair[sure]].argmax())
        expected[tuple(codes)] += np.exp(scores[0, 3, pair[0]] + scores[1, 3, pair[1]])
    clips = 6000
    coarse, keys = np.zeros((clips, 2, 2), np.int32), row_keys(jax.random.key(0), clips)
    filled = jax.jit(lambda coarse, keys: fill_fine(TwoFrames(config, logits), {}, coarse, keys))(
        coarse, keys
    )
    counts = collections.Counter(map(tuple, np.asarray(filled)[:, :, 2].tolist()))
    assert set(counts) == set(expected) and len(expected) > 3
    shares = [clips * p for p in expected.values()]
    assert chisquare([counts[codes] for codes in expected], shares).pvalue > 0.01


def test_a_clip_does_not_depend_on_its_batch(variables, decoded):
    _, keys, filled = decoded
    alone = fill_fine(MODULE, variables, CODES[1:2, :, :2], keys[1:2])
    np.testing.assert_array_equal(alone[0], filled[1])


def test_the_network_is_compiled_once_for_any_number_of_passes(variables):
    def products(first_passes):
        module = SoundStorm(dataclasses.replace(CONFIG, first_passes=first_passes))
        keys = row_keys(jax.random.key(0), 8)
        program = jax.make_jaxpr(lambda c, k: fill_fine(module, variables, c, k))
        return str(program(CODES[:, :, :2], keys)).count("dot_general")

    network = jax.make_jaxpr(MODULE.apply)(variables, CODES, CODES == 0, 2)
    sampler = jax.make_jaxpr(sample_codes)(jnp.zeros((1, 6)), jnp.zeros((1, 2)))
    single = sum(str(program).count("dot_general") for program in (network, sampler))
    assert products(1) == products(16) == single


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("coarse_levels", 5, "coarse_levels=5 must be between"),
        ("first_passes", 0, "first_passes=0 must be at least 1"),
    ],
)
def test_bad_sizes_are_refused(field, value, complaint):
    with pytest.raises(ValueError, match=complaint):
        dataclasses.replace(CONFIG, **{field: value})
