"""General MIDI instruments: what they are called, how they sound and how far they reach."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Instrument:
    """An instrument or an ensemble of one player a part."""

    name: str
    family: str
    programs: tuple[int, ...]
    """General MIDI program numbers from 0; part p is played by programs[p % len(programs)]."""
    low: int
    high: int
    names: tuple[str, ...]
    """How a caption may call it, without article."""
    sounds: tuple[str, ...]
    """What is true of every note it plays."""
    sustained: bool = False
    """Whether a note sounds as long as it is held, so that staccato and legato can be heard."""
    chords: bool = False
    """Whether one player can play several parts."""

    @property
    def players(self) -> int:
        return len(self.programs)


def _table(*rows: Instrument) -> dict[str, Instrument]:
    return {row.name: row for row in rows}


INSTRUMENTS = _table(
    Instrument(
        "harp",
        "plucked strings",
        (46,),
        36,
        96,
        ("harp", "concert harp"),
        ("plucked and ringing", "with gently plucked strings"),
        chords=True,
    ),
    Instrument(
        "flute",
        "woodwind",
        (73,),
        60,
        94,
        ("flute", "concert flute"),
        ("breathy", "airy and round"),
        sustained=True,
    ),
    Instrument(
        "violin",
        "bowed strings",
        (40,),
        55,
        96,
        ("violin", "fiddle"),
        ("bowed", "with a bowed string sound"),
        sustained=True,
    ),
    Instrument(
        "accordion",
        "free reeds",
        (21,),
        48,
        92,
        ("accordion", "squeezebox"),
        ("reedy and pulsing", "with vibrating metal reeds"),
        sustained=True,
        chords=True,
    ),
    Instrument(
        "trumpet",
        "brass",
        (56,),
        54,
        84,
        ("trumpet",),
        ("brassy and bright", "with a ringing brass tone"),
        sustained=True,
    ),
    Instrument(
        "piano",
        "keyboard",
        (0,),
        28,
        100,
        ("piano", "grand piano", "acoustic piano"),
        ("with struck strings", "hammered and clear"),
        chords=True,
    ),
    Instrument(
        "organ",
        "keyboard",
        (19,),
        36,
        92,
        ("church organ", "pipe organ", "organ"),
        ("with full pipes", "broad and sustained"),
        sustained=True,
        chords=True,
    ),
    Instrument(
        "marimba",
        "mallets",
        (12,),
        45,
        92,
        ("marimba",),
        ("wooden and mellow", "struck with soft mallets"),
        chords=True,
    ),
    Instrument(
        "guitar",
        "plucked strings",
        (24,),
        40,
        84,
        ("nylon-string guitar", "classical guitar", "guitar"),
        ("softly plucked", "fingerpicked"),
        chords=True,
    ),
    Instrument(
        "clarinet",
        "woodwind",
        (71,),
        50,
        90,
        ("clarinet",),
        ("woody and hollow", "dark and reedy"),
        sustained=True,
    ),
    Instrument(
        "bagpipe",
        "free reeds",
        (109,),
        55,
        84,
        ("bagpipe", "Highland bagpipe"),
        ("nasal and piercing", "droning and reedy"),
        sustained=True,
    ),
    Instrument(
        "choir",
        "voices",
        (52,),
        43,
        84,
        ("choir", "wordless choir", "vocal ensemble"),
        ("sung on an open vowel", "with human voices singing aah"),
        sustained=True,
        chords=True,
    ),
    Instrument(
        "cello",
        "bowed strings",
        (42,),
        36,
        76,
        ("cello", "violoncello"),
        ("bowed and deep", "with a deep bowed sound"),
        sustained=True,
    ),
    Instrument(
        "banjo",
        "plucked strings",
        (105,),
        48,
        86,
        ("banjo", "five-string banjo"),
        ("twangy", "with a short twang"),
        chords=True,
    ),
    Instrument(
        "glockenspiel",
        "mallets",
        (9,),
        67,
        108,
        ("glockenspiel", "set of orchestral bells"),
        ("metallic and tinkling", "like small bells"),
        chords=True,
    ),
    Instrument(
        "harpsichord",
        "keyboard",
        (6,),
        29,
        89,
        ("harpsichord", "cembalo"),
        ("with plucked metal strings", "jangling"),
        chords=True,
    ),
    Instrument(
        "string quartet",
        "bowed strings",
        (40, 40, 41, 42),
        36,
        96,
        ("string quartet", "quartet of strings"),
        ("bowed together", "with two violins, viola and cello"),
        sustained=True,
    ),
    Instrument(
        "brass quartet",
        "brass",
        (56, 56, 60, 57),
        36,
        84,
        ("brass quartet", "small brass ensemble"),
        ("with trumpets, horn and trombone", "full brass sound"),
        sustained=True,
    ),
    Instrument(
        "recorder", "woodwind", (74,), 60, 93, ("recorder",), ("piped and pure",), sustained=True
    ),
    Instrument(
        "oboe", "woodwind", (68,), 58, 91, ("oboe",), ("nasal and penetrating",), sustained=True
    ),
    Instrument(
        "bassoon", "woodwind", (70,), 34, 72, ("bassoon",), ("deep and reedy",), sustained=True
    ),
    Instrument(
        "saxophone",
        "woodwind",
        (66,),
        44,
        76,
        ("tenor saxophone", "saxophone"),
        ("husky",),
        sustained=True,
    ),
    Instrument(
        "french horn",
        "brass",
        (60,),
        41,
        77,
        ("french horn", "horn"),
        ("soft brass tone",),
        sustained=True,
    ),
    Instrument(
        "trombone", "brass", (57,), 40, 72, ("trombone",), ("full brass tone",), sustained=True
    ),
    Instrument("tuba", "brass", (58,), 28, 58, ("tuba",), ("deep brass tone",), sustained=True),
    Instrument(
        "harmonica",
        "free reeds",
        (22,),
        60,
        96,
        ("harmonica", "mouth organ"),
        ("thin and reedy",),
        sustained=True,
        chords=True,
    ),
    Instrument(
        "sitar",
        "plucked strings",
        (104,),
        48,
        80,
        ("sitar",),
        ("buzzing and plucked",),
        chords=True,
    ),
    Instrument(
        "koto",
        "plucked strings",
        (107,),
        50,
        88,
        ("koto",),
        ("plucked on silk strings",),
        chords=True,
    ),
    Instrument(
        "steel guitar",
        "plucked strings",
        (25,),
        40,
        84,
        ("steel-string guitar", "folk guitar"),
        ("with bright plucked strings",),
        chords=True,
    ),
    Instrument(
        "electric guitar",
        "plucked strings",
        (27,),
        40,
        86,
        ("clean electric guitar", "electric guitar"),
        ("amplified without distortion",),
        chords=True,
    ),
    Instrument(
        "electric piano",
        "keyboard",
        (4,),
        28,
        100,
        ("electric piano",),
        ("with a bell-like tine sound",),
        chords=True,
    ),
    Instrument(
        "vibraphone",
        "mallets",
        (11,),
        53,
        89,
        ("vibraphone", "vibes"),
        ("metal bars with vibrato",),
        chords=True,
    ),
    Instrument(
        "xylophone", "mallets", (13,), 65, 108, ("xylophone",), ("dry and wooden",), chords=True
    ),
    Instrument(
        "music box", "mallets", (10,), 60, 96, ("music box",), ("tiny and chiming",), chords=True
    ),
    Instrument(
        "steel drums",
        "mallets",
        (114,),
        52,
        88,
        ("steel drums", "steel pan"),
        ("with hammered metal pans",),
        chords=True,
    ),
    Instrument(
        "kalimba",
        "mallets",
        (108,),
        60,
        88,
        ("kalimba", "thumb piano"),
        ("with plucked metal tongues",),
        chords=True,
    ),
    Instrument(
        "string orchestra",
        "bowed strings",
        (48,),
        36,
        96,
        ("string orchestra", "string section"),
        ("with massed bowed strings",),
        sustained=True,
        chords=True,
    ),
)

FEW = tuple(INSTRUMENTS)[:18]
"""Clearly distinct ones: enough for small models to tell apart."""


def suitable(names: tuple[str, ...], parts: int, low: int, high: int) -> list[Instrument]:
    """Instruments, in table order, that can play that many parts and whose range is as wide as low..high."""
    able = [
        row
        for row in INSTRUMENTS.values()
        if row.name in names
        and (row.players == parts if row.players > 1 else row.chords or parts == 1)
    ]
    return [row for row in able if row.high - row.low >= high - low] or able
