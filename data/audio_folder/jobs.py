"""Work on one file, in threads of the builder or in Beam's processes: to examine it, to cut it.

Imports no TFDS, so that a process that only examines starts quickly. N is the number of samples of
a clip.
"""

import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from . import captions, recordings
from .streams import Unusable

Example = tuple[str, dict[str, Any]]  # key and features of an example


class Settings(NamedTuple):
    """The fields of AudioFolderConfig that clips depend on."""

    folder: str
    clip_seconds: float
    sample_rate_hz: int
    silence_share_limit: float

    def path(self, file: str = "") -> pathlib.Path:
        """Returns the path of a recording, or of their folder."""
        return pathlib.Path(self.folder).expanduser() / file


def examined(settings: Settings, file: str) -> recordings.Recording | Unusable:
    """Returns the measurements of a file, or its fault."""
    limit = settings.silence_share_limit
    try:
        recording = recordings.examine(
            settings.path(file), settings.clip_seconds, settings.sample_rate_hz
        )
    except Unusable as unusable:
        return unusable
    if min(recording.silence) > limit:
        reason = (
            f"more than {limit:.0%} of each clip is silence or a constant: record it again, or "
            "build with a greater silence_share_limit"
        )
        return Unusable(reason, f"{len(recording.silence)} clips")
    return recording


def read(settings: Settings, path: pathlib.Path, peak: np.float32) -> Iterator[np.ndarray]:
    """Yields the clips of a file, int16 [N]. Raises ValueError if it is no longer usable."""
    try:
        yield from recordings.read_clips(path, settings.clip_seconds, settings.sample_rate_hz, peak)
    except Unusable as unusable:
        raise ValueError(
            f"{path} changed since it was checked: {unusable}; build again"
        ) from unusable


def examples(
    settings: Settings,
    row: captions.Row,
    recording: recordings.Recording,
    clips: Iterable[np.ndarray],
) -> Iterator[Example]:
    """Yields (id, example) for each clip of a row that is not silent."""
    for number, audio in enumerate(clips):
        if recording.silence[number] > settings.silence_share_limit:
            continue
        name = f"{row['id']}-{number:04d}"
        place = {"file": row["file"], "start_seconds": number * settings.clip_seconds}
        example = {
            "audio": audio,
            "caption": row["caption"],
            "id": name,
            "attributes": json.dumps(place),
        }
        yield name, example


# --- the same for Beam, whose processes pass on JSON ---


def examined_as_json(settings: Settings, file: str) -> tuple[str, dict[str, Any]]:
    """Returns the name of a file and its outcome."""
    return file, as_json(examined(settings, file))


def examples_of_pair(
    settings: Settings, pair: tuple[captions.Row, dict[str, Any]]
) -> Iterator[Example]:
    """Yields (id, example) for each clip of a row and the outcome of its file."""
    row, recording = pair[0], from_json(pair[1])
    clips = read(settings, settings.path(row["file"]), recording.peak)
    return examples(settings, row, recording, clips)


def as_json(outcome: recordings.Recording | Unusable) -> dict[str, Any]:
    """Returns an outcome of `examined` for `from_json`. No digit is lost."""
    if isinstance(outcome, Unusable):
        return {"reason": outcome.reason, "value": outcome.value}
    peak, silence, digest = outcome
    return {"peak": float(peak), "silence": silence, "digest": digest.hex()}


def from_json(outcome: dict[str, Any]) -> recordings.Recording | Unusable:
    """Returns the outcome that `as_json` wrote."""
    if "reason" in outcome:
        return Unusable(outcome["reason"], outcome["value"])
    peak, silence = np.float32(outcome["peak"]), tuple(outcome["silence"])
    return recordings.Recording(peak, silence, bytes.fromhex(outcome["digest"]))
