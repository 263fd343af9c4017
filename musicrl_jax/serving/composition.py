"""A piece of any length from clips of one length, and the best of several candidates for it.

A piece longer than a clip is drawn in windows, each a whole clip. A window goes on from the last half of the one before
it, as MusicLM's long pieces do (MusicLM 5.5). A shorter piece is the beginning of one clip.

Legend: F frames of a window, K tokens in a frame, N samples; waveforms of several channels are [C, N].
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from musicrl_jax.serving.batcher import Drawn, Wanted

FADE_SECONDS = 0.04  # from one window of a long piece to the next
NEXT_WINDOW = (
    1 << 16
)  # added to a candidate's number for each window, so that no two are drawn with the same keys


class Piece:
    """One piece while it is drawn: says which rows come next, takes what became of them, and chooses.

    while rows := piece.rows():
        piece.add(draw(rows))
    wav, candidate, rewards = piece.best()
    """

    def __init__(
        self,
        about: Mapping[str, Any],
        text: Any,
        seed: int,
        seconds: float,
        temperature: float,
        candidates: int = 1,
    ):
        """Begins a piece.

        Args:
          about: 'frames', 'clip_seconds' and 'sample_rate_hz' of a clip, as a bundle's manifest has them.
          text: the prompt as what draws it reads it.
          seed: of the piece, from 0 to 2**32 - 1.
          seconds: its length, above 0.
          temperature: of the policy.
          candidates: pieces to choose from; with more than one their rewards are wanted.
        """
        self._about, self._seconds, self._candidates = about, seconds, candidates
        self._row = text, seed, temperature
        self._windows: list[Sequence[Drawn]] = []

    @property
    def begun(self) -> bool:
        """Whether a window of it is drawn already."""
        return bool(self._windows)

    def rows(self) -> list[Wanted]:
        """Returns the next window's rows, one a candidate; [] when the piece is whole."""
        window, half = len(self._windows), self._about["frames"] // 2
        if window == window_count(self._seconds, self._about):
            return []
        text, seed, temperature = self._row
        return [
            Wanted(
                text,
                seed,
                candidate + NEXT_WINDOW * window,
                temperature,
                continued(self._windows[-1][candidate].tokens, half) if self.begun else None,
                half if self.begun else 0,
                self._candidates > 1,
            )
            for candidate in range(self._candidates)
        ]

    def add(self, drawn: Sequence[Drawn]) -> None:
        """Takes a window: what was drawn for `rows`, in their order."""
        self._windows.append(drawn)

    def best(self) -> tuple[np.ndarray, int, dict[str, float]]:
        """Returns (wav f32 [N], the number of the candidate, its rewards as means over windows) of the best one."""
        means = []
        for candidate in range(self._candidates):
            scores = [window[candidate].scores for window in self._windows]
            means.append(
                {name: float(np.mean([each[name] for each in scores])) for name in scores[0]}
            )
        best = max(
            range(self._candidates), key=lambda candidate: means[candidate].get("total", 0.0)
        )
        frames, rate = self._about["frames"], self._about["sample_rate_hz"]
        wav = joined([window[best].wav for window in self._windows], frames // 2 / frames, rate)
        return wav[..., : round(self._seconds * rate)], best, means[best]


def window_count(seconds: float, about: Mapping[str, Any]) -> int:
    """Returns how many windows a piece takes: each after the first goes on from half of a clip."""
    frames, half = about["frames"], about["frames"] // 2
    whole = math.ceil(seconds / about["clip_seconds"] * frames - 1e-6)
    return 1 + max(0, -(-(whole - frames) // (frames - half)))


def continued(tokens: np.ndarray, half: int) -> np.ndarray:
    """Returns what a window begins with, int32 [F, K]: the last `half` frames of the one before it, int32 [F, K]."""
    return np.concatenate([tokens[len(tokens) - half :], np.zeros_like(tokens[half:])])


def joined(wavs: Sequence[np.ndarray], overlap: float, rate: int) -> np.ndarray:
    """Joins windows that each repeat the share `overlap` of the one before, f32 [N]; each fades into the next where
    the repetition ends.
    """
    whole = wavs[0]
    for wav in wavs[1:]:
        again = round(overlap * wav.shape[-1])
        fade = min(round(FADE_SECONDS * rate), again)
        rise, before = np.linspace(0.0, 1.0, fade, dtype=np.float32), whole.shape[-1] - fade
        mixed = whole[..., before:] * (1 - rise) + wav[..., again - fade : again] * rise
        whole = np.concatenate([whole[..., :before], mixed, wav[..., again:]], axis=-1)
    return whole
