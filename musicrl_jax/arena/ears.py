"""What simulated listeners hear: measurements of a waveform by librosa's signal processing, and a logistic regression
on MFCCs for the family of the instrument. In units of their spread over real clips.

How well they hear, over real clips, stands in the README.

Legend: N samples, P clips, M measurements.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import librosa
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from musicrl_jax.arena.listeners import MEASUREMENTS
from musicrl_jax.core.progress import Progress

RATE_HZ = 16_000  # that everything is heard at
FFT, HOP = 1024, 256
SILENT = 1e-4  # root mean square of a frame that counts as silence, -80 dB
FARTHEST = 4.0  # standard deviations; what is farther off is no worse
MULTIPLES = (1 / 3, 1 / 2, 2 / 3, 1.0, 3 / 2, 2.0, 3.0)  # of a tempo that count as the same
TEMPO_TOLERANCE = 0.08
REGISTERS = {
    "low": 48.0,
    "middle": 60.0,
    "high": 74.0,
}  # the median pitch to expect, in MIDI numbers
DENSITIES = {"sparse": 1.5, "steady": 3.5, "busy": 7.0}  # onsets a second
MAJOR = np.array(
    [6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88]
)  # Krumhansl and Kessler
MINOR = np.array([6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17])

Attributes = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Heard:
    """A clip as all measurements see it."""

    wav: np.ndarray  # f32 [N], at RATE_HZ
    magnitude: np.ndarray  # [FFT / 2 + 1, frames]
    rms: np.ndarray  # [frames]
    onsets: np.ndarray  # [frames], the onset strength
    chroma: np.ndarray  # [12], the mean, sum 1


def hear(wav: np.ndarray) -> Heard:
    """f32 [N] at RATE_HZ, in [-1, 1]."""
    wav = np.nan_to_num(np.asarray(wav, np.float32))
    magnitude = np.abs(librosa.stft(wav, n_fft=FFT, hop_length=HOP))
    chroma = librosa.feature.chroma_stft(S=magnitude**2, sr=RATE_HZ, tuning=0.0).mean(axis=1)
    onsets = librosa.onset.onset_strength(
        S=librosa.power_to_db(magnitude**2, ref=1.0, top_db=80), sr=RATE_HZ
    )
    rms = np.sqrt(np.mean(magnitude**2, axis=0)) / np.sqrt(FFT)
    return Heard(wav, magnitude, rms, onsets, chroma / max(chroma.sum(), 1e-9))


def key_profiles() -> np.ndarray:
    """[24, 12]: the 12 major keys from C up, then the minor ones; each of mean 0 and length 1."""
    profiles = np.stack(
        [np.roll(profile, shift) for profile in (MAJOR, MINOR) for shift in range(12)]
    )
    profiles = profiles - profiles.mean(axis=1, keepdims=True)
    return profiles / np.linalg.norm(profiles, axis=1, keepdims=True)


def key_fits(heard: Heard) -> np.ndarray:
    """[24]: how the chroma correlates with each key's profile, -1 to 1; 0 for silence."""
    centred = heard.chroma - heard.chroma.mean()
    return key_profiles() @ (centred / max(np.linalg.norm(centred), 1e-9))


def consonance(heard: Heard, asked: Attributes) -> float:
    """How well the notes fit the key that they fit best."""
    return float(key_fits(heard).max())


def beat(heard: Heard, asked: Attributes) -> float:
    """How much the onsets repeat after a steady time between 0.2 and 1.5 s: the peak of their autocorrelation."""
    centred = heard.onsets - heard.onsets.mean()
    repeats = librosa.autocorrelate(centred)
    low, high = (
        librosa.time_to_frames(seconds, sr=RATE_HZ, hop_length=HOP) for seconds in (0.2, 1.5)
    )
    return float(repeats[low:high].max(initial=0.0) / max(repeats[0], 1e-9))


def loudness_range(heard: Heard, asked: Attributes) -> float:
    """Decibels between the 10th and the 95th percentile of the frames' levels."""
    low, high = np.percentile(20 * np.log10(np.maximum(heard.rms, SILENT)), (10, 95))
    return float(high - low)


def brightness(heard: Heard, asked: Attributes) -> float:
    """The spectral centroid in octaves above 100 Hz, weighed by level."""
    centroid = librosa.feature.spectral_centroid(S=heard.magnitude + 1e-9, sr=RATE_HZ)[0]
    return float(np.log2(np.average(centroid, weights=heard.rms + 1e-9) / 100))


def roughness(heard: Heard, asked: Attributes) -> float:
    """Decibels of spectral flatness, the median over frames: noise is near 0, tones are far below."""
    flatness = librosa.feature.spectral_flatness(S=heard.magnitude + 1e-6)[0]
    return float(np.median(10 * np.log10(flatness)))


def key_agreement(heard: Heard, asked: Attributes) -> float:
    """How much better the notes fit the key asked for than keys do on average; 0 where none was asked for."""
    if not asked.get("key") or asked.get("mode") not in ("major", "minor"):
        return 0.0
    tonic = librosa.note_to_midi(asked["key"].replace(" sharp", "#").replace(" flat", "b")) % 12
    return float(key_fits(heard)[tonic + 12 * (asked["mode"] == "minor")])


def tempo_agreement(heard: Heard, asked: Attributes) -> float:
    """1 where the tempo is the one asked for or a metrical multiple, falling to 0; 0 where none was asked for."""
    if not asked.get("tempo_bpm"):
        return 0.0
    found = librosa.feature.tempo(onset_envelope=heard.onsets, sr=RATE_HZ, hop_length=HOP)[0]
    off = min(abs(np.log2(found / (asked["tempo_bpm"] * multiple))) for multiple in MULTIPLES)
    return float(np.exp(-((off / np.log2(1 + TEMPO_TOLERANCE)) ** 2)))


def harmonicity(heard: Heard, asked: Attributes) -> float:
    """The share of energy that lasts in time rather than across frequencies (median filtering)."""
    below = heard.magnitude[
        : FFT // 4, ::2
    ]  # below 4 kHz and every other frame: a quarter of the time, much the same
    harmonic, _ = librosa.decompose.hpss(below, kernel_size=(15, 31))
    return float(np.sum(harmonic**2) / max(np.sum(below**2), 1e-9))


def register_agreement(heard: Heard, asked: Attributes) -> float:
    """Minus the octaves between the median pitch and the register asked for; 0 where none was."""
    if asked.get("register") not in REGISTERS:
        return 0.0
    pitch = librosa.yin(
        heard.wav, fmin=60, fmax=2000, sr=RATE_HZ, frame_length=2048, hop_length=4 * HOP
    )
    loud = heard.rms[::4][: len(pitch)] >= max(np.median(heard.rms), SILENT)
    if not loud.any():
        return -4.0
    median = np.median(librosa.hz_to_midi(pitch[: len(loud)][loud]))
    return -float(abs(median - REGISTERS[asked["register"]]) / 12)


def density_agreement(heard: Heard, asked: Attributes) -> float:
    """Minus the octaves between the rate of onsets and the density asked for; 0 where none was."""
    if asked.get("density") not in DENSITIES:
        return 0.0
    count = len(librosa.onset.onset_detect(onset_envelope=heard.onsets, sr=RATE_HZ, hop_length=HOP))
    rate = (count + 0.5) / (len(heard.wav) / RATE_HZ)
    return -float(abs(np.log2(rate / DENSITIES[asked["density"]])))


def gaps(heard: Heard, asked: Attributes) -> float:
    """The share of frames 40 dB below the loudest: holes in the music."""
    return float(np.mean(heard.rms < max(heard.rms.max() / 100, SILENT)))


# What each measurement is good for: "more" of it, "less", or as much as real clips have ("near").
MEASURED: dict[str, tuple[Callable[[Heard, Attributes], float], str]] = {
    "consonance": (consonance, "more"),
    "beat": (beat, "more"),
    "loudness_range": (loudness_range, "near"),
    "brightness": (brightness, "near"),
    "roughness": (roughness, "less"),
    "key_agreement": (key_agreement, "more"),
    "tempo_agreement": (tempo_agreement, "more"),
    "harmonicity": (harmonicity, "near"),
    "register_agreement": (register_agreement, "more"),
    "density_agreement": (density_agreement, "more"),
    "gaps": (gaps, "less"),
}
FAMILY = "instrument_agreement"  # by the ear that is fitted to real clips
REAL_DISTANCE = 0.8  # the mean |z| of real clips, where z is normal


def timbre(heard: Heard) -> np.ndarray:
    """[80]: means and spreads of 20 MFCCs and of their differences, over the frames that are loud."""
    loud = heard.rms >= np.median(heard.rms)
    mel = librosa.feature.melspectrogram(S=heard.magnitude**2, sr=RATE_HZ, n_mels=64)
    mfcc = librosa.feature.mfcc(S=librosa.power_to_db(mel, ref=np.max, top_db=80), n_mfcc=20)[
        :, loud
    ]
    change = np.diff(mfcc, axis=1)
    return np.concatenate(
        [mfcc.mean(axis=1), mfcc.std(axis=1), change.mean(axis=1), change.std(axis=1)]
    )


class Ears:
    """Measurements in the units of real clips. Made from real clips; nothing in them comes from a model."""

    def __init__(self, wavs: Sequence[np.ndarray], asked: Sequence[Attributes]):
        """Real clips f32 [N] at RATE_HZ and what is true of each. Where no two families of instruments are known, the
        instrument is not judged.
        """
        heard = [hear(wav) for wav in Progress(wavs, "ears", len(wavs))]
        families = np.asarray([attributes.get("family") or "" for attributes in asked])
        timbres = np.stack([timbre(each) for each in heard])
        # An ear knows the clips that it was fitted to too well: each half is judged by an ear for the other.
        half = np.random.default_rng(0).permutation(len(heard)) % 2 == 0
        own = np.zeros(len(heard))
        ears = [_family_ear(timbres[part], families[part]) for part in (~half, half)]
        self._ear = _family_ear(timbres, families) if all(ears) else None
        if self._ear is not None:
            for i in np.flatnonzero(families != ""):
                own[i] = _log_chance(ears[0 if half[i] else 1], timbres[i], families[i])
        found = np.array([_measured(*each) for each in zip(heard, asked, own, strict=True)])
        # The scale of what may be asked for is that of the clips that have it.
        has = np.array(
            [[not _unasked(name, attributes) for name in _WANTED] for attributes in asked]
        )
        counted = [found[has[:, number], number] for number in range(len(_WANTED))]
        self._centre = np.array([part.mean() if len(part) else 0.0 for part in counted])
        self._spread = np.array([max(part.std(), 1e-6) if len(part) else 1.0 for part in counted])

    def measure(self, wav: np.ndarray, asked: Attributes) -> np.ndarray:
        """f64 [M], in the order of `listeners.MEASUREMENTS`: higher is better, about 0 for a real clip, from -4 to 4.
        What the prompt does not ask for is 0.
        """
        heard = hear(wav)
        own = (
            _log_chance(self._ear, timbre(heard), asked["family"])
            if self._ear and asked.get("family")
            else 0.0
        )
        z = np.clip(
            (_measured(heard, asked, own) - self._centre) / self._spread, -FARTHEST, FARTHEST
        )
        better = {"more": z, "less": -z, "near": REAL_DISTANCE - np.abs(z)}
        found = {name: better[want][number] for number, (name, want) in enumerate(_WANTED.items())}
        if self._ear is None:
            found[FAMILY] = 0.0
        return np.array([0.0 if _unasked(name, asked) else found[name] for name in MEASUREMENTS])


_WANTED = {name: want for name, (_, want) in MEASURED.items()} | {FAMILY: "more"}
_ASKED_AS = {
    "key_agreement": "key",
    "tempo_agreement": "tempo_bpm",
    "register_agreement": "register",
    "density_agreement": "density",
    FAMILY: "family",
}


def _unasked(name: str, asked: Attributes) -> bool:
    return name in _ASKED_AS and not asked.get(_ASKED_AS[name])


def _measured(heard: Heard, asked: Attributes, family: float) -> np.ndarray:
    """In the order of _WANTED."""
    return np.array([*(function(heard, asked) for function, _ in MEASURED.values()), family])


def _family_ear(timbres: np.ndarray, families: np.ndarray) -> Any:
    """Tells families by timbre; None where no two are known."""
    known = families != ""
    if len(set(families[known])) < 2:
        return None
    ear = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=2000))
    return ear.fit(timbres[known], families[known])


def _log_chance(ear: Any, timbre: np.ndarray, family: str) -> float:
    """Nats; at least log .001, as for a family that was never heard."""
    chances = dict(zip(ear.classes_, ear.predict_proba(timbre[None])[0], strict=True))
    return float(np.log(max(chances.get(family, 0.0), 1e-3)))
