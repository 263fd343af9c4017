"""Clips: an excerpt of a piece, an instrument, a tempo, and everything a caption may say about them."""

import dataclasses

import numpy as np

from . import analysis
from .instruments import suitable
from .scores import TUNE_BOOKS, Piece

_SLOWEST, _FASTEST = 50, 200  # beats a minute
_ONSETS = (1.0, 9.0)  # a second; faster than that, notes blur
_COVERAGE = 0.95
_TRANSPOSITIONS = range(-14, 15)
_DRUM_METRES = ("2/4", "3/4", "4/4", "2/2", "6/8", "9/8")

LENGTHS = {"staccato": 0.4, "natural": 0.88, "legato": 1.0}
"""How much of its written duration a note sounds."""


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip before it is rendered: `notes` are (onset s, duration s, MIDI pitch, part) as played, within the clip.

    Within a part no two notes of one pitch overlap.
    """

    id: str
    notes: tuple[tuple[float, float, int, int], ...]
    drums: tuple[tuple[float, int], ...]
    """(onset s, General MIDI drum)."""
    attributes: dict[str, object]


def draw_clip(
    piece: Piece, split: str, index: int, seed: int, seconds: float, instruments: tuple[str, ...]
) -> Clip:
    """The clip of that index: a pure function of its arguments."""
    rng = np.random.default_rng([seed, *split.encode(), index])
    bpm = _draw_tempo(piece, rng)
    excerpt, start = _draw_excerpt(piece, seconds * bpm / 60 * beat(piece.metre), rng)
    parts = sorted({part for _, _, _, part in excerpt})
    lowest, highest = (bound(pitch for _, _, pitch, _ in excerpt) for bound in (min, max))
    choices = suitable(instruments, len(parts), lowest, highest)
    instrument = choices[rng.integers(len(choices))]
    shift = _draw_transposition(lowest, highest, instrument.low, instrument.high, rng)
    articulation = (
        str(rng.choice(list(LENGTHS), p=(0.3, 0.4, 0.3))) if instrument.sustained else "natural"
    )
    drums = piece.collection in TUNE_BOOKS and piece.metre in _DRUM_METRES and rng.random() < 0.2
    dynamics = str(rng.choice(("quiet", "medium", "loud"), p=(0.25, 0.5, 0.25)))

    quarter = 60 / bpm / beat(piece.metre)  # seconds
    written = [
        (onset * quarter, duration * quarter, pitch + shift, parts.index(part))
        for onset, duration, pitch, part in excerpt
    ]
    key = analysis.clear_key(written)
    # A few seconds can suggest a key that the piece is not in: name it only if the whole piece agrees.
    agreed = key and key == analysis.likely_key(
        [(o, d, pitch + shift, part) for o, d, pitch, part in piece.notes]
    )
    notes = tuple(_as_played(note, LENGTHS[articulation]) for note in written)
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


def beat(metre: str | None) -> float:
    """Quarter notes in the beat that a tempo counts: 1.5 in 3/8, 6/8, 9/8 and 12/8, else 1, also in 2/2."""
    return 1.5 if metre in ("3/8", "6/8", "9/8", "12/8") else 1.0


def tempo_word(bpm: int) -> str:
    for bound, word in ((66, "very slow"), (88, "slow"), (116, "moderate"), (152, "fast")):
        if bpm < bound:
            return word
    return "very fast"


def _draw_tempo(piece: Piece, rng: np.random.Generator) -> int:
    onsets = (
        len({offset for offset, _, _, _ in piece.notes})
        / (piece.end - piece.notes[0][0])
        * beat(piece.metre)
    )
    slowest = max(_SLOWEST, _ONSETS[0] * 60 / onsets)
    fastest = max(min(_FASTEST, _ONSETS[1] * 60 / onsets), slowest)
    return round(float(np.exp(rng.uniform(np.log(slowest), np.log(fastest)))))


def _draw_excerpt(piece: Piece, length: float, rng: np.random.Generator):
    """Notes of `length` quarters from a bar on, moved to 0, and that bar's offset; short pieces are repeated."""
    bars = int(np.ceil((piece.end - piece.pickup) / piece.bar - 1e-6))
    rounds = max(1, int(np.ceil(length / (bars * piece.bar))))
    body = [
        (offset - piece.pickup + turn * bars * piece.bar, duration, pitch, part)
        for turn in range(rounds)
        for offset, duration, pitch, part in piece.notes
        if offset >= piece.pickup
    ]
    starts = (
        rng.permutation(max(1, int((rounds * bars * piece.bar - length) / piece.bar) + 1))
        * piece.bar
    )

    def covered(start: float) -> float:
        return analysis.coverage(body, start, start + length)

    full = (start for start in starts if covered(start) >= _COVERAGE)
    start = next(full, None)
    start = float(max(starts, key=covered) if start is None else start)
    inside = [
        (max(offset - start, 0.0), min(offset + duration - start, length), pitch, part)
        for offset, duration, pitch, part in body
        if offset + duration > start and offset < start + length
    ]
    excerpt = sorted(
        (begin, stop - begin, pitch, part)
        for begin, stop, pitch, part in inside
        if stop - begin > 0.01
    )
    return excerpt, start


def _as_played(note: tuple[float, float, int, int], length: float) -> tuple[float, float, int, int]:
    """Returns a written note as it sounds, rounded to 0.1 ms.

    Its end is rounded, not its duration: it would else end up to 0.1 ms after a repetition of it has started.
    """
    onset, duration, pitch, part = note
    start, end = round(onset, 4), round(onset + duration * length, 4)
    return start, round(end - start, 4), pitch, part


def _draw_transposition(
    low: int, high: int, floor: int, ceiling: int, rng: np.random.Generator
) -> int:
    within = [
        shift for shift in _TRANSPOSITIONS if low + shift >= floor and high + shift <= ceiling
    ]
    return int(rng.choice(within)) if within else (floor + ceiling - low - high) // 2


def _drum_hits(metre: str, beat_seconds: float, seconds: float) -> tuple[tuple[float, int], ...]:
    """Bass drum on the first beat of a bar, snare on the others, closed hi-hat on every beat and between them."""
    bass, snare, hat = 36, 38, 42
    beats = {"2/4": 2, "3/4": 3, "4/4": 4, "2/2": 4, "6/8": 2, "9/8": 3}[metre]
    between = 3 if beat(metre) == 1.5 else 2
    hits = []
    for count in range(int(np.ceil(seconds / beat_seconds))):
        hits.append((count * beat_seconds, snare if count % beats else bass))
        hits += [((count + step / between) * beat_seconds, hat) for step in range(between)]
    return tuple((round(onset, 4), drum) for onset, drum in hits if onset < seconds)
