"""Reads scores of music21's corpus: which pieces there are, their notes, and the split of each.

Offsets and durations are in quarter notes, pitches are MIDI numbers. Part 0 is a piece's top line.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
import pathlib
import re

from .analysis import coverage

# Folders of music21's corpus whose licences allow rendering on this machine; see README.md.
COLLECTIONS = ("oneills1850", "airdsAirs", "ryansMammoth", "bach", "monteverdi", "mozart", "haydn")
TUNE_BOOKS = COLLECTIONS[:3]

# Share of each collection among the candidates. A tune parses in 30 ms, a quartet movement in 300.
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

_SHORTEST = 1e-3  # quarter notes: closer times count as equal
_OPENING = 20  # number of intervals that identify a piece
_COVERAGE = 0.98  # least share of a piece in which notes sound, so that clips have no long rests
_SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}

# The metres of each dance. Captions name a dance only if the piece has one of its metres.
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
    """A score reduced to its notes."""

    name: str
    collection: str
    dance: str | None
    metre: str | None
    """Time signature such as "6/8", or None if it changes or is unknown."""
    pickup: float
    """Length in quarter notes before the first full bar."""
    bar: float
    """Length in quarter notes of a bar."""
    notes: tuple[tuple[float, float, int, int], ...]
    """Sorted (offset, duration, pitch, part). Within a part, notes of one pitch do not overlap."""

    @property
    def end(self) -> float:
        """Offset at which the last note ends."""
        return max(offset + duration for offset, duration, _, _ in self.notes)


# --- the corpus ---


def candidates(collections: tuple[str, ...], seed: int) -> list[str]:
    """Returns the names of all pieces, in a seeded order that mixes the collections by weight.

    A name is a path in the corpus, such as "bach/bwv389.mxl". Tune k of a book has "#k" behind the
    path, as "airdsAirs/book1.abc#12".
    """
    keyed_names = []
    for collection in collections:
        names = []
        for path in _paths(collection):
            names += _names(path)
        mean = len(names) / _WEIGHTS[collection]
        keyed_names += [(_waiting_time(f"{seed}/{name}", mean), name) for name in names]
    return [name for _, name in sorted(keyed_names)]


def parse(name: str) -> Piece | None:
    """Returns the piece with that name, or None if it is unusable.

    Unusable is what music21 cannot read, a top line of fewer than 21 notes, and a piece with too
    much silence.
    """
    # music21 takes seconds to import: only workers pay for it.
    from music21 import converter, exceptions21

    path, _, number = name.partition("#")
    text = _tunes(_corpus() / path)[int(number)] if number else ""
    try:
        if text:
            score = converter.parse(text, format="abc")
        else:
            score = converter.parseFile(_corpus() / path, forceSource=True, storePickle=False)
    except exceptions21.Music21Exception:
        return None
    return _piece(name, text, score)


# --- splits ---


def opening(piece: Piece) -> tuple[int, ...]:
    """Returns the first 20 intervals of the top line, in semitones: equal for a tune in any key."""
    line = {}
    for offset, _, pitch, part in piece.notes:
        if part == 0:
            line[offset] = max(pitch, line.get(offset, pitch))
    pitches = [line[offset] for offset in sorted(line)][: _OPENING + 1]
    return tuple(after - before for before, after in itertools.pairwise(pitches))


def split_of(intervals: tuple[int, ...]) -> str:
    """Returns the split by a hash of the opening: 80 % train, 10 % validation, 10 % test."""
    point = _uniform(repr(intervals))
    for split, share in _SHARES.items():
        point -= share
        if point < 0:
            return split
    return "test"


def quotas(pieces: int) -> dict[str, int]:
    """Returns the share of each split in a number of pieces, at least one each."""
    return {split: max(1, round(share * pieces)) for split, share in _SHARES.items()}


# --- from a parsed score to a piece ---


def _piece(name: str, text: str, score) -> Piece | None:
    """Returns the piece of a parsed score and its ABC text, or None if it is unusable."""
    from music21 import stream

    # Parts without notes get no number.
    notes, next_part = [], 0
    for part in score.getElementsByClass(stream.Part):
        lines = struck_anew(_untied(part))
        notes += [(offset, duration, pitch, next_part) for offset, duration, pitch in lines]
        next_part += bool(lines)
    metre, pickup, bar = _bars(score)
    collection, dance = name.partition("/")[0], _dance(text, metre)
    piece = Piece(name, collection, dance, metre, pickup, bar, tuple(sorted(notes)))
    long_enough = len(opening(piece)) == _OPENING
    return piece if long_enough and coverage(notes, pickup, piece.end) >= _COVERAGE else None


def _untied(part) -> list[tuple[float, float, int]]:
    """Returns (offset, duration, pitch) of each sounding note of a part, in quarter notes.

    Joins tied notes. Leaves out grace notes and drums.
    """
    notes, tied = [], {}  # tied: index in `notes` of a note with a tie, by its pitch and end
    for element in part.flatten().notes:
        duration = float(element.quarterLength)
        for note in getattr(element, "notes", (element,)):
            if duration == 0 or not hasattr(note, "pitch"):
                continue
            offset, pitch = float(element.offset), note.pitch.midi
            tie = note.tie.type if note.tie is not None else None
            # Voices of a part may share a pitch: a tie continues the note that ends here.
            at = tied.pop((pitch, round(offset, 3)), None) if tie in ("stop", "continue") else None
            if at is not None:
                notes[at] = (notes[at][0], offset + duration - notes[at][0], pitch)
            else:
                at = len(notes)
                notes.append((offset, duration, pitch))
            if tie in ("start", "continue"):
                tied[pitch, round(offset + duration, 3)] = at
    return notes


def struck_anew(notes: list[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    """Returns the notes of one player, changed so that notes of one pitch do not overlap.

    A note that starts while its pitch sounds ends the earlier note and lasts until the later of
    their ends. MIDI has one note of a pitch in a channel: otherwise the earlier end would silence
    both. Rows are (offset, duration, pitch) in quarter notes.
    """
    played, last = [], {}  # last: index in `played` of the latest note of each pitch
    for offset, duration, pitch in sorted(notes):
        before = played[last[pitch]] if pitch in last else None
        # It starts while `before` sounds.
        if before is not None and offset < before[0] + before[1] - _SHORTEST:
            duration = max(offset + duration, before[0] + before[1]) - offset
            # Both start at once: one longer note.
            if offset - before[0] < _SHORTEST:
                played[last[pitch]] = (before[0], duration, pitch)
                continue
            played[last[pitch]] = (before[0], offset - before[0], pitch)
        last[pitch] = len(played)
        played.append((offset, duration, pitch))
    return played


def _bars(score) -> tuple[str | None, float, float]:
    """Returns the metre, the length before the first full bar and the length of a bar."""
    from music21 import stream

    part = score.getElementsByClass(stream.Part)[0]
    signatures = list(part.flatten().getTimeSignatures(returnDefault=False))
    metres = {signature.ratioString for signature in signatures}
    metre = metres.pop() if len(metres) == 1 else None
    bar = float(signatures[0].barDuration.quarterLength) if signatures else 4.0
    # A first measure that is shorter than a bar is a pickup.
    measures = part.getElementsByClass(stream.Measure)
    first = float(measures[1].offset) if len(measures) > 1 else 0.0
    return metre, (first if first < bar else 0.0), bar


def _dance(text: str, metre: str | None) -> str | None:
    """Returns the dance that the rhythm field of an ABC text names, or else its title."""
    fields = re.findall(r"(?m)^R:(.*)$", text) or re.findall(r"(?m)^T:(.*)$", text)
    rhythm = " ".join(fields).lower().replace("slipjig", "slip jig")
    named = next((dance for dance in _DANCES if re.search(rf"\b{dance}\b", rhythm)), None)
    return named if named and metre in _DANCES[named] else None


# --- files, names and hashes ---


def _corpus() -> pathlib.Path:
    import music21

    return pathlib.Path(music21.__file__).parent / "corpus"


def _paths(collection: str) -> list[str]:
    """Returns the files of a collection, relative to the corpus."""
    files = sorted(
        [*(_corpus() / collection).rglob("*.abc"), *(_corpus() / collection).rglob("*.mxl")]
    )
    return [
        path.relative_to(_corpus()).as_posix() for path in files if path.stem not in _NO_CHORALES
    ]


def _names(path: str) -> list[str]:
    """Returns the names of a file's pieces."""
    if path.endswith(".mxl"):
        return [path]
    return [f"{path}#{number}" for number in range(len(_tunes(_corpus() / path)))]


@functools.lru_cache(maxsize=64)
def _tunes(path: pathlib.Path) -> list[str]:
    """Returns the ABC text of each tune of a book."""
    return re.split(r"(?m)^(?=X:)", path.read_text(encoding="utf-8", errors="replace"))[1:]


def _uniform(text: str) -> float:
    """Returns a hash of the text, uniform in [0, 1)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _waiting_time(text: str, mean: float) -> float:
    """Returns an exponential sample of that mean.

    Sorting by it samples by weight without replacement (Efraimidis & Spirakis 2006).
    """
    return -math.log(1 - _uniform(text)) * mean
