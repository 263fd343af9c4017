"""Draws clips: an excerpt of a piece, an instrument, a tempo and the attributes for captions.

Notes are rows (onset, duration, MIDI pitch, part).
"""

import dataclasses

import numpy as np

from . import analysis
from .instruments import suitable
from .scores import TUNE_BOOKS, Piece

_SLOWEST, _FASTEST = 50, 200  # beats a minute
_ONSETS = (1.0, 9.0)  # onsets a second: above 9, notes blur
_COVERAGE = 0.95  # least share of an excerpt in which a note sounds
_TRANSPOSITIONS = range(-14, 15)
_DRUM_METRES = ("2/4", "3/4", "4/4", "2/2", "6/8", "9/8")

LENGTHS = {"staccato": 0.4, "natural": 0.88, "legato": 1.0}
"""Share of its written duration that a note sounds."""


Note = tuple[float, float, int, int]


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip before rendering. Within a part, notes of one pitch do not overlap."""

    id: str
    notes: tuple[Note, ...]
    """(onset s, duration s, MIDI pitch, part) as played, within the clip."""
    drums: tuple[tuple[float, int], ...]
    """(onset s, General MIDI drum)."""
    attributes: dict[str, object]


def draw_clip(
    piece: Piece, split: str, index: int, seed: int, seconds: float, instruments: tuple[str, ...]
) -> Clip:
    """Returns a split's clip number `index`: a pure function of the arguments."""
    # What is played. The order of the draws is part of the data set.
    rng = np.random.default_rng([seed, *split.encode(), index])
    bpm = _draw_tempo(piece, rng)
    excerpt, start = _draw_excerpt(piece, seconds * bpm / 60 * beat(piece.metre), rng)
    parts = sorted({part for _, _, _, part in excerpt})
    lowest, highest = (bound(pitch for _, _, pitch, _ in excerpt) for bound in (min, max))
    choices = suitable(instruments, len(parts), lowest, highest)
    instrument = choices[rng.integers(len(choices))]
    shift = _draw_transposition(lowest, highest, instrument.low, instrument.high, rng)
    # Only sustained instruments can play staccato and legato differently.
    articulation = (
        str(rng.choice(list(LENGTHS), p=(0.3, 0.4, 0.3))) if instrument.sustained else "natural"
    )
    drums = piece.collection in TUNE_BOOKS and piece.metre in _DRUM_METRES and rng.random() < 0.2
    dynamics = str(rng.choice(("quiet", "medium", "loud"), p=(0.25, 0.5, 0.25)))

    # Its notes in seconds, first as written: attributes describe these.
    quarter = 60 / bpm / beat(piece.metre)  # seconds
    written = [
        (onset * quarter, duration * quarter, pitch + shift, parts.index(part))
        for onset, duration, pitch, part in excerpt
    ]
    key = analysis.clear_key(written)
    # A few seconds can suggest a wrong key: name a key only if the whole piece agrees.
    whole_piece = [(onset, time, pitch + shift, part) for onset, time, pitch, part in piece.notes]
    agreed = key and key == analysis.likely_key(whole_piece)
    notes = tuple(_as_played(note, LENGTHS[articulation]) for note in written)

    # Everything that a caption may say, and where the notes come from.
    attributes = {
        "instrument": instrument.name,
        "family": instrument.family,
        "key": key[0] if agreed else None,
        "mode": key[1] if agreed else None,
        "tempo_bpm": bpm,
        "tempo_word": tempo_word(bpm),
        "metre": piece.metre,
        "register": analysis.register(written),
        "density": analysis.density(written, seconds),
        "dynamics": dynamics,
        "articulation": articulation,
        "drums": bool(drums),
        "collection": piece.collection,
        "dance": piece.dance,
        "parts": len(parts),
        "single_line": analysis.sounds_at_once(written) == 1,
        "piece": piece.name,
        "start_quarter": start,
        "transposition": shift,
    }
    hits = _drum_hits(piece.metre, 60 / bpm, seconds) if drums else ()
    return Clip(f"{split}-{index:06d}", notes, hits, attributes)


# --- tempo ---


def beat(metre: str | None) -> float:
    """Returns the quarter notes of a beat: 1.5 in 3/8, 6/8, 9/8 and 12/8, else 1, also in 2/2."""
    return 1.5 if metre in ("3/8", "6/8", "9/8", "12/8") else 1.0


def tempo_word(bpm: int) -> str:
    """Returns the tempo class of captions.TEMPO."""
    for bound, word in ((66, "very slow"), (88, "slow"), (116, "moderate"), (152, "fast")):
        if bpm < bound:
            return word
    return "very fast"


def _draw_tempo(piece: Piece, rng: np.random.Generator) -> int:
    """Returns beats a minute, log-uniform in the range that suits the piece's onsets a beat."""
    quarters = piece.end - piece.notes[0][0]
    onsets_per_beat = len({offset for offset, *_ in piece.notes}) / quarters * beat(piece.metre)
    slowest = max(_SLOWEST, _ONSETS[0] * 60 / onsets_per_beat)
    fastest = max(min(_FASTEST, _ONSETS[1] * 60 / onsets_per_beat), slowest)
    return round(float(np.exp(rng.uniform(np.log(slowest), np.log(fastest)))))


# --- notes ---


def _draw_excerpt(
    piece: Piece, length: float, rng: np.random.Generator
) -> tuple[list[Note], float]:
    """Returns an excerpt of `length` quarters that starts at a bar, and the offset of that bar.

    The offsets of its notes count from that bar. Repeats a piece that is shorter than the excerpt.
    """
    # The piece from its first full bar on, as often as needed.
    bars = int(np.ceil((piece.end - piece.pickup) / piece.bar - 1e-6))
    rounds = max(1, int(np.ceil(length / (bars * piece.bar))))
    body = [
        (offset - piece.pickup + turn * bars * piece.bar, duration, pitch, part)
        for turn in range(rounds)
        for offset, duration, pitch, part in piece.notes
        if offset >= piece.pickup
    ]

    # The first bar, in random order, from which the excerpt is full of music; else the fullest one.
    count = max(1, int((rounds * bars * piece.bar - length) / piece.bar) + 1)
    starts = rng.permutation(count) * piece.bar

    def covered(start: float) -> float:
        return analysis.coverage(body, start, start + length)

    start = next((start for start in starts if covered(start) >= _COVERAGE), None)
    start = float(max(starts, key=covered) if start is None else start)

    # Its notes, cut at both ends.
    excerpt = []
    for offset, duration, pitch, part in body:
        begin, stop = max(offset - start, 0.0), min(offset + duration - start, length)
        if stop - begin > 0.01:
            excerpt.append((begin, stop - begin, pitch, part))
    return sorted(excerpt), start


def _as_played(note: Note, length: float) -> Note:
    """Returns a written note as it sounds, rounded to 0.1 ms.

    Rounds its end, not its duration. Otherwise it could end 0.1 ms after the next note of its pitch
    starts.
    """
    onset, duration, pitch, part = note
    start, end = round(onset, 4), round(onset + duration * length, 4)
    return start, round(end - start, 4), pitch, part


def _draw_transposition(
    low: int, high: int, floor: int, ceiling: int, rng: np.random.Generator
) -> int:
    """Returns a shift in semitones into floor..ceiling, or one that centres too wide a range."""
    within = [
        shift for shift in _TRANSPOSITIONS if low + shift >= floor and high + shift <= ceiling
    ]
    return int(rng.choice(within)) if within else (floor + ceiling - low - high) // 2


def _drum_hits(metre: str, beat_seconds: float, seconds: float) -> tuple[tuple[float, int], ...]:
    """Returns (onset s, drum): bass drum on the first beat of a bar, snare on the others.

    The closed hi-hat plays on each beat and between beats.
    """
    bass, snare, hat = 36, 38, 42
    beats = {"2/4": 2, "3/4": 3, "4/4": 4, "2/2": 4, "6/8": 2, "9/8": 3}[metre]
    between = 3 if beat(metre) == 1.5 else 2
    hits = []
    for count in range(int(np.ceil(seconds / beat_seconds))):
        hits.append((count * beat_seconds, snare if count % beats else bass))
        hits += [((count + step / between) * beat_seconds, hat) for step in range(between)]
    return tuple((round(onset, 4), drum) for onset, drum in hits if onset < seconds)
