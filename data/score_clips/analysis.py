"""What can be read off the notes of a clip: key, register, density, coverage, number of parts.

`notes` are rows (onset, duration, pitch, part), in seconds or quarter notes, pitches as MIDI numbers.
"""

from collections.abc import Sequence

import numpy as np

Notes = Sequence[tuple[float, float, int, int]]

# Krumhansl & Kessler (1982): how well each scale degree fits, from the tonic upwards in semitones.
_MAJOR = (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88)
_MINOR = (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)

_TONICS = {
    "major": ("C", "D flat", "D", "E flat", "E", "F", "F sharp", "G", "A flat", "A", "B flat", "B"),
    "minor": (
        "C",
        "C sharp",
        "D",
        "E flat",
        "E",
        "F",
        "F sharp",
        "G",
        "G sharp",
        "A",
        "B flat",
        "B",
    ),
}

_CLEAR_FIT, _CLEAR_LEAD = 0.65, 0.03


def key_fits(notes: Notes) -> dict[tuple[str, str], float]:
    """Correlation in [-1, 1] of each of the 24 keys ("F sharp", "minor") with the time each pitch class sounds.

    All are 0 where all pitch classes sound equally long.
    """
    _, durations, pitches, _ = np.array(notes, np.float64).T
    heard = np.bincount(pitches.astype(int) % 12, weights=durations, minlength=12)  # [12]
    fits = {}
    for mode, profile in (("major", _MAJOR), ("minor", _MINOR)):
        for tonic, name in enumerate(_TONICS[mode]):
            fits[name, mode] = (
                float(np.corrcoef(np.roll(profile, tonic), heard)[0, 1]) if np.ptp(heard) else 0.0
            )
    return fits


def likely_key(notes: Notes) -> tuple[str, str]:
    """(tonic, mode) by Krumhansl-Schmuckler: the key that fits best, however badly."""
    fits = key_fits(notes)
    return max(fits, key=fits.get)


def clear_key(notes: Notes) -> tuple[str, str] | None:
    """The likely key, None unless it fits well and better than every other."""
    if len({pitch % 12 for _, _, pitch, _ in notes}) < 4:
        return None  # three pitch classes belong to many keys
    best, second = sorted(key_fits(notes).items(), key=lambda fit: fit[1], reverse=True)[:2]
    return best[0] if best[1] > _CLEAR_FIT and best[1] - second[1] > _CLEAR_LEAD else None


def mean_pitch(notes: Notes) -> float:
    """MIDI number, weighted by duration."""
    _, durations, pitches, _ = np.array(notes, np.float64).T
    return float(np.average(pitches, weights=durations))


def register(notes: Notes) -> str:
    """ "low" below middle C, "high" from E flat 5 upwards, else "middle", by the mean pitch."""
    mean = mean_pitch(notes)
    return "low" if mean < 60 else "high" if mean >= 75 else "middle"


def onsets_per_second(notes: Notes, seconds: float) -> float:
    """Distinct moments at which a note starts, per second."""
    return len({round(onset, 3) for onset, _, _, _ in notes}) / seconds


def density(notes: Notes, seconds: float) -> str:
    """ "sparse" below 2.5 onsets a second, "busy" from 6 upwards, else "steady"."""
    rate = onsets_per_second(notes, seconds)
    return "sparse" if rate < 2.5 else "busy" if rate >= 6 else "steady"


def coverage(notes: Notes, start: float, end: float) -> float:
    """Share in [0, 1] of the time from start to end in which at least one note sounds."""
    onsets, durations, _, _ = np.array(sorted(notes), np.float64).T
    stops = np.minimum(onsets + durations, end)
    reached = np.maximum.accumulate(np.concatenate([[start], stops]))[
        :-1
    ]  # until where the notes before sound
    return float(np.sum(np.maximum(0, stops - np.maximum(onsets, reached))) / (end - start))


def sounds_at_once(notes: Notes) -> int:
    """The largest number of notes that sound together."""
    changes = sorted(
        (round(time, 4), step)
        for onset, duration, _, _ in notes
        for time, step in ((onset, 1), (onset + duration, -1))
    )
    return int(np.max(np.cumsum([step for _, step in changes])))
