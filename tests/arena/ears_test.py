"""Each measurement on sounds made for it, and nothing but numbers for sounds that are no music."""

import numpy as np
import pytest
from scipy.signal import square

from musicrl_jax.arena import ears
from musicrl_jax.arena.ears import MEASURED, RATE_HZ, Ears, hear
from musicrl_jax.arena.listeners import MEASUREMENTS

SECONDS = 4
TIME = np.arange(SECONDS * RATE_HZ) / RATE_HZ
C_MAJOR = [60, 64, 67, 60, 65, 69, 64, 72]


def tone(midi, wave=np.sin):
    return wave(2 * np.pi * 440 * 2 ** ((midi - 69) / 12) * TIME)


def melody(notes, bpm=120, wave=np.sin, jitter=0.0):
    """A note a beat, each with a sharp start and a decay; the starts off the beat by up to `jitter` of it."""
    rng, out, beat = np.random.default_rng(0), np.zeros(len(TIME)), 60 / bpm
    for i in range(int(SECONDS / beat)):
        since = TIME - (i + jitter * rng.uniform(-1, 1)) * beat
        out += np.where(since >= 0, np.exp(-np.maximum(since, 0) * 8), 0) * tone(
            notes[i % len(notes)], wave
        )
    return (0.3 * out / np.abs(out).max()).astype(np.float32)


def noise(level=0.1):
    return (level * np.random.default_rng(1).normal(size=len(TIME))).astype(np.float32)


def heard(name, wav, **asked):
    return MEASURED[name][0](hear(wav), asked)


def test_notes_of_a_key_are_consonant_and_fit_their_own_key_best():
    wav = melody(C_MAJOR)
    assert heard("consonance", wav) > heard("consonance", melody(range(60, 72))) + 0.2
    fits = {
        key: heard("key_agreement", wav, key=key, mode="major")
        for key in ("C", "D flat", "F sharp", "E")
    }
    assert max(fits, key=fits.get) == "C" and fits["C"] > 0.6
    assert heard("key_agreement", wav, key="C", mode="major") > heard(
        "key_agreement", wav, key="C", mode="minor"
    )


@pytest.mark.parametrize("key", ["F sharp", "B flat", "A", "E flat", "C sharp"])
def test_keys_are_read_by_their_names(key):
    tonic = {"F sharp": 6, "B flat": 10, "A": 9, "E flat": 3, "C sharp": 1}[key]
    wav = melody([note + tonic for note in C_MAJOR])
    assert heard("key_agreement", wav, key=key, mode="major") == pytest.approx(
        ears.key_fits(hear(wav)).max()
    )


def test_a_steady_beat_repeats_more_than_a_loose_one():
    assert heard("beat", melody(C_MAJOR)) > heard("beat", melody(C_MAJOR, jitter=0.4)) + 0.1


@pytest.mark.parametrize(
    ("asked", "agrees"), [(100, True), (50, True), (200, True), (125, False), (88, False)]
)
def test_a_tempo_agrees_with_itself_and_its_multiples(asked, agrees):
    assert (heard("tempo_agreement", melody(C_MAJOR, bpm=100), tempo_bpm=asked) > 0.5) == agrees


def test_timbre_and_level():
    soft, harsh = melody(C_MAJOR), melody(C_MAJOR, wave=square)
    assert heard("brightness", harsh) > heard("brightness", soft) + 0.5
    assert heard("roughness", noise()) > heard("roughness", soft) + 10
    assert (
        heard("harmonicity", 0.3 * tone(60).astype(np.float32))
        > 0.9
        > 0.8
        > heard("harmonicity", noise())
    )
    assert (
        heard("loudness_range", soft)
        > heard("loudness_range", 0.3 * tone(60).astype(np.float32)) + 5
    )
    holes = np.where((TIME > 1) & (TIME < 2), 0, soft).astype(np.float32)
    assert heard("gaps", holes) > heard("gaps", soft) + 0.15


def test_register_and_density_are_those_asked_for():
    low, high = melody([43, 45]), melody([79, 76])
    for wav, register in ((low, "low"), (high, "high")):
        found = {name: heard("register_agreement", wav, register=name) for name in ears.REGISTERS}
        assert max(found, key=found.get) == register
    for bpm, density in ((80, "sparse"), (220, "steady"), (440, "busy")):
        found = {
            name: heard("density_agreement", melody(C_MAJOR, bpm), density=name)
            for name in ears.DENSITIES
        }
        assert max(found, key=found.get) == density


@pytest.fixture(scope="module")
def clips():
    """Twelve clips of two families and what is true of them."""
    made = []
    for i in range(12):
        wave, family = ((np.sin, "flutes"), (square, "reeds"))[i % 2]
        bpm = 80 + 10 * i
        notes = [note + i % 5 for note in C_MAJOR]
        asked = {"family": family, "tempo_bpm": bpm, "register": "middle", "density": "sparse"}
        made.append((melody(notes, bpm, wave), asked))
    return made


@pytest.fixture(scope="module")
def panel_ears(clips):
    return Ears(*zip(*clips, strict=True))


def test_a_real_clip_is_near_zero_and_noise_is_far_below(panel_ears, clips):
    real = np.mean([panel_ears.measure(*clip) for clip in clips], axis=0)
    bad = panel_ears.measure(noise(), clips[0][1])
    assert real.shape == (len(MEASUREMENTS),) and np.abs(real).max() < 1
    assert bad.mean() < real.mean() - 1 and bad[MEASUREMENTS.index("roughness")] < -1


def test_the_family_asked_for_is_heard(panel_ears, clips):
    own = MEASUREMENTS.index("instrument_agreement")
    wav, asked = clips[0]
    assert (
        panel_ears.measure(wav, asked)[own]
        > panel_ears.measure(wav, {**asked, "family": "reeds"})[own] + 1
    )


def test_what_is_not_asked_for_is_not_judged(panel_ears, clips):
    found = panel_ears.measure(clips[0][0], {"key": None, "family": None})
    names = (
        "key_agreement",
        "tempo_agreement",
        "register_agreement",
        "density_agreement",
        "instrument_agreement",
    )
    assert all(found[MEASUREMENTS.index(name)] == 0 for name in names)
    assert np.count_nonzero(found) >= 5


@pytest.mark.parametrize(
    "wav", [np.zeros(RATE_HZ), np.full(RATE_HZ, np.nan), np.ones(RATE_HZ), noise()[:RATE_HZ] * 30]
)
@pytest.mark.filterwarnings("ignore:Trying to estimate tuning")
def test_sounds_that_are_no_music_give_numbers(panel_ears, wav):
    asked = {
        "family": "reeds",
        "key": "C",
        "mode": "minor",
        "tempo_bpm": 90,
        "register": "low",
        "density": "busy",
    }
    assert np.isfinite(panel_ears.measure(wav, asked)).all()


def test_where_families_are_unknown_the_instrument_is_not_judged(clips):
    own = MEASUREMENTS.index("instrument_agreement")
    for wavs, asked in (
        zip(*clips[::2], strict=True),
        ([wav for wav, _ in clips], [{} for _ in clips]),
    ):
        found = Ears(wavs, asked).measure(*clips[0])
        assert found[own] == 0 and np.count_nonzero(found) >= 5


def test_what_is_asked_for_is_measured_in_units_of_clips_that_have_it(clips):
    """Clips without a key do not move the scale on which keys are judged."""
    key = MEASUREMENTS.index("key_agreement")
    named = [(wav, {**asked, "key": "C", "mode": "major"}) for wav, asked in clips]
    alone, among = Ears(*zip(*named, strict=True)), Ears(*zip(*named, *clips, strict=True))
    wav, asked = named[3]
    assert among.measure(wav, asked)[key] == pytest.approx(alone.measure(wav, asked)[key])
    assert np.mean([alone.measure(*each)[key] for each in named]) == pytest.approx(0, abs=0.3)
