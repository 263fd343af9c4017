"""Sound as the content of a file: wav, flac and ogg.

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

SUBTYPES = {
    "wav": "PCM_16",
    "flac": "PCM_16",
    "ogg": "VORBIS",
}  # of each format that can be written
LONGEST_TAG = 2000  # bytes in a wav: libsndfile 1.2.2 writes one of more than 2045, and all after it, as nothing


def audio_format(path: str | Path) -> str:
    """Returns the format that a file's ending names; ValueError where it is none that can be written."""
    form = Path(path).suffix.lower().removeprefix(".")
    if form not in SUBTYPES:
        endings = " or ".join(f".{known}" for known in SUBTYPES)
        raise ValueError(f"out={str(path)!r} does not end in {endings}: choose one of them")
    return form


def provenance_tags(prompt: str, **settings: Any) -> dict[str, str]:
    """Returns the tags that say how a clip was made: the prompt as title, the settings as JSON in the comment.

    A wav may hold a part of a long prompt, and so the comment has the sha256 of all of it.
    """
    settings["prompt_sha256"] = hashlib.sha256(prompt.encode()).hexdigest()
    return {"title": prompt, "comment": json.dumps(settings)}


def encode(wav: np.ndarray, rate: int, form: str, tags: Mapping[str, str] | None = None) -> bytes:
    """Returns the content of a file of f32 [N] or [C, N] in [-1, 1].

    Args:
      wav: the samples of one channel or of several.
      rate: samples a second.
      form: 'wav', 'flac' or 'ogg'.
      tags: 'title', 'comment' and so on: the texts that `soundfile.SoundFile` has as attributes. A wav
        holds the first LONGEST_TAG bytes of each.
    """
    file, channels = io.BytesIO(), 1 if wav.ndim == 1 else len(wav)
    with soundfile.SoundFile(
        file, "w", rate, channels, format=form.upper(), subtype=SUBTYPES[form]
    ) as written:
        for name, text in (tags or {}).items():
            text = text.replace(
                "\0", " "
            )  # which would end the text in C, and libsndfile refuses an empty one
            short = text.encode()[:LONGEST_TAG].decode(errors="ignore")
            setattr(written, name, short if form == "wav" else text)
        for start in range(
            0, wav.shape[-1], rate
        ):  # Vorbis puts all of it on the stack: a minute overflows it
            written.write(wav[..., start : start + rate].T)
    return file.getvalue()
