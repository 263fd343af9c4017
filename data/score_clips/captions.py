"""Captions: from the attributes of a clip to a sentence that says some of them, in varied words, and nothing else.

Every word comes from an attribute: a caption never says what a listener may feel.
"""

import numpy as np

from .instruments import INSTRUMENTS

Attributes = dict[str, object]

TEMPO = {
    "very slow": ("very slow", "extremely slow", "largo"),
    "slow": ("slow", "unhurried", "adagio", "slow-paced"),
    "moderate": ("moderate", "medium-tempo", "mid-tempo", "moderately paced", "andante"),
    "fast": ("fast", "quick", "brisk", "allegro", "up-tempo", "lively-tempo"),
    "very fast": ("very fast", "rapid", "presto", "racing", "extremely quick"),
}
DYNAMICS = {
    "quiet": ("quiet", "soft", "hushed", "at low volume"),
    "medium": (),
    "loud": ("loud", "forte", "at high volume", "strong in volume"),
}
REGISTER = {
    "low": ("in a low register", "low-pitched", "with deep notes", "down in the bass range"),
    "middle": ("in the middle register", "mid-range", "neither high nor low in pitch"),
    "high": ("in a high register", "high-pitched", "up in the treble range"),
}
DENSITY = {
    "sparse": ("with few notes", "sparse", "with long notes and much space between attacks"),
    "steady": ("with steadily moving notes",),
    "busy": ("with many quick notes", "busy", "note-filled", "with a dense stream of notes"),
}
ARTICULATION = {
    "staccato": (
        "staccato",
        "with short detached notes",
        "clipped and staccato",
        "with crisp separated notes",
    ),
    "natural": (),
    "legato": (
        "legato",
        "with smoothly connected notes",
        "smooth and legato",
        "slurred from note to note",
    ),
}
METRE = {
    "2/2": ("in cut time", "in 2/2", "in duple time"),
    "2/4": ("in 2/4", "in 2/4 time", "with two beats to the bar", "in duple time"),
    "3/4": ("in 3/4", "in 3/4 time", "in triple time", "with three beats to the bar"),
    "3/8": ("in 3/8 time", "in triple time"),
    "4/4": ("in 4/4", "in common time", "in 4/4 time", "with four beats to the bar"),
    "6/8": (
        "in 6/8",
        "in 6/8 time",
        "in compound duple time",
        "with lilting groups of three eighth notes",
    ),
    "9/8": (
        "in 9/8",
        "in 9/8 time",
        "in compound triple time",
        "with three groups of three eighth notes a bar",
    ),
    "12/8": ("in 12/8 time",),
}
STYLE = {
    "oneills1850": (("Irish", "traditional Irish"), ("tune", "folk tune", "melody", "air")),
    "airdsAirs": (
        ("eighteenth-century", "old", "traditional"),
        ("air", "folk tune", "popular tune", "melody"),
    ),
    "ryansMammoth": (
        ("traditional", "nineteenth-century", "folk"),
        ("fiddle tune", "dance tune", "tune"),
    ),
    "bach": (("baroque", "Bach", "German baroque"), ("chorale", "hymn setting", "chorale setting")),
    "monteverdi": (("Renaissance", "Italian", "late Renaissance"), ("madrigal", "part song")),
    "mozart": (("classical-era", "classical", "eighteenth-century"), ("movement", "piece")),
    "haydn": (("classical-era", "classical", "eighteenth-century"), ("movement", "piece")),
}
ANY_MUSIC = ("piece", "excerpt", "passage", "recording", "instrumental", "music clip")
COUNTS = {
    2: ("two-part", "two voices"),
    3: ("three-part", "three voices"),
    4: ("four-part", "four voices"),
    5: ("five-part", "five voices"),
}
DRUMS = (
    "with drums",
    "with a drum kit",
    "over a drum beat",
    "accompanied by bass drum, snare and hi-hat",
)

_GROUPS = ("choir", "ensemble", "quartet", "strings", "orchestra", "section")

# How often a caption mentions what.
_CHANCES = {
    "instrument": 0.92,
    "sound": 0.25,
    "style": 0.6,
    "dance": 0.75,
    "tempo_word": 0.65,
    "tempo_bpm": 0.22,
    "key": 0.5,
    "metre": 0.35,
    "register": 0.4,
    "density": 0.35,
    "dynamics": 0.6,
    "articulation": 0.6,
    "drums": 0.9,
    "parts": 0.5,
}


def caption(attributes: Attributes, rng: np.random.Generator) -> str:
    """One sentence, true of the clip. The same attributes give other words with another `rng`."""
    said = {name for name, chance in _CHANCES.items() if rng.random() < chance}
    noun = _noun(attributes, said, rng)
    player = _player(attributes, rng) if "instrument" in said else ""
    details = _details(attributes, said, rng)
    order = rng.permutation(len(details))
    details = [details[at] for at in order]
    frames = [_noun_first, _details_last] + ([_player_first, _solo] if player else [])
    text = frames[rng.integers(len(frames))](noun, player, details)
    return text[0].upper() + text[1:] + ("." if rng.random() < 0.7 else "")


def _noun_first(noun: str, player: str, details: list[str]) -> str:
    if player:
        noun = f"{noun} played {'by' if player.endswith(_GROUPS) else 'on'} {_article(player)}"
    return f"{_article(noun)}{_listed(details)}"


def _details_last(noun: str, player: str, details: list[str]) -> str:
    return f"{noun}{f', {player}' if player else ''}{_listed(details)}"


def _player_first(noun: str, player: str, details: list[str]) -> str:
    return f"{_article(player)} plays {_article(noun)}{_listed(details)}"


def _solo(noun: str, player: str, details: list[str]) -> str:
    return f"{player} playing {_article(noun)}{_listed(details)}"


def _noun(attributes: Attributes, said: set[str], rng: np.random.Generator) -> str:
    adjectives = []
    if "dynamics" in said and rng.random() < 0.5:
        adjectives += [word for word in DYNAMICS[attributes["dynamics"]] if " " not in word][:2]
        said.discard("dynamics")
    adjectives = [_pick(adjectives, rng)] if adjectives else []
    if "tempo_word" in said:
        adjectives.append(_pick(TEMPO[attributes["tempo_word"]], rng))
    if "parts" in said and attributes["parts"] in COUNTS and rng.random() < 0.5:
        adjectives.append(COUNTS[attributes["parts"]][0])
        said.discard("parts")
    styles, kinds = STYLE[attributes["collection"]]
    kind = _pick(ANY_MUSIC, rng)
    if "style" in said:
        adjectives.append(_pick(styles, rng))
        kind = _pick(kinds, rng)
    if "dance" in said and attributes["dance"]:
        kind = attributes["dance"]
    return " ".join([*adjectives, kind])


def _player(attributes: Attributes, rng: np.random.Generator) -> str:
    instrument = INSTRUMENTS[attributes["instrument"]]
    alone = attributes["single_line"] and not attributes["drums"] and instrument.players == 1
    solo = "solo " if alone and instrument.family != "voices" and rng.random() < 0.4 else ""
    return solo + _pick(instrument.names, rng)


def _details(attributes: Attributes, said: set[str], rng: np.random.Generator) -> list[str]:
    key, mode, bpm = attributes["key"], attributes["mode"], attributes["tempo_bpm"]
    forms = {
        "sound": INSTRUMENTS[attributes["instrument"]].sounds if "instrument" in said else (),
        "key": (f"in {key} {mode}", f"in the key of {key} {mode}", f"in a {mode} key")
        if key
        else (),
        "tempo_bpm": (f"at {bpm} BPM", f"at {bpm} beats per minute", f"tempo {bpm}"),
        "metre": METRE.get(attributes["metre"], ()),
        "register": REGISTER[attributes["register"]],
        "density": DENSITY[attributes["density"]],
        "dynamics": DYNAMICS[attributes["dynamics"]],
        "articulation": ARTICULATION[attributes["articulation"]],
        "drums": DRUMS if attributes["drums"] else (),
        "parts": _texture(attributes),
    }
    return [_pick(choices, rng) for name, choices in forms.items() if name in said and choices]


def _texture(attributes: Attributes) -> tuple[str, ...]:
    if attributes["single_line"] and not attributes["drums"]:
        return ("one note at a time", "a single melodic line", "monophonic", "unharmonized")
    if attributes["parts"] in COUNTS:
        return tuple(f"with {COUNTS[attributes['parts']][1]}{more}" for more in ("", " in harmony"))
    return ()


def _listed(details: list[str]) -> str:
    """Details that begin with a preposition follow without a comma, until one that does not."""
    text = ""
    for number, detail in enumerate(details):
        joined = number == 0 and detail.split()[0] in ("in", "with", "at", "over", "like")
        text += f" {detail}" if joined else f", {detail}"
    return text


def _article(noun: str) -> str:
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def _pick(choices, rng: np.random.Generator) -> str:
    return choices[rng.integers(len(choices))]
