"""Scores: which pieces there are, in which split each belongs, and their notes.

Offsets and durations are in quarter notes, pitches are MIDI numbers. A piece's `part` 0 is its top line.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
import pathlib
import re

from .analysis import coverage

# Parts of music21's corpus that no licence keeps from being rendered locally; see README.md.
COLLECTIONS = ("oneills1850", "airdsAirs", "ryansMammoth", "bach", "monteverdi", "mozart", "haydn")
TUNE_BOOKS = COLLECTIONS[:3]

# How often a piece of the collection is drawn before others: tunes parse in 30 ms, a quartet movement in 300.
_WEIGHTS = {
    "oneills1850": 0.35,
    "airdsAirs": 0.2,
    "ryansMammoth": 0.25,
    "bach": 0.14,
    "monteverdi": 0.02,
    "mozart": 0.02,
    "haydn": 0.02,
}

_NO_CHORALES = ("bwv846",)  # all others in the bach folder are chorales

_SHORTEST = 1e-3  # quarter notes; times closer than this are one
_OPENING = 20  # intervals that identify a piece
_COVERAGE = 0.98  # of a piece by its notes, so that clips without long rests can be found
_SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}

# A dance is named only if the piece is also written in a metre of that dance.
_DANCES = {
    "slip jig": ("9/8",),
    "jig": ("6/8",),
    "reel": ("2/2", "4/4", "2/4"),
    "hornpipe": ("2/2", "4/4", "2/4"),
    "strathspey": ("4/4", "2/2"),
    "waltz": ("3/4", "3/8"),
    "minuet": ("3/4",),
    "polka": ("2/4",),
    "highland fling": ("4/4", "2/2"),
    "clog": ("4/4", "2/2", "2/4"),
    "gavotte": ("4/4", "2/2"),
    "march": ("2/4", "4/4", "2/2", "6/8"),
}


@dataclasses.dataclass(frozen=True)
class Piece:
    """A score reduced to what is played: `notes` are (offset, duration, pitch, part), sorted.

    Within a part no two notes of one pitch overlap.
    """

    name: str
    collection: str
    dance: str | None
    metre: str | None
    """Time signature such as "6/8", None if it changes or is not known."""
    pickup: float
    """Quarter notes before the first full bar."""
    bar: float
    """Quarter notes in a bar."""
    notes: tuple[tuple[float, float, int, int], ...]

    @property
    def end(self) -> float:
        return max(offset + duration for offset, duration, _, _ in self.notes)


def candidates(collections: tuple[str, ...], seed: int) -> list[str]:
    """Names of all pieces of the collections in a seeded order that mixes the collections by weight.

    A name is a path in the corpus, with "#k" for tune k of a book, such as "airdsAirs/book1.abc#12".
    """
    names = []
    for collection in collections:
        found = [name for path in _paths(collection) for name in _names(path)]
        names += [
            (_waiting_time(f"{seed}/{name}", len(found) / _WEIGHTS[collection]), name)
            for name in found
        ]
    return [name for _, name in sorted(names)]


def parse(name: str) -> Piece | None:
    """The piece of that name; None if music21 cannot read it, it has fewer than 21 notes or it is silent too often."""
    from music21 import converter, exceptions21

    path, _, number = name.partition("#")
    text = _tunes(_corpus() / path)[int(number)] if number else ""
    try:
        score = (
            converter.parse(text, format="abc")
            if text
            else converter.parseFile(_corpus() / path, forceSource=True, storePickle=False)
        )
    except exceptions21.Music21Exception:
        return None
    return _piece(name, text, score)


def opening(piece: Piece) -> tuple[int, ...]:
    """The first 20 intervals of the top line, in semitones: equal for copies of a tune, in whatever key."""
    line = {}
    for offset, _, pitch, part in piece.notes:
        if part == 0:
            line[offset] = max(pitch, line.get(offset, pitch))
    pitches = [line[offset] for offset in sorted(line)][: _OPENING + 1]
    return tuple(after - before for before, after in itertools.pairwise(pitches))


def split_of(intervals: tuple[int, ...]) -> str:
    """The split, by a hash of the opening alone: 80 % train, 10 % validation, 10 % test."""
    point = _uniform(repr(intervals))
    for split, share in _SHARES.items():
        point -= share
        if point < 0:
            return split
    return "test"


def quotas(pieces: int) -> dict[str, int]:
    """How many pieces each split takes out of `pieces`, at least one each."""
    return {split: max(1, round(share * pieces)) for split, share in _SHARES.items()}


def _piece(name: str, text: str, score) -> Piece | None:
    from music21 import stream

    notes, lowest_part = [], 0
    for part in score.getElementsByClass(stream.Part):
        lines = struck_anew(_untied(part))
        notes += [(offset, duration, pitch, lowest_part) for offset, duration, pitch in lines]
        lowest_part += bool(lines)
    metre, pickup, bar = _bars(score)
    piece = Piece(
        name, name.partition("/")[0], _dance(text, metre), metre, pickup, bar, tuple(sorted(notes))
    )
    fit = (
        notes
        and len(opening(piece)) == _OPENING
        and coverage(notes, pickup, piece.end) >= _COVERAGE
    )
    return piece if fit else None


def _untied(part) -> list[tuple[float, float, int]]:
    """Returns (offset, duration, pitch) of each sounding note of a part, in quarter notes.

    Tied notes are one note. Grace notes and drums are left out.
    """
    notes, held = [], {}  # held: the place in `notes` of a note with a tie, by its pitch and end
    for element in part.flatten().notes:
        duration = float(element.quarterLength)
        for note in getattr(element, "notes", (element,)):
            if duration == 0 or not hasattr(note, "pitch"):
                continue
            offset, pitch = float(element.offset), note.pitch.midi
            tie = note.tie.type if note.tie is not None else None
            # Voices of a part may share a pitch: a tie goes on where the note that it belongs to ends.
            at = held.pop((pitch, round(offset, 3)), None) if tie in ("stop", "continue") else None
            if at is not None:
                notes[at] = (notes[at][0], offset + duration - notes[at][0], pitch)
            else:
                at = len(notes)
                notes.append((offset, duration, pitch))
            if tie in ("start", "continue"):
                held[pitch, round(offset + duration, 3)] = at
    return notes


def struck_anew(notes: list[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    """Returns the notes of one player so that no two of the same pitch overlap.

    A note that starts while its pitch sounds ends the sounding one, is struck anew and lasts until the later of their
    ends. MIDI has one note of a pitch in a channel, so that the earlier end would silence both. Rows are
    (offset, duration, pitch) in quarter notes.
    """
    played, last = [], {}  # last: the place in `played` of the latest note of each pitch
    for offset, duration, pitch in sorted(notes):
        before = played[last[pitch]] if pitch in last else None
        if before is not None and offset < before[0] + before[1] - _SHORTEST:
            duration = max(offset + duration, before[0] + before[1]) - offset
            if offset - before[0] < _SHORTEST:
                played[last[pitch]] = (before[0], duration, pitch)
                continue
            played[last[pitch]] = (before[0], offset - before[0], pitch)
        last[pitch] = len(played)
        played.append((offset, duration, pitch))
    return played


def _bars(score) -> tuple[str | None, float, float]:
    from music21 import stream

    part = score.getElementsByClass(stream.Part)[0]
    signatures = list(part.flatten().getTimeSignatures(returnDefault=False))
    metres = {signature.ratioString for signature in signatures}
    metre = metres.pop() if len(metres) == 1 else None
    bar = float(signatures[0].barDuration.quarterLength) if signatures else 4.0
    measures = part.getElementsByClass(stream.Measure)
    first = float(measures[1].offset) if len(measures) > 1 else 0.0
    return metre, (first if first < bar else 0.0), bar


def _dance(text: str, metre: str | None) -> str | None:
    rhythm = " ".join(re.findall(r"(?m)^R:(.*)$", text)) or " ".join(
        re.findall(r"(?m)^T:(.*)$", text)
    )
    rhythm = rhythm.lower().replace("slipjig", "slip jig")
    named = next((dance for dance in _DANCES if re.search(rf"\b{dance}\b", rhythm)), None)
    return named if named and metre in _DANCES[named] else None


def _corpus() -> pathlib.Path:
    import music21

    return pathlib.Path(music21.__file__).parent / "corpus"


def _paths(collection: str) -> list[str]:
    files = sorted(
        path for kind in ("*.abc", "*.mxl") for path in (_corpus() / collection).rglob(kind)
    )
    return [
        path.relative_to(_corpus()).as_posix() for path in files if path.stem not in _NO_CHORALES
    ]


def _names(path: str) -> list[str]:
    if path.endswith(".mxl"):
        return [path]
    return [f"{path}#{number}" for number in range(len(_tunes(_corpus() / path)))]


@functools.lru_cache(maxsize=64)
def _tunes(path: pathlib.Path) -> list[str]:
    return re.split(r"(?m)^(?=X:)", path.read_text(encoding="utf-8", errors="replace"))[1:]


def _uniform(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _waiting_time(text: str, mean: float) -> float:
    """An exponential draw: sorting by it samples without replacement, by weight (Efraimidis & Spirakis 2006)."""
    return -math.log(1 - _uniform(text)) * mean
