"""Makes a piece of any length from clips of one length, and chooses the best of its candidates.

A piece longer than a clip is drawn in windows, each a whole clip that continues the last half of
the window before (MusicLM 5.5). A shorter piece is the beginning of one clip.

Legend: F frames of a window, K tokens in a frame, C channels, N samples. Waveforms may be [C, N].
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from musicrl_jax.serving.batcher import Clip, Row

FADE_SECONDS = 0.04  # from one window to the next
# Added to a candidate's number for each window, so that no two windows use the same random keys.
NEXT_WINDOW = 1 << 16


class Piece:
    """A piece that is drawn window by window.

    while rows := piece.rows():
        piece.add(draw(rows))
    wav, candidate, rewards = piece.best()
    """

    def __init__(
        self,
        manifest: Mapping[str, Any],
        text: Any,
        seed: int,
        seconds: float,
        temperature: float,
        candidates: int = 1,
    ):
        """Begins a piece.

        Args:
          manifest: 'frames', 'clip_seconds' and 'sample_rate_hz' of a clip, as in a bundle's.
          text: the prompt, as the bundle encodes it.
          seed: of the piece, from 0 to 2**32 - 1.
          seconds: its length, above 0.
          temperature: of the policy.
          candidates: number of pieces to choose from; rewards are needed if above 1.
        """
        self._manifest, self._seconds, self._candidates = manifest, seconds, candidates
        self._prompt = text, seed, temperature
        self._windows: list[Sequence[Clip]] = []

    @property
    def begun(self) -> bool:
        """Whether a window of it is drawn."""
        return bool(self._windows)

    def rows(self) -> list[Row]:
        """Returns the rows of the next window, one a candidate; [] when the piece is whole."""
        window, half = len(self._windows), self._manifest["frames"] // 2
        if window == window_count(self._seconds, self._manifest):
            return []
        # A candidate continues its own last window.
        rows, (text, seed, temperature) = [], self._prompt
        for candidate in range(self._candidates):
            beginning, frames = None, 0
            if self.begun:
                beginning, frames = continued(self._windows[-1][candidate].tokens, half), half
            number, scored = candidate + NEXT_WINDOW * window, self._candidates > 1
            rows.append(Row(text, seed, number, temperature, beginning, frames, scored))
        return rows

    def add(self, clips: Sequence[Clip]) -> None:
        """Adds a window: the clips of `rows`, in their order."""
        self._windows.append(clips)

    def best(self) -> tuple[np.ndarray, int, dict[str, float]]:
        """Returns (wav f32 [N], candidate, rewards as means over windows) of the best candidate."""
        # Rewards.
        means = []
        for candidate in range(self._candidates):
            scores = [window[candidate].scores for window in self._windows]
            means.append({})
            for name in scores[0]:
                means[-1][name] = float(np.mean([each[name] for each in scores]))
        best = max(range(self._candidates), key=lambda each: means[each].get("total", 0.0))

        # The waveform.
        frames, rate = self._manifest["frames"], self._manifest["sample_rate_hz"]
        wav = joined([window[best].wav for window in self._windows], frames // 2 / frames, rate)
        return wav[..., : round(self._seconds * rate)], best, means[best]


def window_count(seconds: float, manifest: Mapping[str, Any]) -> int:
    """Returns the number of windows of a piece; each after the first adds half a clip."""
    frames, half = manifest["frames"], manifest["frames"] // 2
    whole = math.ceil(seconds / manifest["clip_seconds"] * frames - 1e-6)
    return 1 + max(0, -(-(whole - frames) // (frames - half)))


def continued(tokens: np.ndarray, half: int) -> np.ndarray:
    """Returns the beginning of a window: the last `half` frames of the one before, int32 [F, K]."""
    return np.concatenate([tokens[len(tokens) - half :], np.zeros_like(tokens[half:])])


def joined(wavs: Sequence[np.ndarray], overlap: float, rate: int) -> np.ndarray:
    """Joins windows, f32 [N], each of which repeats the share `overlap` of the one before.

    Each fades into the next where the repetition ends.
    """
    whole = wavs[0]
    # The next window repeats the last part of what is joined so far, and then goes on.
    for wav in wavs[1:]:
        again = round(overlap * wav.shape[-1])
        fade = min(round(FADE_SECONDS * rate), again)
        rise, before = np.linspace(0.0, 1.0, fade, dtype=np.float32), whole.shape[-1] - fade
        mixed = whole[..., before:] * (1 - rise) + wav[..., again - fade : again] * rise
        whole = np.concatenate([whole[..., :before], mixed, wav[..., again:]], axis=-1)
    return whole
