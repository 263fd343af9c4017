"""Recordings: the list of files and captions, and one file's clips, read in blocks so that length costs no memory.

Shapes: N samples of a clip.
"""

import csv
import hashlib
import io
import json
import pathlib
import re
from collections.abc import Iterator

import numpy as np
import soundfile
import soxr

from musicrl_jax.core.files import read_text

Row = dict[str, str]

_COLUMNS = ("file", "caption")
_ENOUGH = 0.95  # of a clip: a file that is a little shorter is repeated from its start
_BLOCK = 2**20  # samples of all channels together that are decoded at once
_LEAST_RATE_HZ = 1000  # below it the header is wrong, and resampling would make hours out of a small file
_GREATEST = 2.0**31  # in full scales: 32-bit samples read as floats still pass
# What libsndfile notes of a wav, an aiff and an ogg that end early; a wav's 2^32 - 1 bytes mean "streamed".
_CUT_SHORT = re.compile(
    r"(?m)^\s*(?:data|SSND) : (?!4294967295)\d+ \(should be"
    r"|File ended unexpectedly|Junk after the last page"
)


class _Forward(soundfile.SoundFile):
    """A file that is read from its start to its end.

    soundfile seeks after every read, to where it is already. In an mp3 that loses the decoder's
    memory, and each block but the first begins with wrong samples.
    """

    def seekable(self) -> bool:
        return False


class Unusable(ValueError):
    """A recording that cannot be used: the reason and its mend, the same for all files with this fault; a value."""

    def __init__(self, reason: str, value: str = ""):
        super().__init__(f"{reason} ({value})" if value else reason)
        self.reason, self.value = reason, value


def read_captions(path: pathlib.Path) -> list[Row]:
    """Rows with `file`, `caption` and `id` from a .jsonl or .csv file, in its order.

    Without an id column the id is the file's name. Raises FileNotFoundError, or ValueError with file, line and
    column of the first row that is not as it should be.
    """
    if not path.is_file():
        raise FileNotFoundError(f"captions: {path} does not exist: give a .jsonl or .csv with columns file, caption")
    if path.suffix not in (".jsonl", ".csv"):
        raise ValueError(f"captions: {path} ends in {path.suffix!r}: give a .jsonl or .csv file")
    text = read_text(path)
    rows = _read_jsonl(path, text) if path.suffix == ".jsonl" else _read_csv(path, text)
    seen = {}
    for line, row in rows:
        for column in _COLUMNS:
            if not isinstance(row.get(column), str) or not row[column].strip():
                raise ValueError(f"{path}, line {line}, column {column!r}: {row.get(column)!r} where text should be")
        row["id"] = str(row.get("id") or row["file"])
        if row["id"] in seen:
            raise ValueError(
                f"{path}, line {line}, column 'id': {row['id']!r} is also on line {seen[row['id']]}: "
                "give each row another id"
            )
        seen[row["id"]] = line
    if not seen:
        raise ValueError(f"{path}: no rows: give at least one with file, caption")
    return [row for _, row in rows]


def examine(path: pathlib.Path, clip_seconds: float, sample_rate_hz: int) -> np.float32:
    """The file's greatest magnitude at `sample_rate_hz`, in full scales. Reads all of it; raises Unusable."""
    peak, count = np.float32(0.0), 0
    for samples in _blocks(path, sample_rate_hz):
        count += len(samples)
        peak = np.maximum(peak, np.abs(samples).max(initial=0.0))  # keeps a NaN, as max would not
    if not peak < _GREATEST:
        raise Unusable("samples far beyond full scale: export it again", f"{peak:.3g} times")
    if count < _ENOUGH * round(clip_seconds * sample_rate_hz):
        reason = f"shorter than a clip of {clip_seconds:g} s: give longer files, or build with shorter clip_seconds"
        raise Unusable(reason, f"{count / sample_rate_hz:.3f} s")
    return peak


def read_clips(path: pathlib.Path, clip_seconds: float, sample_rate_hz: int, peak: np.float32) -> Iterator[np.ndarray]:
    """The file as mono int16 [N] clips that do not overlap; a tail shorter than a clip is dropped.

    `peak` is what `examine` found: samples beyond full scale (mp3, opus and float files can have them) bring the whole
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
    """The file as mono float32 at `sample_rate_hz`, a block at a time; together what the whole file would give."""
    if not path.is_file():
        raise Unusable("missing: put the file there, or mend its name in the captions")
    if path.stat().st_size == 0:
        raise Unusable("zero bytes long: copy the file again")
    try:
        with _Forward(path) as file:
            yield from _resampled(file, sample_rate_hz)
    except soundfile.LibsndfileError as error:
        raise Unusable("not readable as audio, or damaged: replace it, or convert it to wav or flac") from error
    except TypeError as error:  # soundfile asks for the rate of a .raw
        raise Unusable("raw samples without a header: convert it to wav or flac") from error


def _resampled(file: _Forward, sample_rate_hz: int) -> Iterator[np.ndarray]:
    rate_hz, promised, read = file.samplerate, file.frames, 0
    if _CUT_SHORT.search(file.extra_info):
        raise Unusable("truncated: copy or fetch the file again", "less than its header says")
    if promised == 0:
        raise Unusable("no samples: export it again")
    if rate_hz < _LEAST_RATE_HZ:
        raise Unusable("a sample rate that no recording has: mend its header, or export it again", f"{rate_hz} Hz")
    stream = soxr.ResampleStream(rate_hz, sample_rate_hz, 1, dtype="float32")
    while len(samples := file.read(_BLOCK // file.channels, dtype="float32", always_2d=True)):
        with np.errstate(over="ignore", invalid="ignore"):  # told of below
            mono = samples.mean(axis=1)
        if not (finite := np.isfinite(mono)).all():
            at = (read + int(np.argmin(finite))) / rate_hz
            raise Unusable("NaN or infinite samples: export it again", f"the first at {at:.3f} s")
        read += len(samples)
        yield stream.resample_chunk(mono)
    if read < promised:
        found = f"{read / rate_hz:.3f} of {promised / rate_hz:.3f} s"
        raise Unusable("truncated: copy or fetch the file again", found)
    yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def splits_of(files: list[str]) -> dict[str, str]:
    """The split of each file by a hash of its name: 90 % train, 5 % validation, 5 % test.

    A split that would get none takes one from the split with most, as long as that has another to give.
    """
    points = {file: int.from_bytes(hashlib.sha256(file.encode()).digest()[:8], "big") / 2**64 for file in files}
    splits = {
        file: "train" if point < 0.9 else "validation" if point < 0.95 else "test" for file, point in points.items()
    }
    for needy in ("train", "validation", "test"):
        held = list(splits.values())
        richest = max(held, key=held.count)
        if needy not in held and held.count(richest) > 1:
            given = max((file for file in splits if splits[file] == richest), key=points.get)
            splits[given] = needy
    return splits


def _read_jsonl(path: pathlib.Path, content: str) -> list[tuple[int, Row]]:
    rows = []
    for line, text in enumerate(content.split("\n"), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {line}, column {error.colno}: not JSON: {error.msg}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {line}, column 1: {text[:40]!r} is not an object with file, caption")
        if missing := [column for column in _COLUMNS if column not in row]:
            raise ValueError(f"{path}, line {line}: column {missing[0]!r} is missing; there are {sorted(row)}")
        rows.append((line, row))
    return rows


def _read_csv(path: pathlib.Path, content: str) -> list[tuple[int, Row]]:
    reader = csv.DictReader(io.StringIO(content, newline=""))
    if missing := [column for column in _COLUMNS if column not in (reader.fieldnames or ())]:
        raise ValueError(f"{path}, line 1: column {missing[0]!r} is missing; there are {reader.fieldnames or []}")
    return [(reader.line_num, row) for row in reader]
