"""The ears of simulated listeners: measurements of a waveform, in units of real clips' spread.

librosa's signal processing gives the measurements, and a logistic regression on MFCCs the family of
the instrument. The README says how well they work on real clips.

Legend: N samples, T frames, M measurements.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import librosa
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from musicrl_jax.arena.listeners import MEASUREMENTS
from musicrl_jax.core.progress import Progress

RATE_HZ = 16_000  # sample rate of all clips
FFT, HOP = 1024, 256
SILENT = 1e-4  # root mean square of a silent frame, -80 dB
FARTHEST = 4.0  # standard deviations; larger deviations count as this one
REAL_DISTANCE = 0.8  # mean |z| of real clips, for a normal z
MULTIPLES = (1 / 3, 1 / 2, 2 / 3, 1.0, 3 / 2, 2.0, 3.0)  # of a tempo that count as the same
TEMPO_TOLERANCE = 0.08
REGISTERS = {"low": 48.0, "middle": 60.0, "high": 74.0}  # expected median pitch, MIDI numbers
DENSITIES = {"sparse": 1.5, "steady": 3.5, "busy": 7.0}  # onsets a second
# Krumhansl and Kessler's key profiles, by semitones above the tonic.
MAJOR = (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88)
MINOR = (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)

Attributes = Mapping[str, Any]  # of a clip or a request: key, mode, tempo_bpm, family, ...


@dataclasses.dataclass(frozen=True)
class Clip:
    """A waveform with the features that several measurements need."""

    wav: np.ndarray  # f32 [N], at RATE_HZ
    magnitude: np.ndarray  # [FFT / 2 + 1, T]
    rms: np.ndarray  # [T]
    onsets: np.ndarray  # [T], onset strength
    chroma: np.ndarray  # [12], mean over frames, sum 1


def analyse(wav: np.ndarray) -> Clip:
    """Computes the features of a waveform f32 [N] at RATE_HZ, in [-1, 1]."""
    # Generated clips may have NaN.
    wav = np.nan_to_num(np.asarray(wav, np.float32))
    magnitude = np.abs(librosa.stft(wav, n_fft=FFT, hop_length=HOP))
    chroma = librosa.feature.chroma_stft(S=magnitude**2, sr=RATE_HZ, tuning=0.0).mean(axis=1)
    decibels = librosa.power_to_db(magnitude**2, ref=1.0, top_db=80)
    onsets = librosa.onset.onset_strength(S=decibels, sr=RATE_HZ)
    rms = np.sqrt(np.mean(magnitude**2, axis=0)) / np.sqrt(FFT)
    return Clip(wav, magnitude, rms, onsets, chroma / max(chroma.sum(), 1e-9))


# --- measurements: of a clip, given the attributes that its prompt asks for ---


def key_profiles() -> np.ndarray:
    """Returns [24, 12]: 12 major keys from C up, then 12 minor; each with mean 0 and length 1."""
    keys = []
    for profile in (MAJOR, MINOR):
        keys += [np.roll(profile, shift) for shift in range(12)]
    profiles = np.stack(keys)
    profiles = profiles - profiles.mean(axis=1, keepdims=True)
    return profiles / np.linalg.norm(profiles, axis=1, keepdims=True)


def key_fits(clip: Clip) -> np.ndarray:
    """Returns [24]: correlation of chroma and each key's profile, in [-1, 1]; 0 for silence."""
    centred = clip.chroma - clip.chroma.mean()
    return key_profiles() @ (centred / max(np.linalg.norm(centred), 1e-9))


def consonance(clip: Clip, request: Attributes) -> float:
    """Returns the best correlation of the notes with any key."""
    return float(key_fits(clip).max())


def beat(clip: Clip, request: Attributes) -> float:
    """Returns the peak of the onsets' autocorrelation at lags of 0.2 to 1.5 s: a steady beat."""
    # Relative to the autocorrelation at lag 0.
    repeats = librosa.autocorrelate(clip.onsets - clip.onsets.mean())
    low, high = librosa.time_to_frames((0.2, 1.5), sr=RATE_HZ, hop_length=HOP)
    return float(repeats[low:high].max(initial=0.0) / max(repeats[0], 1e-9))


def loudness_range(clip: Clip, request: Attributes) -> float:
    """Returns the decibels between the 10th and the 95th percentile of the frames' levels."""
    low, high = np.percentile(20 * np.log10(np.maximum(clip.rms, SILENT)), (10, 95))
    return float(high - low)


def brightness(clip: Clip, request: Attributes) -> float:
    """Returns the spectral centroid in octaves above 100 Hz, weighted by level."""
    centroid = librosa.feature.spectral_centroid(S=clip.magnitude + 1e-9, sr=RATE_HZ)[0]
    return float(np.log2(np.average(centroid, weights=clip.rms + 1e-9) / 100))


def roughness(clip: Clip, request: Attributes) -> float:
    """Returns the median spectral flatness in decibels: near 0 for noise, far below for tones."""
    flatness = librosa.feature.spectral_flatness(S=clip.magnitude + 1e-6)[0]
    return float(np.median(10 * np.log10(flatness)))


def key_agreement(clip: Clip, request: Attributes) -> float:
    """Returns the correlation of the notes with the requested key; 0 without one."""
    if not request.get("key") or request.get("mode") not in ("major", "minor"):
        return 0.0
    # Minor keys follow the 12 major ones.
    tonic = librosa.note_to_midi(request["key"].replace(" sharp", "#").replace(" flat", "b")) % 12
    return float(key_fits(clip)[tonic + 12 * (request["mode"] == "minor")])


def tempo_agreement(clip: Clip, request: Attributes) -> float:
    """Returns 1 at the requested tempo or a metrical multiple, less elsewhere; 0 without one."""
    if not request.get("tempo_bpm"):
        return 0.0
    tempo = librosa.feature.tempo(onset_envelope=clip.onsets, sr=RATE_HZ, hop_length=HOP)[0]
    octaves = min(abs(np.log2(tempo / (request["tempo_bpm"] * times))) for times in MULTIPLES)
    return float(np.exp(-((octaves / np.log2(1 + TEMPO_TOLERANCE)) ** 2)))


def harmonicity(clip: Clip, request: Attributes) -> float:
    """Returns the share of energy in steady tones, which median filtering separates."""
    # Below 4 kHz every other frame gives much the same in a quarter of the time.
    below = clip.magnitude[: FFT // 4, ::2]
    harmonic, _ = librosa.decompose.hpss(below, kernel_size=(15, 31))
    return float(np.sum(harmonic**2) / max(np.sum(below**2), 1e-9))


def register_agreement(clip: Clip, request: Attributes) -> float:
    """Returns minus the octaves between median pitch and requested register; 0 without one."""
    if request.get("register") not in REGISTERS:
        return 0.0
    # Pitch of loud frames; its hop is 4 HOP.
    pitch = librosa.yin(
        clip.wav, fmin=60, fmax=2000, sr=RATE_HZ, frame_length=2048, hop_length=4 * HOP
    )
    loud = clip.rms[::4][: len(pitch)] >= max(np.median(clip.rms), SILENT)
    if not loud.any():
        return -4.0
    median = np.median(librosa.hz_to_midi(pitch[: len(loud)][loud]))
    return -float(abs(median - REGISTERS[request["register"]]) / 12)


def density_agreement(clip: Clip, request: Attributes) -> float:
    """Returns minus the octaves between onset rate and requested density; 0 without one."""
    if request.get("density") not in DENSITIES:
        return 0.0
    # Half an onset more, so that the logarithm of none is finite.
    count = len(librosa.onset.onset_detect(onset_envelope=clip.onsets, sr=RATE_HZ, hop_length=HOP))
    rate = (count + 0.5) / (len(clip.wav) / RATE_HZ)
    return -float(abs(np.log2(rate / DENSITIES[request["density"]])))


def gaps(clip: Clip, request: Attributes) -> float:
    """Returns the share of frames 40 dB below the loudest: holes in the music."""
    return float(np.mean(clip.rms < max(clip.rms.max() / 100, SILENT)))


class Measurement(NamedTuple):
    """A row of MEASURED.

    Attributes:
      function: computes it; None for the instrument, which a classifier scores.
      better: whether "more" of it is better, "less", or as much as in real clips ("near").
      attribute: the attribute that a prompt must ask for; '' for measurements of all clips.
    """

    function: Callable[[Clip, Attributes], float] | None
    better: str
    attribute: str = ""


FAMILY = "instrument_agreement"
MEASURED = {
    "consonance": Measurement(consonance, "more"),
    "beat": Measurement(beat, "more"),
    "loudness_range": Measurement(loudness_range, "near"),
    "brightness": Measurement(brightness, "near"),
    "roughness": Measurement(roughness, "less"),
    "key_agreement": Measurement(key_agreement, "more", "key"),
    "tempo_agreement": Measurement(tempo_agreement, "more", "tempo_bpm"),
    FAMILY: Measurement(None, "more", "family"),
    "harmonicity": Measurement(harmonicity, "near"),
    "register_agreement": Measurement(register_agreement, "more", "register"),
    "density_agreement": Measurement(density_agreement, "more", "density"),
    "gaps": Measurement(gaps, "less"),
}
assert tuple(MEASURED) == MEASUREMENTS  # the order of an array's measurements


# --- the instrument's family ---


def timbre(clip: Clip) -> np.ndarray:
    """Returns [80]: means and spreads of 20 MFCCs and of their differences, over loud frames."""
    loud = clip.rms >= np.median(clip.rms)
    mel = librosa.feature.melspectrogram(S=clip.magnitude**2, sr=RATE_HZ, n_mels=64)
    mfcc = librosa.feature.mfcc(S=librosa.power_to_db(mel, ref=np.max, top_db=80), n_mfcc=20)
    mfcc = mfcc[:, loud]
    change = np.diff(mfcc, axis=1)
    parts = mfcc.mean(axis=1), mfcc.std(axis=1), change.mean(axis=1), change.std(axis=1)
    return np.concatenate(parts)


def _fit_classifier(timbres: np.ndarray, families: np.ndarray) -> Pipeline | None:
    """Fits a classifier of families by timbre; None if fewer than two families are known."""
    known = families != ""
    if len(set(families[known])) < 2:
        return None
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=2000))
    return classifier.fit(timbres[known], families[known])


def _log_probability(classifier: Pipeline, timbre: np.ndarray, family: str) -> float:
    """Returns the log-probability of a family, in nats; at least log 0.001."""
    chances = dict(zip(classifier.classes_, classifier.predict_proba(timbre[None])[0], strict=True))
    return float(np.log(max(chances.get(family, 0.0), 1e-3)))


# --- the ears ---


class Ears:
    """Measurements in units of their spread over real clips. No model of this project is used."""

    def __init__(self, wavs: Sequence[np.ndarray], attributes: Sequence[Attributes]):
        """Fits the scales to real clips f32 [N] at RATE_HZ and their attributes.

        If fewer than two families of instruments are known, the instrument is not measured.
        """
        clips = [analyse(wav) for wav in Progress(wavs, "ears", len(wavs))]

        # A classifier is overconfident on clips that it was fitted to, so that each half of the
        # clips is scored by one that was fitted to the other half.
        families = np.asarray([own.get("family") or "" for own in attributes])
        timbres = np.stack([timbre(clip) for clip in clips])
        half = np.random.default_rng(0).permutation(len(clips)) % 2
        halves = [_fit_classifier(timbres[half == n], families[half == n]) for n in (0, 1)]
        self._classifier = _fit_classifier(timbres, families) if all(halves) else None
        scores = np.zeros(len(clips))
        if self._classifier is not None:
            for i in np.flatnonzero(families != ""):
                scores[i] = _log_probability(halves[1 - half[i]], timbres[i], families[i])

        # The scale of a measurement is that of the clips that have its attribute.
        values = np.array(list(map(_measure, clips, attributes, scores)))
        self._centre, self._spread = np.zeros(len(MEASURED)), np.ones(len(MEASURED))
        for number, name in enumerate(MEASURED):
            own = values[[_applies(name, each) for each in attributes], number]
            if len(own):
                self._centre[number], self._spread[number] = own.mean(), max(own.std(), 1e-6)

    def measure(self, wav: np.ndarray, request: Attributes) -> np.ndarray:
        """Returns measurements f64 [M] in [-4, 4], in the order of `listeners.MEASUREMENTS`.

        Higher is better, and real clips have about 0. Attributes that the prompt does not ask for
        have 0.
        """
        # Raw measurements, in units of real clips' spread.
        clip, score = analyse(wav), 0.0
        if self._classifier is not None and request.get("family"):
            score = _log_probability(self._classifier, timbre(clip), request["family"])
        z = (_measure(clip, request, score) - self._centre) / self._spread
        z = np.clip(z, -FARTHEST, FARTHEST)
        # Higher becomes better.
        better = {"more": z, "less": -z, "near": REAL_DISTANCE - np.abs(z)}
        result = np.zeros(len(MEASURED))
        for number, (name, row) in enumerate(MEASURED.items()):
            if _applies(name, request) and (name != FAMILY or self._classifier is not None):
                result[number] = better[row.better][number]
        return result


def _applies(name: str, request: Attributes) -> bool:
    """Tells whether a request asks for a measurement's attribute, if it has one."""
    return not MEASURED[name].attribute or bool(request.get(MEASURED[name].attribute))


def _measure(clip: Clip, request: Attributes, family_score: float) -> np.ndarray:
    """Returns raw measurements, f64 [M]."""
    return np.array(
        [row.function(clip, request) if row.function else family_score for row in MEASURED.values()]
    )
