"""Each measurement on sounds made for it, and finite numbers for sounds that are no music."""

import numpy as np
import pytest
from scipy.signal import square

from musicrl_jax.arena import ears
from musicrl_jax.arena.ears import MEASURED, RATE_HZ, Ears, analyse
from musicrl_jax.arena.listeners import MEASUREMENTS

SECONDS = 4
TIME = np.arange(SECONDS * RATE_HZ) / RATE_HZ
C_MAJOR = [60, 64, 67, 60, 65, 69, 64, 72]
OWN = MEASUREMENTS.index("instrument_agreement")


# --- sounds ---


def tone(midi, wave=np.sin):
    return wave(2 * np.pi * 440 * 2 ** ((midi - 69) / 12) * TIME)


def melody(notes, bpm=120, wave=np.sin, jitter=0.0):
    """Returns a decaying note a beat, which starts up to `jitter` beats off."""
    rng, out, beat = np.random.default_rng(0), np.zeros(len(TIME)), 60 / bpm
    for i in range(int(SECONDS / beat)):
        since = TIME - (i + jitter * rng.uniform(-1, 1)) * beat
        decay = np.where(since >= 0, np.exp(-np.maximum(since, 0) * 8), 0)
        out += decay * tone(notes[i % len(notes)], wave)
    return (0.3 * out / np.abs(out).max()).astype(np.float32)


def noise(level=0.1):
    return (level * np.random.default_rng(1).normal(size=len(TIME))).astype(np.float32)


def measure(name, wav, **request):
    return MEASURED[name].function(analyse(wav), request)


# --- measurements ---


def test_notes_of_a_key_are_consonant_and_fit_their_own_key_best():
    wav = melody(C_MAJOR)
    assert measure("consonance", wav) > measure("consonance", melody(range(60, 72))) + 0.2
    clip = analyse(wav)
    fits = {
        key: ears.key_agreement(clip, {"key": key, "mode": "major"})
        for key in ("C", "D flat", "F sharp", "E")
    }
    assert max(fits, key=fits.get) == "C" and fits["C"] > 0.6
    assert fits["C"] > ears.key_agreement(clip, {"key": "C", "mode": "minor"})


@pytest.mark.parametrize(
    ("key", "tonic"), [("F sharp", 6), ("B flat", 10), ("A", 9), ("E flat", 3), ("C sharp", 1)]
)
def test_keys_are_read_by_their_names(key, tonic):
    clip = analyse(melody([note + tonic for note in C_MAJOR]))
    agreement = ears.key_agreement(clip, {"key": key, "mode": "major"})
    assert agreement == pytest.approx(ears.key_fits(clip).max())


def test_a_steady_beat_repeats_more_than_a_loose_one():
    assert measure("beat", melody(C_MAJOR)) > measure("beat", melody(C_MAJOR, jitter=0.4)) + 0.1


def test_a_tempo_agrees_with_itself_and_its_multiples():
    clip = analyse(melody(C_MAJOR, bpm=100))
    for tempo, agrees in ((100, True), (50, True), (200, True), (125, False), (88, False)):
        assert (ears.tempo_agreement(clip, {"tempo_bpm": tempo}) > 0.5) == agrees, tempo


def test_timbre_and_level():
    soft, harsh = melody(C_MAJOR), melody(C_MAJOR, wave=square)
    steady = 0.3 * tone(60).astype(np.float32)
    assert measure("brightness", harsh) > measure("brightness", soft) + 0.5
    assert measure("roughness", noise()) > measure("roughness", soft) + 10
    assert measure("harmonicity", steady) > 0.9 > 0.8 > measure("harmonicity", noise())
    assert measure("loudness_range", soft) > measure("loudness_range", steady) + 5
    holes = np.where((TIME > 1) & (TIME < 2), 0, soft).astype(np.float32)
    assert measure("gaps", holes) > measure("gaps", soft) + 0.15


@pytest.mark.parametrize(
    ("attribute", "values", "wavs"),
    [
        ("register", ears.REGISTERS, {"low": ([43, 45], 120), "high": ([79, 76], 120)}),
        (
            "density",
            ears.DENSITIES,
            {"sparse": (C_MAJOR, 80), "steady": (C_MAJOR, 220), "busy": (C_MAJOR, 440)},
        ),
    ],
)
def test_register_and_density_agree_best_with_their_own(attribute, values, wavs):
    function = MEASURED[f"{attribute}_agreement"].function
    for own, (notes, bpm) in wavs.items():
        clip = analyse(melody(notes, bpm))
        agreement = {value: function(clip, {attribute: value}) for value in values}
        assert max(agreement, key=agreement.get) == own


# --- ears that are fitted to real clips ---


@pytest.fixture(scope="module")
def clips():
    """Returns twelve clips of two families, with their attributes."""
    clips = []
    for i in range(12):
        wave, family = ((np.sin, "flutes"), (square, "reeds"))[i % 2]
        attributes = {"family": family, "tempo_bpm": 80 + 10 * i}
        attributes |= {"register": "middle", "density": "sparse"}
        wav = melody([note + i % 5 for note in C_MAJOR], 80 + 10 * i, wave)
        clips.append((wav, attributes))
    return clips


@pytest.fixture(scope="module")
def panel_ears(clips):
    return Ears(*zip(*clips, strict=True))


def test_a_real_clip_is_near_zero_and_noise_is_far_below(panel_ears, clips):
    real = np.mean([panel_ears.measure(*clip) for clip in clips], axis=0)
    bad = panel_ears.measure(noise(), clips[0][1])
    assert real.shape == (len(MEASUREMENTS),) and np.abs(real).max() < 1
    assert bad.mean() < real.mean() - 1 and bad[MEASUREMENTS.index("roughness")] < -1


def test_the_requested_family_is_recognised(panel_ears, clips):
    wav, request = clips[0]
    other = panel_ears.measure(wav, {**request, "family": "reeds"})
    assert panel_ears.measure(wav, request)[OWN] > other[OWN] + 1


def test_attributes_without_a_request_are_zero(panel_ears, clips):
    result = panel_ears.measure(clips[0][0], {"key": None, "family": None})
    for name, row in MEASURED.items():
        assert not row.attribute or result[MEASUREMENTS.index(name)] == 0, name
    assert np.count_nonzero(result) >= 5


@pytest.mark.parametrize(
    "wav", [np.zeros(RATE_HZ), np.full(RATE_HZ, np.nan), np.ones(RATE_HZ), noise()[:RATE_HZ] * 30]
)
@pytest.mark.filterwarnings("ignore:Trying to estimate tuning")
def test_sounds_that_are_no_music_have_finite_measurements(panel_ears, wav):
    request = {"family": "reeds", "key": "C", "mode": "minor", "tempo_bpm": 90}
    request |= {"register": "low", "density": "busy"}
    assert np.isfinite(panel_ears.measure(wav, request)).all()


def test_without_two_known_families_the_instrument_is_not_measured(clips):
    one_family = list(zip(*clips[:4:2], strict=True))
    no_family = [wav for wav, _ in clips[:4]], [{}] * 4
    for wavs, attributes in (one_family, no_family):
        result = Ears(wavs, attributes).measure(*clips[0])
        assert result[OWN] == 0 and np.count_nonzero(result) >= 5


def test_a_request_is_measured_in_units_of_clips_that_have_it(clips):
    """Clips without a key do not change the scale of keys."""
    key = MEASUREMENTS.index("key_agreement")
    named = [(wav, {**attributes, "key": "C", "mode": "major"}) for wav, attributes in clips[:5]]
    alone, among = Ears(*zip(*named, strict=True)), Ears(*zip(*named, *clips[:5], strict=True))
    values = [alone.measure(*clip)[key] for clip in named]
    assert among.measure(*named[3])[key] == pytest.approx(values[3])
    assert np.mean(values) == pytest.approx(0, abs=0.3)
