"""Encodes audio files (wav, flac, ogg) in memory.

Exported bundles contain a copy of this file, so it imports nothing of this package.

Legend: C channels, N samples.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

SUBTYPES = {"wav": "PCM_16", "flac": "PCM_16", "ogg": "VORBIS"}  # of each format
# libsndfile 1.2.2 drops a wav tag of more than 2045 bytes, and all tags after it.
MAX_WAV_TAG_BYTES = 2000


def audio_format(path: str | Path) -> str:
    """Returns the format named by a file's suffix. Raises ValueError if it cannot be written."""
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix not in SUBTYPES:
        endings = " or ".join(f".{known}" for known in SUBTYPES)
        raise ValueError(f"out={str(path)!r} does not end in {endings}: choose one of them")
    return suffix


def provenance_tags(prompt: str, **settings: Any) -> dict[str, str]:
    """Returns tags that say how a clip was generated: the prompt and, as JSON, the settings.

    The settings include the sha256 of the prompt, because a wav file may truncate a long prompt.
    """
    settings["prompt_sha256"] = hashlib.sha256(prompt.encode()).hexdigest()
    return {"title": prompt, "comment": json.dumps(settings)}


def encode(wav: np.ndarray, rate: int, form: str, tags: Mapping[str, str] | None = None) -> bytes:
    """Encodes audio as the content of a file.

    Args:
      wav: samples in [-1, 1], f32 [N] or [C, N].
      rate: sample rate in Hz.
      form: 'wav', 'flac' or 'ogg'.
      tags: texts by name ('title', 'comment', ...), one of the tags that `soundfile.SoundFile` has
        as attributes. A wav file holds the first MAX_WAV_TAG_BYTES bytes of each.
    """
    content, channels = io.BytesIO(), 1 if wav.ndim == 1 else len(wav)
    with soundfile.SoundFile(
        content, "w", rate, channels, format=form.upper(), subtype=SUBTYPES[form]
    ) as file:
        for name, text in (tags or {}).items():
            # A NUL byte would end the C string, and libsndfile refuses an empty one.
            text = text.replace("\0", " ")
            if form == "wav":
                text = text.encode()[:MAX_WAV_TAG_BYTES].decode(errors="ignore")
            setattr(file, name, text)
        # The Vorbis encoder puts its input on the stack: a minute of audio would overflow it.
        for start in range(0, wav.shape[-1], rate):
            file.write(wav[..., start : start + rate].T)
    return content.getvalue()
