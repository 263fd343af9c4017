"""Finds the audio streams of a file by their own frames, pages and chunks.

libsndfile reads one stream of a file, only as far as its header states. Many headers are wrong: an
encoder that writes into a pipe leaves the length open or lets it be estimated, a recorder that dies
does not write it, and the header of joined files counts the first one only. So this module finds
each stream by its content, and passes it on with a header that states its real length or none.
"""

import bisect
import functools
import io
import itertools
import mmap
import os
import pathlib
import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

# A header may state this much too much: some Info frames and data sizes include the header.
SLACK_SECONDS = 0.2
_JUNK = 1024  # bytes between two frames that libmpg123 skips
_SEARCH = 2**16  # bytes at the start of an mp3 in which to look for the first frame
_TAIL = 2**16  # bytes behind the last frame or page that may be anything; more is lost audio
_MPEG_SUFFIXES = (".mp3", ".mp2", ".mpga", ".mpa")
_SIZE_MARGIN = 4096  # writers into a pipe state sizes up to this far below 2^31 or 2^32

# --- a stream as a file ---

Piece = bytes | tuple[int, int]  # bytes, or start and stop of a part of the file


class Unusable(ValueError):
    """Raised for an unusable recording.

    Attributes:
      reason: fault and remedy, the same text for all files with this fault.
      value: details of this file.
    """

    def __init__(self, reason: str, value: str = ""):
        super().__init__(f"{reason} ({value})" if value else reason)
        self.reason, self.value = reason, value


class Stream(NamedTuple):
    """One stream of a file.

    Attributes:
      pieces: its bytes, in order.
      samples: samples of each channel that a decoder must reach, None if the header leaves it open.
    """

    pieces: tuple[Piece, ...]
    samples: int | None = None


class StreamFile(io.RawIOBase):
    """A stream as a file that soundfile can read and seek in."""

    def __init__(self, path: pathlib.Path, stream: Stream):
        self._descriptor = os.open(path, os.O_RDONLY)
        sizes = [
            len(piece) if isinstance(piece, bytes) else piece[1] - piece[0]
            for piece in stream.pieces
        ]
        self._pieces, self._starts = stream.pieces, [0, *itertools.accumulate(sizes)]
        self._position = 0

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def readinto(self, buffer: memoryview) -> int:
        """Fills the buffer, or a part of it at the end. Returns the number of bytes."""
        view, count = memoryview(buffer).cast("B"), 0
        # A piece in each round: callers expect a full buffer unless the stream ends.
        while count < len(view) and self._position < self._starts[-1]:
            number = bisect.bisect_right(self._starts, self._position) - 1
            piece, inner = self._pieces[number], self._position - self._starts[number]
            size = min(len(view) - count, self._starts[number + 1] - self._position)
            if isinstance(piece, bytes):
                part = piece[inner : inner + size]
            else:
                part = os.pread(self._descriptor, size, piece[0] + inner)
            if not part:  # another process has cut the file
                break
            view[count : count + len(part)] = part
            count, self._position = count + len(part), self._position + len(part)
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to an offset from the start, the position or the end. Returns the new position."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._starts[-1]}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        """Returns the position."""
        return self._position

    def at_end(self) -> bool:
        """Returns whether the position is at the end."""
        return self._position >= self._starts[-1]

    def close(self) -> None:
        """Closes the file."""
        if not self.closed:
            os.close(self._descriptor)
        super().close()


# --- all formats ---


def streams(path: pathlib.Path) -> list[Stream]:
    """Returns the streams of a file. Files other than wav, flac, ogg and mp3 are one stream.

    Tags behind the audio (ID3v1, APEv2, Lyrics3) belong to no stream.

    Raises Unusable if the content shows that the file is truncated or damaged.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start, stop = _after_id3v2(content, 0), _before_tags(content)
        kind = content[start : start + 4]
        if kind in (b"RIFF", b"RF64") and content[start + 8 : start + 12] == b"WAVE":
            return list(_wav_streams(content, start, stop))
        if kind == b"fLaC":
            return list(_flac_streams(content, start, stop))
        if kind == b"OggS":
            return list(_ogg_streams(content, start, stop))
        # In other files, MPEG audio must start at once: odd bytes may look like a frame.
        search = _SEARCH if path.suffix.lower() in _MPEG_SUFFIXES else 1
        if (first := _first_frame(content, start, min(start + search, stop))) is not None:
            return list(_mpeg_streams(content, first, stop))
        return [Stream(((0, len(content)),))]


def truncated(seconds: float, stated_seconds: float) -> Unusable:
    """Returns the error for a stream that is shorter than its header states."""
    value = f"{seconds:.3f} of {stated_seconds:.3f} s"
    return Unusable("truncated: copy or fetch the file again", value)


def _damaged(value: str) -> Unusable:
    return Unusable("damaged: fetch the file again", value)


def check_length(samples: int, stated: int | None, rate_hz: int) -> None:
    """Raises Unusable if a stream has fewer samples than stated, by more than SLACK_SECONDS."""
    if stated is not None and samples < stated - SLACK_SECONDS * rate_hz:
        raise truncated(samples / rate_hz, stated / rate_hz)


def is_open(size: int, bits: int = 32) -> bool:
    """Returns whether a size in bytes means "unknown": 0, or slightly below a power of 2."""
    return (
        size == 0 or -_SIZE_MARGIN <= size - 2 ** (bits - 1) <= 0 or size >= 2**bits - _SIZE_MARGIN
    )


# --- tags ---


def _after_id3v2(content: mmap.mmap, position: int) -> int:
    """Returns the end of the ID3v2 tags that start at a position."""
    while content[position : position + 3] == b"ID3" and len(content) - position >= 10:
        flags, *size = content[position + 5 : position + 10]  # 7 bits of the size in each byte
        length = functools.reduce(lambda value, byte: value << 7 | byte & 0x7F, size, 0)
        position += length + (20 if flags & 0x10 else 10)
    return position


def _before_tags(content: mmap.mmap) -> int:
    """Returns the start of the ID3v1, APEv2 and Lyrics3 tags at the end of a file."""
    stop = len(content)
    while True:
        if stop >= 128 and content[stop - 128 : stop - 125] == b"TAG":
            stop -= 128
        elif stop >= 32 and content[stop - 32 : stop - 24] == b"APETAGEX":
            size, _, flags = struct.unpack("<III", content[stop - 20 : stop - 8])
            stop = max(0, stop - size - (32 if flags & 0x80000000 else 0))
        elif (
            stop >= 15
            and content[stop - 9 : stop] == b"LYRICS200"
            and content[stop - 15 : stop - 9].isdigit()
        ):
            stop = max(0, stop - 15 - int(content[stop - 15 : stop - 9]))
        else:
            return stop


# --- wav ---


def _wav_streams(content: mmap.mmap, position: int, stop: int) -> Iterator[Stream]:
    """Yields consecutive wav files, each with its real length."""
    while position is not None:
        stream, position = _wav_stream(content, position, stop)
        yield stream


class _WavData(NamedTuple):
    """The data chunk of a wav.

    Attributes:
      form: content of the format chunk.
      body: position of the first sample.
      size: stated size in bytes.
      unknown: whether the stated size means "unknown".
      block: bytes of a sample of all channels.
      bytes_per_second: bytes of a second.
    """

    form: bytes
    body: int
    size: int
    unknown: bool
    block: int
    bytes_per_second: int


def _wav_data(content: mmap.mmap, start: int, stop: int) -> _WavData | None:
    """Returns the data chunk of the wav file at `start`, or None if its header is invalid."""
    position, form, wide_size = start + 12, b"", None
    while position + 8 <= stop:
        name, size = struct.unpack("<4sI", content[position : position + 8])
        body = position + 8
        if name == b"data":
            break
        if name == b"fmt ":
            form = content[body : body + size]
        elif name == b"ds64":  # 64-bit sizes, for files of more than 4 GiB
            wide_size = int.from_bytes(content[body + 8 : body + 16], "little")
        position = body + size + size % 2
    else:
        return None
    if len(form) < 14:
        return None
    bytes_per_second, block = struct.unpack("<8xIH", form[:14])
    if not block or not bytes_per_second:
        return None
    unknown = is_open(size)
    if wide_size is not None and size == 2**32 - 1:
        size, unknown = wide_size, is_open(wide_size, 64)
    return _WavData(form, body, size, unknown, block, bytes_per_second)


def _wav_stream(content: mmap.mmap, start: int, stop: int) -> tuple[Stream, int | None]:
    """Returns the wav file at `start`, and the start of another one behind it or None."""
    rest = Stream(((start, stop),))
    data = _wav_data(content, start, stop)
    if data is None:
        return rest, None  # libsndfile says what is wrong with it
    size, there, slack = data.size, stop - data.body, SLACK_SECONDS * data.bytes_per_second

    # The file ends before the stated size.
    if size > there and not data.unknown:
        if size - there > slack:
            raise truncated(there / data.bytes_per_second, size / data.bytes_per_second)
        return rest, None

    # The stated size is right if chunks, another wav or nothing follow.
    if size <= there:
        behind = data.body + size + size % 2
        if content[behind : behind + 4] == b"RIFF" and content[behind + 8 : behind + 12] == b"WAVE":
            return Stream(((start, behind),)), behind
        if (end := _end_of_chunks(content, behind, stop)) is not None:
            return rest, end if end < stop else None
        if not data.unknown and there - size < 2**32:
            if there - size <= slack:
                return Stream(((start, behind),)), None
            seconds = size / data.bytes_per_second
            raise Unusable(
                "more bytes behind the sound than its header states: export it again",
                f"{seconds:.3f} s, then {there - size} bytes",
            )

    # Otherwise the audio goes on to the end.
    length = there // data.block * data.block
    header = _wide_header(data.form, length, length // data.block)
    return Stream((header, (data.body, data.body + length))), None


def _wide_header(form: bytes, length: int, samples: int) -> bytes:
    """Returns the header of an RF64 file, which can state a length of more than 4 GiB too."""
    sizes = struct.pack("<4sIQQQI", b"ds64", 28, length + 72 + len(form), length, samples, 0)
    form_chunk = struct.pack("<4sI", b"fmt ", len(form)) + form + bytes(len(form) % 2)
    return b"RF64\xff\xff\xff\xffWAVE" + sizes + form_chunk + b"data\xff\xff\xff\xff"


def _end_of_chunks(content: mmap.mmap, position: int, stop: int) -> int | None:
    """Returns the end of a wav's chunks: the file's end or another wav. None if neither follows."""
    while position < stop:
        name, size = content[position : position + 4], content[position + 4 : position + 8]
        if name == b"RIFF":
            return position
        if len(size) < 4 or not re.fullmatch(rb"[0-9A-Za-z_ ]{4}", name):
            return None
        position += 8 + int.from_bytes(size, "little")
        position += position % 2
    return stop if position <= stop + 1 else None


# --- flac ---

_FLAC_START = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")


def _flac_streams(content: mmap.mmap, start: int, stop: int) -> Iterator[Stream]:
    """Yields consecutive FLAC streams. Their headers leave the length open."""
    starts = [match.start() for match in _FLAC_START.finditer(content, start + 4, stop)]
    for first, last in itertools.pairwise([start, *starts, stop]):
        header = bytearray(content[first : first + 42])
        if len(header) < 42:
            yield Stream(((first, last),))
            continue
        # The lower 36 of these 40 bits are the number of samples, 0 for unknown.
        field = int.from_bytes(header[21:26], "big")
        stated = field % 2**36
        header[21:26] = (field - stated).to_bytes(5, "big")
        yield Stream((bytes(header), (first + 42, last)), stated or None)


# --- ogg ---


def _ogg_streams(content: mmap.mmap, position: int, stop: int) -> Iterator[Stream]:
    """Yields the links of a chain. The first pages of a link are those that start its streams."""
    start, beginning = position, True
    while position < stop:
        # A page: its header, a table with the sizes of its segments, the segments.
        if content[position : position + 4] != b"OggS":
            if stop - position > _TAIL or content.find(b"OggS", position, stop) >= 0:
                raise _damaged(f"no pages from byte {position} on")
            break  # a short tail behind the last page
        segments = content[position + 26] if position + 27 <= stop else 0
        table = content[position + 27 : position + 27 + segments]
        end = position + 27 + segments + sum(table)
        if position + 27 > stop or len(table) < segments or end > stop:
            raise Unusable("truncated: copy or fetch the file again", "its last page is cut")
        # Behind other pages, a page that starts a stream starts the next link.
        first_page = bool(content[position + 5] & 2)
        if first_page and not beginning:
            yield Stream(((start, position),))
            start = position
        beginning, position = first_page, end
    yield Stream(((start, position),))


# --- mpeg ---

_V1, _V2 = 3, 2  # two bits of the header; 0 is version 2.5
_LAYER_1, _LAYER_2, _LAYER_3 = 3, 2, 1
# Kilobits a second by version and layer, for the numbers 1 to 14 of a header. Version 2.5 is as 2.
_KILOBITS = {
    (_V1, _LAYER_1): range(32, 449, 32),
    (_V1, _LAYER_2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (_V1, _LAYER_3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (_V2, _LAYER_1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (_V2, _LAYER_2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (_V2, _LAYER_3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


class _Kind(NamedTuple):
    """The fields that all frames of a stream share."""

    version: int
    layer: int
    rate_hz: int
    channels: int

    @property
    def samples(self) -> int:
        """Samples of a frame, for each channel."""
        if self.layer == _LAYER_1:
            return 384
        return 576 if self.layer == _LAYER_3 and self.version != _V1 else 1152

    @property
    def count_at(self) -> int:
        """Position of an Info frame's name: behind the header and the side information."""
        return 4 + (32, 17, 9)[(self.version != _V1) + (self.channels == 1)]


@functools.cache
def _header(second: int, third: int, mono: bool) -> tuple[_Kind, int] | None:
    """Returns kind and length in bytes of a frame by its header, or None if it is no header."""
    # Bit fields. Several values are reserved: a header with one is none.
    version, layer = second >> 3 & 3, second >> 1 & 3
    bit_rate, rate, padding = third >> 4, third >> 2 & 3, third >> 1 & 1
    if second < 0xE0 or version == 1 or layer == 0 or bit_rate in (0, 15) or rate == 3:
        return None

    # Sample rate, bits a second and length. Layer 1 counts in slots of four bytes.
    rate_hz = (44100, 48000, 32000)[rate] // {_V1: 1, _V2: 2, 0: 4}[version]
    bits = 1000 * _KILOBITS[_V1 if version == _V1 else _V2, layer][bit_rate - 1]
    kind = _Kind(version, layer, rate_hz, 1 if mono else 2)
    if layer == _LAYER_1:
        return kind, (12 * bits // rate_hz + padding) * 4
    return kind, kind.samples // 8 * bits // rate_hz + padding


def _frame(content: mmap.mmap, position: int, stop: int) -> tuple[_Kind, int] | None:
    """Returns kind and length in bytes of the frame at a position, or None if there is none."""
    if position + 4 > stop or content[position] != 0xFF:
        return None
    return _header(content[position + 1], content[position + 2], content[position + 3] >> 6 == 3)


def _first_frame(content: mmap.mmap, position: int, stop: int) -> int | None:
    """Returns the first position of two frames of one kind, or of one that ends the file."""
    while (position := content.find(b"\xff", position, stop)) >= 0:
        frame = _frame(content, position, len(content))
        if frame is not None:
            behind = position + frame[1]
            next_frame = _frame(content, behind, len(content))
            if behind == len(content) or (next_frame is not None and next_frame[0] == frame[0]):
                return position
        position += 1
    return None


class _Frames:
    """The frames of one stream, as runs of consecutive frames, and its Info frame."""

    def __init__(self, kind: _Kind, start: int, info: bytes | None):
        self.kind, self.info = kind, info
        self.runs: list[list[int]] = []
        self.count = 0
        self._first = start

    def add(self, start: int, stop: int) -> None:
        """Adds a frame."""
        if self.runs and self.runs[-1][1] == start:
            self.runs[-1][1] = stop
        else:
            self.runs.append([start, stop])
        self.count += 1

    def stream(self, content: mmap.mmap) -> Stream:
        """Returns the stream with an Info frame that states the real number of frames."""
        pieces, kind = [tuple(run) for run in self.runs], self.kind
        if kind.layer != _LAYER_3:
            # There is no Info frame: libmpg123 estimates the length. It must reach the end.
            return Stream(tuple(pieces), self.count * kind.samples)

        # The Info frame of the file if it counts frames, else a new one.
        at, info = kind.count_at, self.info
        if info is not None and info[at : at + 4] in (b"Xing", b"Info") and info[at + 7] & 1:
            stated = int.from_bytes(info[at + 8 : at + 12], "big")
            check_length(self.count * kind.samples, stated * kind.samples, kind.rate_hz)
            info = bytearray(info)
        else:
            _, second, third, fourth = content[self._first : self._first + 4]
            second, third = second | 1, 9 << 4 | third & 0x0C  # no checksum; bit rate number 9
            info = bytearray(_header(second, third, kind.channels == 1)[1])
            info[:4] = bytes([0xFF, second, third, fourth])
            info[at : at + 8] = b"Info" + bytes([0, 0, 0, 1])

        # Its counts.
        info[at + 8 : at + 12] = self.count.to_bytes(4, "big")
        if info[at + 7] & 2:  # has the number of bytes, which libmpg123 compares with the file
            size = len(info) + sum(stop - start for start, stop in self.runs)
            info[at + 12 : at + 16] = min(size, 2**32 - 1).to_bytes(4, "big")
        return Stream((bytes(info), *pieces))


def _mpeg_streams(content: mmap.mmap, position: int, stop: int) -> Iterator[Stream]:
    """Yields streams of MPEG audio. An Info frame or a frame of another kind starts a new one."""
    frames: _Frames | None = None
    while position < stop:
        frame = _frame(content, position, stop)
        if frame is None:
            position = _next_frame(content, position, stop)
            continue

        # A whole frame, and whether it is an Info frame, which has no audio.
        kind, end = frame[0], position + frame[1]
        if end > stop:
            break  # half a frame, as a stopped encoder leaves
        name = content[position + kind.count_at : position + kind.count_at + 4]
        is_info = kind.layer == _LAYER_3 and (
            name in (b"Xing", b"Info") or content[position + 36 : position + 40] == b"VBRI"
        )

        # A new stream, or the next frame of this one.
        if frames is None or is_info or kind != frames.kind:
            if frames is not None and frames.count:
                yield frames.stream(content)
            frames = _Frames(kind, position, content[position:end] if is_info else None)
        if not is_info:
            frames.add(position, end)
        position = end
    if frames is not None and frames.count:
        yield frames.stream(content)


def _next_frame(content: mmap.mmap, position: int, stop: int) -> int:
    """Returns the position of the next frame behind a tag or a few odd bytes, or the file's end.

    Raises Unusable if there are many odd bytes.
    """
    # A tag.
    behind = _after_id3v2(content, position)
    if content[position : position + 8] == b"APETAGEX":
        fields = content[position + 12 : position + 24].ljust(12, b"\0")  # the file may end in it
        size, _, flags = struct.unpack("<III", fields)
        behind = position + 32 + (size if flags & 0x20000000 else 0)
    elif content[position : position + 3] == b"TAG":
        behind = position + 128
    if behind > position:
        return behind

    # Odd bytes.
    next_frame = _first_frame(content, position, stop)
    end, limit = (stop, _TAIL) if next_frame is None else (next_frame, _JUNK)
    if end - position > limit:
        raise _damaged(f"no frames from byte {position} on")
    return end
