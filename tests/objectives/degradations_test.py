"""Each kind of damage against NumPy and SciPy; the distance grows with the strength."""

import functools

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
from scipy.signal import welch

from musicrl_jax.objectives import degradations

RATE = 16_000
KEY = jax.random.key(0)


# --- clips ---


def music(clips: int = 4) -> np.ndarray:
    """Returns harmonic tones with decaying notes, [clips, 16000]."""
    time = np.arange(RATE) / RATE
    decay = np.exp(-3 * (time % 0.25))
    tones = [
        sum(np.sin(2 * np.pi * hz * k * time) / k for k in range(1, 12))
        for hz in (220, 330, 440, 262)[:clips]
    ]
    return (0.2 * decay * np.stack(tones)).astype(np.float32)


def fixed(strength: float, rows: int = 4) -> jax.Array:
    return jnp.full((rows,), strength)


def crude_codec(wav: jax.Array, strength: jax.Array) -> jax.Array:
    """Replaces a codec: fewer levels are coarser steps."""
    step = 2.0 ** -degradations.remaining_levels(strength, 8).astype(jnp.float32)
    return jnp.round(wav / step[:, None]) * step[:, None]


@functools.partial(jax.jit, static_argnums=0)
def damaged(kind: str, wav: jax.Array, strength: jax.Array) -> jax.Array:
    call = {
        "codec": lambda: crude_codec(wav, strength),
        "noise": lambda: degradations.noise(KEY, wav, strength),
        "band_limit": lambda: degradations.band_limit(wav, strength, RATE),
        "clipping": lambda: degradations.clipping(wav, strength),
        "dropouts": lambda: degradations.dropouts(KEY, wav, strength, RATE),
        "wow": lambda: degradations.wow(KEY, wav, strength, RATE),
    }
    return call[kind]()


mos = jax.jit(lambda clean, wav: degradations.pseudo_mos(clean, wav, RATE))
distance = jax.jit(lambda clean, wav: degradations.distance(clean, wav, RATE))


# --- kinds of damage ---


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0])
def test_noise_has_the_stated_ratio(strength):
    clean = music()
    added = np.asarray(damaged("noise", clean, fixed(strength))) - clean
    ratio_db = 10 * np.log10((clean**2).mean(1) / (added**2).mean(1))
    np.testing.assert_allclose(ratio_db, 40 * (1 - strength), atol=0.05)
    _, power = welch(added[0], RATE, nperseg=512)
    assert power[2:-2].max() < 4 * power[2:-2].min()  # white


def test_noise_leaves_silence_silent():
    np.testing.assert_array_equal(damaged("noise", np.zeros((4, RATE), np.float32), fixed(1.0)), 0)


@pytest.mark.parametrize(("strength", "cutoff"), [(0.5, 2000.0), (1.0, 500.0)])
def test_band_limit_has_the_stated_cutoff(strength, cutoff):
    white = np.random.default_rng(0).normal(size=(4, RATE)).astype(np.float32)
    hz = np.fft.rfftfreq(RATE, 1 / RATE)
    before = np.abs(np.fft.rfft(white)) ** 2
    after = np.abs(np.fft.rfft(np.asarray(damaged("band_limit", white, fixed(strength))))) ** 2
    gain_db = 10 * np.log10(after.sum(0) / before.sum(0) + 1e-20)
    np.testing.assert_allclose(gain_db[hz < cutoff / 2], 0, atol=0.01)
    np.testing.assert_allclose(gain_db[hz == cutoff], -10 * np.log10(2), atol=0.01)
    np.testing.assert_allclose(gain_db[hz == 2 * cutoff], -48, atol=0.5)
    assert gain_db[hz > 3 * cutoff].max() < -60


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_clipping_flattens_peaks_and_keeps_loudness(strength):
    clean = music()
    cut = np.asarray(damaged("clipping", clean, fixed(strength)))
    limit = np.abs(clean).max(1, keepdims=True) * 10 ** (-30 * strength / 20)
    flat = np.clip(clean, -limit, limit)
    gain = np.sqrt((clean**2).mean(1) / (flat**2).mean(1))
    np.testing.assert_allclose(cut, flat * gain[:, None], atol=1e-5)
    np.testing.assert_allclose((cut**2).mean(1), (clean**2).mean(1), rtol=1e-4)
    assert np.all(np.abs(cut).max(1) <= np.abs(clean).max(1) + 1e-6)


def test_dropouts_silence_whole_stretches():
    clean = np.tile(music(), (10, 1)) + 0.01
    got = np.asarray(damaged("dropouts", clean, fixed(0.3, 40)))
    blocks = got.reshape(40, 20, 800)
    silent = np.all(blocks == 0, axis=2)
    unchanged = np.all(blocks == clean.reshape(40, 20, 800), axis=2)
    assert np.all(silent | unchanged)
    np.testing.assert_allclose(silent.mean(), 0.3, atol=0.06)
    np.testing.assert_array_equal(damaged("dropouts", clean, fixed(1.0, 40)), 0)


def test_wow_is_resampling_along_a_sine():
    clean = music()
    strength = np.array([0.25, 0.5, 0.75, 1.0], np.float32)
    got = np.asarray(damaged("wow", clean, strength))
    phase = np.asarray(jax.random.uniform(KEY, (4, 1), maxval=2 * np.pi))
    n = np.arange(RATE)
    sway = 2 * np.pi * 4 / RATE
    for row in range(4):
        place = n + 0.06 * strength[row] / sway * np.sin(sway * n + phase[row])
        np.testing.assert_allclose(got[row], np.interp(place, n, clean[row]), atol=2e-3)
    # The pitch of a steady tone swings by 6 % both ways.
    tone = np.sin(2 * np.pi * 440 * n / RATE).astype(np.float32)
    swung = np.asarray(damaged("wow", np.stack([tone] * 4), fixed(1.0)))[0]
    crossings = np.flatnonzero(np.diff(np.signbit(swung)))
    hz = RATE / (2 * np.diff(crossings))
    smooth = np.convolve(hz, np.ones(8) / 8, mode="valid")[20:-20]
    np.testing.assert_allclose([smooth.min() / 440, smooth.max() / 440], [0.94, 1.06], atol=0.02)


def test_remaining_levels_fall_from_all_to_one():
    strength = jnp.array([0.0, 0.12, 0.13, 0.5, 0.99, 1.0])
    np.testing.assert_array_equal(degradations.remaining_levels(strength, 8), [8, 8, 7, 4, 1, 1])


# --- distance and label ---


@pytest.mark.parametrize("kind", degradations.KINDS[1:])
def test_stronger_damage_is_farther_and_scores_less(kind):
    clean = music()
    clips = [damaged(kind, clean, fixed(strength)) for strength in (0.1, 0.4, 0.7, 1.0)]
    distances = [np.asarray(distance(clean, wav)) for wav in clips]
    assert np.all(np.diff(distances, axis=0) > 0)
    weak, strong = (np.asarray(mos(clean, wav)) for wav in (clips[0], clips[-1]))
    assert np.all((weak > strong) & (weak <= 5) & (strong > 1))


def test_distance_equals_librosa():
    clean = music()
    other = np.asarray(damaged("noise", clean, fixed(0.5)))
    expected = []
    for a, b in zip(clean, other, strict=True):
        gaps = []
        for window in (512, 2048):
            filters = librosa.filters.mel(sr=RATE, n_fft=window, n_mels=64)
            hop = window // 4
            mels = []
            for wav in (a, b):
                padded = np.pad(wav, ((window - hop) // 2, window))
                frames = np.stack([padded[s * hop : s * hop + window] for s in range(RATE // hop)])
                mels.append(np.abs(np.fft.rfft(frames * np.hanning(window + 1)[:-1])) @ filters.T)
            first, second = np.maximum(mels, 1e-3 * mels[0].max())
            gaps.append(np.abs(20 * np.log10(first / second)).mean())
        expected.append(np.mean(gaps))
    np.testing.assert_allclose(distance(clean, other), expected, rtol=1e-3)
    expected_mos = 1 + 4 * np.exp(-np.array(expected) / 12)
    np.testing.assert_allclose(mos(clean, other), expected_mos, rtol=1e-3)


# --- damage of a batch ---


@jax.jit
def degrade(key, wav, strength):
    return degradations.degrade(key, wav, strength, RATE, crude_codec)


def test_strength_zero_is_the_clean_clip_and_scores_five():
    wav = np.tile(music(), (4, 1))[:15]
    got = degrade(KEY, wav, jnp.zeros(15))
    np.testing.assert_array_equal(got, wav)
    np.testing.assert_array_equal(mos(wav, got), 5)


def test_kinds_are_balanced_and_depend_on_the_key():
    wav = np.tile(music(), (4, 1))[:15]
    kind = [*range(7), *range(7), 0]
    got, again, other = (
        degrade(key, wav, jnp.full(15, 0.6)) for key in (KEY, KEY, jax.random.key(1))
    )
    np.testing.assert_array_equal(got, again)
    changed = np.any(np.asarray(got) != wav, axis=1)
    np.testing.assert_array_equal(changed, np.asarray(kind) > 0)
    differs = np.any(np.asarray(got) != np.asarray(other), axis=1)
    random = [degradations.KINDS.index(name) for name in ("noise", "dropouts", "wow")]
    np.testing.assert_array_equal(differs, np.isin(kind, random))
    alone = damaged("clipping", wav[4:5], jnp.full(1, 0.6))
    np.testing.assert_allclose(got[4], alone[0], atol=1e-6)
