"""What a worker process does at once. It imports no TFDS, so that workers start quickly."""

import numpy as np

from . import captions, clips, render, scores

_WORDS = 1  # a clip's words are drawn apart from its music


def parsed(names: list[str]) -> list[scores.Piece | None]:
    """The pieces of those names; None for those that are not fit."""
    return [scores.parse(name) for name in names]


def rendered(
    jobs: list[tuple[int, scores.Piece]],
    split: str,
    seed: int,
    seconds: float,
    sample_rate_hz: int,
    instruments: tuple[str, ...],
) -> list[tuple[clips.Clip, np.ndarray, str]]:
    """(clip, audio int16 [N], caption) for each (index in the split, piece)."""
    made = []
    for index, piece in jobs:
        clip = clips.draw_clip(piece, split, index, seed, seconds, instruments)
        words = np.random.default_rng([seed, *split.encode(), index, _WORDS])
        made.append(
            (
                clip,
                render.render(clip, seconds, sample_rate_hz),
                captions.caption(clip.attributes, words),
            )
        )
    return made
