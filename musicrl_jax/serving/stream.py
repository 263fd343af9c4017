"""Makes the parts of a wav file from a clip while it is drawn.

The length of a clip is known, so the parts together are a whole file with a true header.

A streamed clip has the tokens of the whole clip of the same prompt and seed. Its sound is not the
same to the bit: SoundStorm decodes windows that overlap, not the whole clip.

Legend: C channels, N samples.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from musicrl_jax.core import audio
from musicrl_jax.serving.batcher import NOT_FINITE
from musicrl_jax.serving.bundle import Bundle
from musicrl_jax.serving.system_player import SystemPlayer

FORM = "wav"  # the header of the others depends on all samples
SAMPLE_BYTES = 2  # of audio.SUBTYPES["wav"]


def refusal(player: Bundle | SystemPlayer, seconds: float, candidates: int, form: str) -> str:
    """Returns why a clip cannot be streamed, with a remedy; '' if it can.

    Args:
      player: draws the clip.
      seconds: its length.
      candidates: clips to choose from.
      form: 'wav', 'flac' or 'ogg'.
    """
    whole = player.manifest["clip_seconds"]
    if not player.streams:
        return (
            "stream: this system cannot draw a clip in chunks, or its bundle was exported before "
            "bundles could; ask for the whole clip, or export the bundle again"
        )
    # What would need the end of the clip first.
    if candidates > 1:
        return f"candidates={candidates}: a stream cannot wait for the best of several; give 1"
    if form != FORM:
        return f"the format {form} cannot be streamed, as its header needs the whole clip; use wav"
    if seconds > whole:
        return (
            f"{seconds:g} s is more than the {whole:g} s of one clip: the windows of a longer "
            "piece are not streamed; give a shorter length, or ask for the whole piece"
        )
    return ""


def parts(
    player: Bundle | SystemPlayer,
    text: Any,
    seed: int,
    seconds: float,
    temperature: float,
    tags: Mapping[str, str],
) -> Iterator[bytes]:
    """Yields a wav file: first its header with the first chunk of sound, then each next chunk.

    Args:
      player: draws the clip.
      text: the prompt, as the player encodes it.
      seed: of the clip.
      seconds: length, at most that of the player's clips.
      temperature: of the policy.
      tags: of the file, as in `audio.encode`.

    Raises:
      FloatingPointError: samples are not finite.
    """
    # Samples that are still to come; the last chunk may have more than are asked for.
    rate = player.manifest["sample_rate_hz"]
    missing, header = round(seconds * rate), True
    for clips in player.stream(text, seed, temperature):
        wav = clips.wav[0][..., :missing]
        if not np.isfinite(wav).all():
            raise FloatingPointError(NOT_FINITE)
        samples = _samples(np.clip(wav, -1.0, 1.0), rate)
        # The header is that of as much silence.
        if header:
            silence = np.zeros((*wav.shape[:-1], missing), np.float32)
            whole = audio.encode(silence, rate, FORM, tags)
            samples, header = whole[: -silence.size * SAMPLE_BYTES] + samples, False
        yield samples
        missing -= wav.shape[-1]
        if not missing:
            return


def file_bytes(first: bytes) -> int:
    """Returns the length of a wav file in bytes, from the first of its `parts`."""
    return int.from_bytes(first[4:8], "little") + 8  # RIFF's own length field


def _samples(wav: np.ndarray, rate: int) -> bytes:
    """Returns the samples of a wav file, f32 [N] or [C, N], without its header."""
    return audio.encode(wav, rate, FORM)[-wav.size * SAMPLE_BYTES :]
