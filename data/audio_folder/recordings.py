"""Reads the clips of one file in blocks, so that memory does not grow with its length.

N is the number of samples of a clip.
"""

import hashlib
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import soundfile
import soxr

from .streams import (
    SLACK_SECONDS,
    Stream,
    StreamFile,
    Unusable,
    check_length,
    is_open,
    streams,
    truncated,
)

_ENOUGH = 0.95  # of a clip: a file of this length or more is repeated from its start to fill it
_BLOCK = 2**20  # samples to decode at once, over all channels
_SMALL_BLOCK = 256  # samples of each channel that may be lost where a stream breaks off
_LEAST_RATE_HZ = (
    1000  # A lower rate is a wrong header: resampling would make hours of a small file.
)
_GREATEST = 2.0**31  # in full scales: 32-bit integer samples written as floats are accepted
_WINDOW_SECONDS = 0.1  # length of a window that is silent or not
_QUIET = 2e-3  # in full scales: a window with a smaller range is silence (-60 dB) or a constant
# libsndfile's note on an aiff, au or w64 whose stated size differs from the file's, in bytes.
_OTHER_SIZE = re.compile(r"(?m)^\s*(?:SSND|Data Size|riff)\s*: (\d+) \(should be (\d+)\)")


class Recording(NamedTuple):
    """Measurements of a file, at the sample rate of the data set.

    Attributes:
      peak: greatest magnitude, in full scales.
      silence: share of each clip that is silence or a constant.
      digest: hash of all samples, equal for copies of a recording.
    """

    peak: np.float32
    silence: tuple[float, ...]
    digest: bytes


class _Forward(soundfile.SoundFile):
    """A file to read from start to end only.

    soundfile seeks to the current position after each read. In an mp3 this resets the decoder, and
    each later block starts with wrong samples.
    """

    def seekable(self) -> bool:
        """Returns False, so that soundfile does not seek."""
        return False


def examine(path: pathlib.Path, clip_seconds: float, sample_rate_hz: int) -> Recording:
    """Measures a file, which it reads to the end. Raises Unusable for an unusable file."""
    # Silence is measured in whole windows of each clip.
    length = round(clip_seconds * sample_rate_hz)
    window = min(length, max(1, round(_WINDOW_SECONDS * sample_rate_hz)))
    peak, count, digest = np.float32(0.0), 0, hashlib.blake2b()
    rest, silence = np.zeros(0, np.float32), []  # samples behind the last whole clip; shares
    for samples in _blocks(path, sample_rate_hz):
        count += len(samples)
        peak = np.maximum(peak, np.abs(samples).max(initial=0.0))  # propagates NaN, unlike max
        digest.update(samples)
        rest = np.concatenate([rest, samples])
        whole = len(rest) // length * length
        silence += [_silent_share(clip, window) for clip in rest[:whole].reshape(-1, length)]
        rest = rest[whole:]

    # Faults of a whole file. `not <` is true for NaN too.
    if not peak < _GREATEST:
        raise Unusable("samples far beyond full scale: export it again", f"{peak:.3g} times")
    if count < _ENOUGH * length:
        remedy = "give longer files, or build with shorter clip_seconds"
        reason = f"shorter than a clip of {clip_seconds:g} s: {remedy}"
        raise Unusable(reason, f"{count / sample_rate_hz:.3f} s")
    return Recording(peak, tuple(silence or [_silent_share(rest, window)]), digest.digest())


def file_size(path: pathlib.Path) -> int | None:
    """Returns the size of a regular file in bytes, or None if it is missing or not accessible."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def _silent_share(samples: np.ndarray, window: int) -> float:
    """Returns the share of windows that are silent. `window` is their number of samples."""
    windows = samples[: len(samples) // window * window].reshape(-1, window)
    return float(np.mean(np.ptp(windows, axis=1) < _QUIET)) if len(windows) else 0.0


# --- clips ---


def read_clips(
    path: pathlib.Path, clip_seconds: float, sample_rate_hz: int, peak: np.float32
) -> Iterator[np.ndarray]:
    """Yields a file as mono int16 [N] clips without overlap. Drops a tail shorter than a clip.

    Repeats a file of 95 to 100 % of a clip from its start. Raises Unusable for an unusable file.

    Args:
      path: the file.
      clip_seconds: length of a clip.
      sample_rate_hz: sample rate of the clips.
      peak: the file's peak, by `examine`. Above 1, the whole file is scaled down: mp3, opus and
        float files can exceed full scale.
    """
    length = round(clip_seconds * sample_rate_hz)
    scale = max(peak, np.float32(1.0))
    rest, first = np.zeros(0, np.int16), True
    for samples in _blocks(path, sample_rate_hz):
        rest = np.concatenate([rest, np.round(samples / scale * 32767).astype(np.int16)])
        whole = len(rest) // length * length
        yield from rest[:whole].reshape(-1, length)
        rest, first = rest[whole:], first and not whole
    if first and len(rest):
        yield np.resize(rest, length)


# --- decoding ---


def _blocks(path: pathlib.Path, sample_rate_hz: int) -> Iterator[np.ndarray]:
    """Yields a file as blocks of mono float32 that join to the whole file."""
    try:
        if not path.exists():
            raise Unusable("missing: put the file there, or mend its name in the captions")
        if not path.is_file():
            raise Unusable("not a regular file, but a folder, a pipe or a device: give a file")
        if path.stat().st_size == 0:
            raise Unusable("zero bytes long: copy the file again")
        # A file may have several streams with different rates: each has its own resampler.
        for stream in streams(path):
            with StreamFile(path, stream) as raw:
                yield from _resampled(raw, stream, sample_rate_hz)
    except soundfile.LibsndfileError as error:
        reason = "not readable as audio, or damaged: replace it, or convert it to wav or flac"
        if path.suffix.lower() == ".raw":
            reason = "raw samples without a header: convert it to wav or flac"
        raise Unusable(reason) from error
    except OSError as error:
        reason = "not readable: look at its name, its permissions and its disk"
        raise Unusable(reason, error.strerror or "") from error


def _resampled(raw: StreamFile, stream: Stream, sample_rate_hz: int) -> Iterator[np.ndarray]:
    """Yields one stream of a file as blocks of mono float32."""
    with _Forward(raw) as file:
        # The header.
        rate_hz = file.samplerate
        if file.frames == 0:
            raise Unusable("no samples: export it again")
        if rate_hz < _LEAST_RATE_HZ:
            reason = "a sample rate that no recording has: mend its header, or export it again"
            raise Unusable(reason, f"{rate_hz} Hz")
        _check_notes(file)

        # The samples.
        stated = file.frames if stream.samples is None and file.frames < 2**62 else stream.samples
        resampler = soxr.ResampleStream(rate_hz, sample_rate_hz, 1, dtype="float32")
        read = 0
        for samples in _decoded(raw, file, stated):
            with np.errstate(over="ignore", invalid="ignore"):  # an error below names them
                mono = samples.mean(axis=1)
            if not (finite := np.isfinite(mono)).all():
                place = f"the first at {(read + int(np.argmin(finite))) / rate_hz:.3f} s"
                raise Unusable("NaN or infinite samples: export it again", place)
            read += len(samples)
            yield resampler.resample_chunk(mono)
    check_length(read, stated, rate_hz)
    yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


def _check_notes(file: soundfile.SoundFile) -> None:
    """Raises Unusable if libsndfile noted that an aiff, an au or a w64 ends early."""
    for stated, there in (map(int, sizes) for sizes in _OTHER_SIZE.findall(file.extra_info)):
        seconds = file.frames / file.samplerate
        stated_seconds = seconds * stated / max(there, 1)
        if not is_open(stated) and stated_seconds - seconds > SLACK_SECONDS:
            raise truncated(seconds, stated_seconds)


def _decoded(
    raw: StreamFile, file: soundfile.SoundFile, stated: int | None
) -> Iterator[np.ndarray]:
    """Yields float32 [samples, channels] blocks to the end of a stream or of a broken-off FLAC.

    Raises soundfile.LibsndfileError if the stream is damaged before its end.
    """
    # Every format: large blocks.
    read, size = 0, _BLOCK // file.channels
    try:
        while len(samples := file.read(size, dtype="float32", always_2d=True)):
            read += len(samples)
            yield samples
        return
    except soundfile.LibsndfileError:
        if file.format != "FLAC":
            raise

    # soundfile returns nothing of a block that ends in an error: read it again in small blocks.
    raw.seek(0)
    with _Forward(raw) as again:
        passed = 0
        while passed < read:
            passed += len(again.read(min(size, read - passed), dtype="float32", always_2d=True))
        try:
            while True:
                within = stated is not None and read < stated
                size = min(_SMALL_BLOCK, stated - read) if within else _SMALL_BLOCK
                if not len(samples := again.read(size, dtype="float32", always_2d=True)):
                    break
                read += len(samples)
                yield samples
        except soundfile.LibsndfileError:
            # Accepted: bytes behind the stated length, and half a frame at the end of the file,
            # which a stopped recorder leaves.
            if not raw.at_end() and (stated is None or read < stated):
                raise
