"""Writes a sentence about a clip: some of its attributes, in varied words, and nothing else.

Every word comes from an attribute. Captions do not claim what a listener may feel.
"""

import numpy as np

from .instruments import INSTRUMENTS

Attributes = dict[str, object]

# --- wordings of each attribute value ---

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

# Probability that a caption mentions an attribute.
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


# --- sentences ---


def caption(attributes: Attributes, rng: np.random.Generator) -> str:
    """Returns one sentence, true of the clip. Its words and their order depend on `rng`."""
    mentioned = {name for name, chance in _CHANCES.items() if rng.random() < chance}
    noun = _noun(attributes, mentioned, rng)
    player = _player(attributes, rng) if "instrument" in mentioned else ""
    details = _details(attributes, mentioned, rng)
    details = [details[at] for at in rng.permutation(len(details))]
    frames = [_noun_first, _details_last] + ([_player_first, _solo] if player else [])
    text = frames[rng.integers(len(frames))](noun, player) + _listed(details)
    return text[0].upper() + text[1:] + ("." if rng.random() < 0.7 else "")


def _noun_first(noun: str, player: str) -> str:
    if not player:
        return _article(noun)
    return _article(
        f"{noun} played {'by' if player.endswith(_GROUPS) else 'on'} {_article(player)}"
    )


def _details_last(noun: str, player: str) -> str:
    return f"{noun}, {player}" if player else noun


def _player_first(noun: str, player: str) -> str:
    return f"{_article(player)} plays {_article(noun)}"


def _solo(noun: str, player: str) -> str:
    return f"{player} playing {_article(noun)}"


def _noun(attributes: Attributes, mentioned: set[str], rng: np.random.Generator) -> str:
    """Returns the noun with its adjectives. Removes from `mentioned` what the adjectives say."""
    adjectives = []

    # Dynamics and number of parts: half of the time as adjectives, otherwise as details.
    if "dynamics" in mentioned and rng.random() < 0.5:
        words = [word for word in DYNAMICS[attributes["dynamics"]] if " " not in word][:2]
        adjectives += [_pick(words, rng)] if words else []
        mentioned.discard("dynamics")
    if "tempo_word" in mentioned:
        adjectives.append(_pick(TEMPO[attributes["tempo_word"]], rng))
    if "parts" in mentioned and attributes["parts"] in COUNTS and rng.random() < 0.5:
        adjectives.append(COUNTS[attributes["parts"]][0])
        mentioned.discard("parts")

    # The kind of music: any word, or a word of the collection, or the dance.
    styles, kinds = STYLE[attributes["collection"]]
    kind = _pick(ANY_MUSIC, rng)
    if "style" in mentioned:
        adjectives.append(_pick(styles, rng))
        kind = _pick(kinds, rng)
    if "dance" in mentioned and attributes["dance"]:
        kind = attributes["dance"]
    return " ".join([*adjectives, kind])


def _player(attributes: Attributes, rng: np.random.Generator) -> str:
    instrument = INSTRUMENTS[attributes["instrument"]]
    alone = attributes["single_line"] and not attributes["drums"] and instrument.players == 1
    solo = "solo " if alone and instrument.family != "voices" and rng.random() < 0.4 else ""
    return solo + _pick(instrument.names, rng)


def _details(attributes: Attributes, mentioned: set[str], rng: np.random.Generator) -> list[str]:
    """Returns one wording for each mentioned attribute that has wordings."""
    key, mode, bpm = attributes["key"], attributes["mode"], attributes["tempo_bpm"]
    keys = (f"in {key} {mode}", f"in the key of {key} {mode}", f"in a {mode} key")
    wordings = {
        "sound": INSTRUMENTS[attributes["instrument"]].sounds if "instrument" in mentioned else (),
        "key": keys if key else (),
        "tempo_bpm": (f"at {bpm} BPM", f"at {bpm} beats per minute", f"tempo {bpm}"),
        "metre": METRE.get(attributes["metre"], ()),
        "register": REGISTER[attributes["register"]],
        "density": DENSITY[attributes["density"]],
        "dynamics": DYNAMICS[attributes["dynamics"]],
        "articulation": ARTICULATION[attributes["articulation"]],
        "drums": DRUMS if attributes["drums"] else (),
        "parts": _texture(attributes),
    }
    return [_pick(words, rng) for name, words in wordings.items() if name in mentioned and words]


def _texture(attributes: Attributes) -> tuple[str, ...]:
    if attributes["single_line"] and not attributes["drums"]:
        return ("one note at a time", "a single melodic line", "monophonic", "unharmonized")
    if attributes["parts"] in COUNTS:
        return tuple(f"with {COUNTS[attributes['parts']][1]}{more}" for more in ("", " in harmony"))
    return ()


def _listed(details: list[str]) -> str:
    """Returns the details as a continuation. A first one with a preposition needs no comma."""
    text = ""
    for number, detail in enumerate(details):
        joined = number == 0 and detail.split()[0] in ("in", "with", "at", "over", "like")
        text += f" {detail}" if joined else f", {detail}"
    return text


def _article(noun: str) -> str:
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def _pick(choices, rng: np.random.Generator) -> str:
    return choices[rng.integers(len(choices))]
