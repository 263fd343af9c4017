"""Measures the notes of a clip: key, register, density, coverage, polyphony.

`notes` are rows (onset, duration, pitch, part). Times are in seconds or in quarter notes, pitches
are MIDI numbers.
"""

from collections.abc import Sequence

import numpy as np

Notes = Sequence[tuple[float, float, int, int]]

# Key profiles of Krumhansl & Kessler (1982), by semitones above the tonic.
_MAJOR = (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88)
_MINOR = (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)

# Tonics as captions spell them, from C upwards in semitones.
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

# Captions name a key only if it correlates this much, and this much more than the second best.
_CLEAR_FIT, _CLEAR_LEAD = 0.65, 0.03


def key_fits(notes: Notes) -> dict[tuple[str, str], float]:
    """Returns the fit in [-1, 1] of each of the 24 keys, such as ("F sharp", "minor").

    The fit is the correlation of the key's profile with the sounding time of each pitch class. All
    fits are 0 if all pitch classes sound equally long.
    """
    _, durations, pitches, _ = np.array(notes, np.float64).T
    sounding = np.bincount(pitches.astype(int) % 12, weights=durations, minlength=12)  # [12]
    fits = {}
    for mode, profile in (("major", _MAJOR), ("minor", _MINOR)):
        for tonic, name in enumerate(_TONICS[mode]):
            fit = np.corrcoef(np.roll(profile, tonic), sounding)[0, 1] if np.ptp(sounding) else 0.0
            fits[name, mode] = float(fit)
    return fits


def likely_key(notes: Notes) -> tuple[str, str]:
    """Returns the best fitting (tonic, mode), by Krumhansl-Schmuckler, however bad the fit is."""
    fits = key_fits(notes)
    return max(fits, key=fits.get)


def clear_key(notes: Notes) -> tuple[str, str] | None:
    """Returns the likely key, or None unless it fits well and clearly better than all others."""
    if len({pitch % 12 for _, _, pitch, _ in notes}) < 4:
        return None  # three pitch classes belong to many keys
    best, second = sorted(key_fits(notes).items(), key=lambda fit: fit[1], reverse=True)[:2]
    return best[0] if best[1] > _CLEAR_FIT and best[1] - second[1] > _CLEAR_LEAD else None


def register(notes: Notes) -> str:
    """Returns "low" (below middle C), "high" (from E flat 5 on) or "middle", by the mean pitch.

    The mean is weighted by duration.
    """
    _, durations, pitches, _ = np.array(notes, np.float64).T
    mean = np.average(pitches, weights=durations)
    return "low" if mean < 60 else "high" if mean >= 75 else "middle"


def density(notes: Notes, seconds: float) -> str:
    """Returns "sparse" (below 2.5 distinct onsets a second), "busy" (from 6 on) or "steady"."""
    rate = len({round(onset, 3) for onset, _, _, _ in notes}) / seconds
    return "sparse" if rate < 2.5 else "busy" if rate >= 6 else "steady"


def coverage(notes: Notes, start: float, end: float) -> float:
    """Returns the share in [0, 1] of the time from start to end in which a note sounds."""
    onsets, durations, _, _ = np.array(sorted(notes), np.float64).T
    stops = np.minimum(onsets + durations, end)
    # For each note: the latest end of the notes before it.
    covered_until = np.maximum.accumulate(np.concatenate([[start], stops]))[:-1]
    return float(np.sum(np.maximum(0, stops - np.maximum(onsets, covered_until))) / (end - start))


def sounds_at_once(notes: Notes) -> int:
    """Returns the largest number of notes that sound together."""
    changes = []
    for onset, duration, _, _ in notes:
        changes += [(round(onset, 4), 1), (round(onset + duration, 4), -1)]
    return int(np.max(np.cumsum([change for _, change in sorted(changes)])))
