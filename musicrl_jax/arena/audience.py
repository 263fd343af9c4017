"""An audience: simulated listeners who listen to clips and compare them with their prompts.

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

# Words by which a caption mentions an attribute. The instrument is nearly always mentioned.
MENTIONS = {
    "key": r"\b[A-G](?: sharp| flat)? (?:major|minor)\b",
    "tempo_bpm": r"\b(?:[4-9]\d|[12]\d\d)\b",
    "register": r"(?i)\b(?:register|pitch|pitched|range|deep|mid-range)\b",
    "density": (
        r"(?i)\b(?:few notes|much space|sparse|steadily|quick notes|busy|note-filled|dense)\b"
    ),
}


def mentioned_attributes(caption: str, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the attributes of a clip that its caption mentions; only these can be rated."""
    return {
        name: value
        for name, value in attributes.items()
        if name not in MENTIONS or re.search(MENTIONS[name], caption)
    }


@dataclasses.dataclass(frozen=True)
class Audience:
    """A panel, and the real clips that set the scale of its measurements.

    Attributes:
      panel: the listeners.
      clips: real clips; their attributes say what their captions ask for.
      ears_clips: number of training clips that set the scale of the measurements.
      seed: seed of their choice. Panels that check on one another should have their own: a clip
        that misleads one instrument classifier need not mislead one fitted to other clips.
    """

    panel: Panel
    clips: Clips
    ears_clips: int = 400
    seed: int = 0

    def check(self, rate_hz: int) -> None:
        """Raises an error if the listeners cannot be simulated.

        Args:
          rate_hz: sample rate of the generated clips.

        Raises:
          ModuleNotFoundError: if the libraries for listening are not installed.
          ValueError: if the listeners need another sample rate.
        """
        extras.check("listening", "listeners", "librosa", "sklearn")
        provide_caches()
        from musicrl_jax.arena.ears import RATE_HZ  # an extra; training hosts do not need it

        if rate_hz != RATE_HZ:
            raise ValueError(
                f"the codec decodes at {rate_hz} Hz, and simulated listeners need {RATE_HZ}: use a "
                "codec of that rate"
            )

    def load(self) -> "LoadedAudience":
        """Fits the ears to real clips, in about a tenth of a second a clip."""
        provide_caches()
        from musicrl_jax.arena.ears import Ears

        # The attributes that each caption mentions.
        requests = {}
        for split in self.clips.splits():
            attributes = self.clips.attributes(split).values()
            for caption, known in zip(self.clips.captions(split), attributes, strict=True):
                requests[caption] = mentioned_attributes(caption, known)

        # The clips that set the scale, with their ids, by which their attributes are looked up.
        by_id, wavs, attributes = self.clips.attributes("train"), [], []
        batch_size = min(self.ears_clips, self.clips.count("train"))
        clips = dataclasses.replace(self.clips, with_captions=True)
        for batch in clips.batches("train", batch_size, seed=self.seed, epochs=1):
            hosts.stop_point()
            wavs += list(batch["audio"])
            attributes += [by_id[name] for name in batch["id"]]
            if len(wavs) >= self.ears_clips:
                break
        ears = Ears(wavs[: self.ears_clips], attributes[: self.ears_clips])
        return LoadedAudience(self.panel, ears, requests)


@dataclasses.dataclass(frozen=True)
class LoadedAudience:
    """An audience with fitted ears.

    Attributes:
      panel: the listeners.
      ears: `ears.Ears`.
      requests: the attributes that each prompt asks for; a prompt without an entry asks for none.
    """

    panel: Panel
    ears: Any
    requests: Mapping[str, Mapping[str, Any]]

    def measure(self, wavs: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Returns measurements f64 [P, M] of clips f32 [P, N], in the order of `MEASUREMENTS`."""
        rows = []
        for wav, prompt in zip(wavs, prompts, strict=True):
            rows.append(self.ears.measure(wav, self.requests.get(prompt, {})))
        return np.stack(rows)

    def utilities(self, wavs: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Returns the mean utility of each clip to the panel, f64 [P]; real clips have about 0."""
        return self.panel.utilities(self.measure(wavs, prompts)).mean(axis=0)
