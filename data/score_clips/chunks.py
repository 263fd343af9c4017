"""Jobs of the worker processes. Imports no TFDS, so that workers start quickly."""

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
