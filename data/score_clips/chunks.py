"""Jobs of the worker processes. Imports no TFDS, so that workers start quickly."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from . import captions, clips, render, scores

_WORDS = 1  # the random stream of a clip's words, apart from that of its music


def parsed(names: list[str]) -> list[scores.Piece | None]:
    """Returns the pieces with these names, None for each unusable one."""
    return [scores.parse(name) for name in names]


def rendered(
    jobs: list[tuple[int, scores.Piece]],
    split: str,
    seed: int,
    seconds: float,
    sample_rate_hz: int,
    instruments: tuple[str, ...],
) -> list[tuple[clips.Clip, np.ndarray, str]]:
    """Returns (clip, audio int16 [N], caption) for each job (index in the split, piece)."""
    results = []
    for index, piece in jobs:
        clip = clips.draw_clip(piece, split, index, seed, seconds, instruments)
        audio = render.render(clip, seconds, sample_rate_hz)
        words = np.random.default_rng([seed, *split.encode(), index, _WORDS])
        results.append((clip, audio, captions.caption(clip.attributes, words)))
    return results


def example(clip: clips.Clip, audio: np.ndarray, caption: str) -> tuple[str, dict[str, Any]]:
    """Returns the key and the features of a rendered clip."""
    features = {
        "audio": audio,
        "caption": caption,
        "id": clip.id,
        "attributes": json.dumps(clip.attributes),
        "notes": json.dumps(clip.notes),
    }
    return clip.id, features


# --- the same for Beam, whose processes pass on JSON ---


def as_json(piece: scores.Piece, indices: list[int]) -> list[Any]:
    """Returns an item of `examples`: clips of one piece, by their indices in the split."""
    return [dataclasses.asdict(piece), indices]


def examples(item: list[Any], *arguments) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (key, features) for each clip of an item. `arguments` are those of `rendered`."""
    fields, indices = item
    piece = scores.Piece(**fields | {"notes": tuple(map(tuple, fields["notes"]))})
    for index in indices:
        for result in rendered([(index, piece)], *arguments):
            yield example(*result)
