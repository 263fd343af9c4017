"""General MIDI instruments: how captions name them, how they sound, which notes they can play.

The table is instruments.csv. Its order matters: clips are sampled by position in it.
"""

import csv
import dataclasses
import pathlib


@dataclasses.dataclass(frozen=True)
class Instrument:
    """An instrument, or an ensemble with one player for each part."""

    name: str
    family: str
    programs: tuple[int, ...]
    """General MIDI program numbers from 0. Part p is played by programs[p % len(programs)]."""
    low: int
    """Lowest playable MIDI pitch."""
    high: int
    """Highest playable MIDI pitch."""
    names: tuple[str, ...]
    """Names in captions, without article."""
    sounds: tuple[str, ...]
    """Descriptions that are true of every note."""
    sustained: bool
    """Whether a note sounds as long as it is held, so that staccato and legato differ."""
    chords: bool
    """Whether one player can play several parts."""

    @property
    def players(self) -> int:
        """Number of players."""
        return len(self.programs)


def _read_table() -> dict[str, Instrument]:
    """Returns the instruments by name, in the order of instruments.csv."""
    path = pathlib.Path(__file__).with_name("instruments.csv")
    instruments = {}
    for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
        instruments[row["name"]] = Instrument(
            name=row["name"],
            family=row["family"],
            programs=tuple(map(int, row["programs"].split())),
            low=int(row["low"]),
            high=int(row["high"]),
            names=tuple(row["names"].split("; ")),
            sounds=tuple(row["sounds"].split("; ")),
            sustained=row["sustained"] == "yes",
            chords=row["chords"] == "yes",
        )
    return instruments


INSTRUMENTS = _read_table()

FEW = tuple(INSTRUMENTS)[:18]
"""Instruments that sound clearly different: small models can tell them apart."""


def suitable(names: tuple[str, ...], parts: int, low: int, high: int) -> list[Instrument]:
    """Returns the named instruments that can play these parts, in table order.

    Prefers instruments whose range is at least as wide as low..high. If there is none, returns all
    that can play the number of parts.
    """
    able = []
    for row in INSTRUMENTS.values():
        plays_parts = row.players == parts if row.players > 1 else row.chords or parts == 1
        if row.name in names and plays_parts:
            able.append(row)
    return [row for row in able if row.high - row.low >= high - low] or able
