"""Recordings: one file's clips, read in blocks so that length costs no memory.

Shapes: N samples of a clip.
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
)

_ENOUGH = 0.95  # of a clip: a file that is a little shorter is repeated from its start
_BLOCK = 2**20  # samples of all channels together that are decoded at once
_SMALL_BLOCK = 256  # samples of each channel that may be lost where a stream breaks off
_LEAST_RATE_HZ = (
    1000  # below it the header is wrong, and resampling would make hours out of a small file
)
_GREATEST = 2.0**31  # in full scales: 32-bit samples read as floats still pass
_WINDOW_SECONDS = 0.1  # the span of sound that is silent or not
_QUIET = (
    2e-3  # full scales from the lowest sample to the highest: silence, at -60 dB, or a constant
)
# What libsndfile notes of an aiff, an au and a w64 whose sizes are not those of the file, in bytes.
_OTHER_SIZE = re.compile(r"(?m)^\s*(?:SSND|Data Size|riff)\s*: (\d+) \(should be (\d+)\)")


class Recording(NamedTuple):
    """Measurements of a file, at the sample rate of the data set.

    Attributes:
      peak: the greatest magnitude, in full scales.
      silence: for each clip, the share of it that is silence or a constant.
      digest: of all samples: equal for copies of a recording.
    """

    peak: np.float32
    silence: tuple[float, ...]
    digest: bytes


class _Forward(soundfile.SoundFile):
    """A file that is read from its start to its end.

    soundfile seeks after every read, to where it is already. In an mp3 that loses the decoder's
    memory, and each block but the first begins with wrong samples.
    """

    def seekable(self) -> bool:
        return False


def examine(path: pathlib.Path, clip_seconds: float, sample_rate_hz: int) -> Recording:
    """Reads all of a file; raises Unusable where it cannot be used."""
    length = round(clip_seconds * sample_rate_hz)
    window = min(length, max(1, round(_WINDOW_SECONDS * sample_rate_hz)))
    peak, count, digest = np.float32(0.0), 0, hashlib.blake2b()
    rest, silence = np.zeros(0, np.float32), []
    for samples in _blocks(path, sample_rate_hz):
        count += len(samples)
        peak = np.maximum(peak, np.abs(samples).max(initial=0.0))  # keeps a NaN, as max would not
        digest.update(samples)
        rest = np.concatenate([rest, samples])
        whole = len(rest) // length * length
        silence += [_silent_share(clip, window) for clip in rest[:whole].reshape(-1, length)]
        rest = rest[whole:]
    if not peak < _GREATEST:
        raise Unusable("samples far beyond full scale: export it again", f"{peak:.3g} times")
    if count < _ENOUGH * length:
        reason = f"shorter than a clip of {clip_seconds:g} s: give longer files, or build with shorter clip_seconds"
        raise Unusable(reason, f"{count / sample_rate_hz:.3f} s")
    return Recording(peak, tuple(silence or [_silent_share(rest, window)]), digest.digest())


def file_size(path: pathlib.Path) -> int | None:
    """Returns the size of a regular file in bytes; None where there is none, or it cannot be looked at."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def _silent_share(samples: np.ndarray, window: int) -> float:
    """Returns the share of windows of N samples whose samples hardly differ."""
    windows = samples[: len(samples) // window * window].reshape(-1, window)
    return float(np.mean(np.ptp(windows, axis=1) < _QUIET)) if len(windows) else 0.0


def read_clips(
    path: pathlib.Path, clip_seconds: float, sample_rate_hz: int, peak: np.float32
) -> Iterator[np.ndarray]:
    """Yields a file as mono int16 [N] clips that do not overlap; a tail shorter than a clip is dropped.

    `peak` is that of `examine`: samples beyond full scale (mp3, opus and float files can have them) bring the whole
    file down. A file between 95 and 100 % of one clip is repeated from its start. Raises Unusable.
    """
    length = round(clip_seconds * sample_rate_hz)
    scale = max(peak, np.float32(1.0))
    left, first = np.zeros(0, np.int16), True
    for samples in _blocks(path, sample_rate_hz):
        left = np.concatenate([left, np.round(samples / scale * 32767).astype(np.int16)])
        whole = len(left) // length * length
        yield from left[:whole].reshape(-1, length)
        left, first = left[whole:], first and not whole
    if first and len(left):
        yield np.resize(left, length)


def _blocks(path: pathlib.Path, sample_rate_hz: int) -> Iterator[np.ndarray]:
    """Yields a file as mono float32 at `sample_rate_hz`, a block at a time; together what the whole file would give."""
    try:
        there = path.is_file()
        if not there and path.exists():
            raise Unusable("not a regular file, but a folder, a pipe or a device: give a file")
        if there and path.stat().st_size == 0:
            raise Unusable("zero bytes long: copy the file again")
        if not there:
            raise Unusable("missing: put the file there, or mend its name in the captions")
        for stream in streams(path):
            with StreamFile(path, stream) as raw:
                yield from _resampled(raw, stream, sample_rate_hz)
    except soundfile.LibsndfileError as error:
        if path.suffix.lower() == ".raw":
            raise Unusable("raw samples without a header: convert it to wav or flac") from error
        raise Unusable(
            "not readable as audio, or damaged: replace it, or convert it to wav or flac"
        ) from error
    except OSError as error:
        raise Unusable(
            "not readable: look at its name, its permissions and its disk", error.strerror or ""
        ) from error


def _resampled(raw: StreamFile, stream: Stream, sample_rate_hz: int) -> Iterator[np.ndarray]:
    """Yields one stream of a file."""
    with _Forward(raw) as file:
        rate_hz = file.samplerate
        if file.frames == 0:
            raise Unusable("no samples: export it again")
        if rate_hz < _LEAST_RATE_HZ:
            raise Unusable(
                "a sample rate that no recording has: mend its header, or export it again",
                f"{rate_hz} Hz",
            )
        _check_notes(file)
        stated = file.frames if stream.samples is None and file.frames < 2**62 else stream.samples
        resampler = soxr.ResampleStream(rate_hz, sample_rate_hz, 1, dtype="float32")
        read = 0
        for samples in _decoded(raw, file, stated):
            with np.errstate(over="ignore", invalid="ignore"):  # named below
                mono = samples.mean(axis=1)
            if not (finite := np.isfinite(mono)).all():
                at = (read + int(np.argmin(finite))) / rate_hz
                raise Unusable(
                    "NaN or infinite samples: export it again", f"the first at {at:.3f} s"
                )
            read += len(samples)
            yield resampler.resample_chunk(mono)
    check_length(read, stated, rate_hz)
    yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


def _check_notes(file: soundfile.SoundFile) -> None:
    """Raises Unusable where libsndfile noted that an aiff, an au or a w64 ends early."""
    for stated, there in (map(int, sizes) for sizes in _OTHER_SIZE.findall(file.extra_info)):
        seconds = file.frames / file.samplerate
        stated_seconds = seconds * stated / max(there, 1)
        if not is_open(stated) and stated_seconds - seconds > SLACK_SECONDS:
            raise Unusable(
                "truncated: copy or fetch the file again",
                f"{seconds:.3f} of {stated_seconds:.3f} s",
            )


def _decoded(
    raw: StreamFile, file: soundfile.SoundFile, stated: int | None
) -> Iterator[np.ndarray]:
    """Yields float32 [samples, channels] blocks to the end of a stream, or to where a FLAC breaks off.

    Raises soundfile.LibsndfileError where the stream is damaged before its end.
    """
    read, size = 0, _BLOCK // file.channels
    try:
        while len(samples := file.read(size, dtype="float32", always_2d=True)):
            read += len(samples)
            yield samples
        return
    except soundfile.LibsndfileError:
        if file.format != "FLAC":
            raise
    # soundfile gives nothing of a block that ends in an error: read that block again in small ones.
    raw.seek(0)
    with _Forward(raw) as again:
        passed = 0
        while passed < read:
            passed += len(again.read(min(size, read - passed), dtype="float32", always_2d=True))
        try:
            while True:
                size = (
                    min(_SMALL_BLOCK, stated - read)
                    if stated is not None and read < stated
                    else _SMALL_BLOCK
                )
                if not len(samples := again.read(size, dtype="float32", always_2d=True)):
                    break
                read += len(samples)
                yield samples
        except soundfile.LibsndfileError:
            # Bytes behind the stated length, or half a frame at the end of a file: its recorder was stopped.
            if not raw.at_end() and (stated is None or read < stated):
                raise
