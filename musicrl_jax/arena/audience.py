"""Listeners with ears: simulated listeners who hear clips and know what was asked for.

Legend: P clips, N samples, M measurements.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from musicrl_jax.arena.listeners import Panel
from musicrl_jax.core import extras, hosts
from musicrl_jax.core.files import provide_caches
from musicrl_jax.inputs.clips import Clips

# By which words a caption asks for what may or may not be said of a clip. The instrument is nearly always named.
SAID = {
    "key": r"\b[A-G](?: sharp| flat)? (?:major|minor)\b",
    "tempo_bpm": r"\b(?:[4-9]\d|[12]\d\d)\b",
    "register": r"(?i)\b(?:register|pitch|pitched|range|deep|mid-range)\b",
    "density": r"(?i)\b(?:few notes|much space|sparse|steadily|quick notes|busy|note-filled|dense)\b",
}


def asked_for(caption: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a clip, without that which its caption leaves unsaid: nobody can be judged by that."""
    return {
        name: value
        for name, value in known.items()
        if name not in SAID or re.search(SAID[name], caption)
    }


@dataclasses.dataclass(frozen=True)
class Audience:
    """A panel, and the real clips that set its scale.

    Attributes:
      panel: who listens.
      clips: real clips; what is known of them says what their captions ask for.
      ears_clips: so many training clips set the scale of the measurements.
      seed: of which these are. Panels that check on one another have ears of their own, fitted to other clips: what
        fools one ear, that for instruments above all, need not fool the next.
    """

    panel: Panel
    clips: Clips
    ears_clips: int = 400
    seed: int = 0

    def check(self, rate_hz: int) -> None:
        """ModuleNotFoundError where the ears are not installed, ValueError where they hear at another rate."""
        extras.check("listening", "listeners", "librosa", "sklearn")
        provide_caches()
        from musicrl_jax.arena.ears import RATE_HZ  # an extra; training hosts go without

        if rate_hz != RATE_HZ:
            raise ValueError(
                f"the codec decodes at {rate_hz} Hz, and simulated listeners hear at {RATE_HZ}"
            )

    def load(self) -> "Hearing":
        """Fits the ears, which takes about a tenth of a second a clip."""
        provide_caches()
        from musicrl_jax.arena.ears import Ears

        asked = {}
        for split in self.clips.splits():
            captioned = zip(
                self.clips.captions(split), self.clips.attributes(split).values(), strict=True
            )
            asked |= {caption: asked_for(caption, known) for caption, known in captioned}
        known, wavs, true = self.clips.attributes("train"), [], []
        batch_size = min(self.ears_clips, self.clips.count("train"))
        clips = dataclasses.replace(self.clips, with_captions=True)  # and their ids
        for batch in clips.batches("train", batch_size, seed=self.seed, epochs=1):
            hosts.stop_point()
            wavs += list(batch["audio"])
            true += [known[name] for name in batch["id"]]
            if len(wavs) >= self.ears_clips:
                break
        return Hearing(self.panel, Ears(wavs[: self.ears_clips], true[: self.ears_clips]), asked)


@dataclasses.dataclass(frozen=True)
class Hearing:
    """What an audience hears.

    Attributes:
      panel: who listens.
      ears: `ears.Ears`.
      asked: what is asked for, by prompt; a prompt that is not here asks for nothing that can be judged.
    """

    panel: Panel
    ears: Any
    asked: Mapping[str, Mapping[str, Any]]

    def measure(self, wavs: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """f32 [P, N] and P prompts -> f64 [P, M], in the order of `listeners.MEASUREMENTS`."""
        pairs = zip(wavs, prompts, strict=True)
        return np.stack(
            [self.ears.measure(wav, self.asked.get(prompt, {})) for wav, prompt in pairs]
        )

    def utilities(self, wavs: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """What the clips are worth to the panel on average, f64 [P]; 0 is about a real clip."""
        return self.panel.utilities(self.measure(wavs, prompts)).mean(axis=0)
