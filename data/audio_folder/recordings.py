"""Recordings: the list of files and captions, and one file's clips.

Shapes: N samples of a clip.
"""

import csv
import hashlib
import io
import json
import pathlib
import re

import numpy as np
import soundfile
import soxr

from musicrl_jax.core.files import read_text

Row = dict[str, str]

_COLUMNS = ("file", "caption")
_ENOUGH = 0.95  # of a clip: a file that is a little shorter is repeated from its start
# What libsndfile notes of a wav, an aiff and an ogg that end early; a wav's 2^32 - 1 bytes mean "streamed".
_CUT_SHORT = re.compile(
    r"(?m)^\s*(?:data|SSND) : (?!4294967295)\d+ \(should be"
    r"|File ended unexpectedly|Junk after the last page"
)


class Unusable(ValueError):
    """A recording that cannot be used; its text is the reason, the same for all files with the same fault."""


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


def read_clips(path: pathlib.Path, clip_seconds: float, sample_rate_hz: int) -> list[np.ndarray]:
    """The file as mono int16 [N] clips that do not overlap; a tail shorter than a clip is dropped.

    A file between 95 and 100 % of one clip is repeated from its start. Samples beyond full scale (mp3, opus
    and float files can have them) bring the whole file down. Raises Unusable.
    """
    if not path.is_file():
        raise Unusable("missing")
    if path.stat().st_size == 0:
        raise Unusable("zero-length file")
    try:
        with soundfile.SoundFile(path) as file:
            promised, rate_hz, log = file.frames, file.samplerate, file.extra_info
            samples = file.read(dtype="float32", always_2d=True).mean(axis=1)
    except soundfile.LibsndfileError as error:
        raise Unusable("not readable as audio, or damaged") from error
    if len(samples) < promised or _CUT_SHORT.search(log):
        raise Unusable("truncated")
    if promised == 0:
        raise Unusable("no samples")
    if not np.isfinite(samples).all():
        raise Unusable("NaN or infinite samples")
    return _cut(_to_int16(soxr.resample(samples, rate_hz, sample_rate_hz)), round(clip_seconds * sample_rate_hz))


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


def _to_int16(samples: np.ndarray) -> np.ndarray:
    return np.round(samples / np.abs(samples).max(initial=1.0) * 32767).astype(np.int16)


def _cut(samples: np.ndarray, length: int) -> list[np.ndarray]:
    if len(samples) < _ENOUGH * length:
        raise Unusable("shorter than a clip")
    if len(samples) < length:
        samples = np.resize(samples, length)
    return [samples[at : at + length] for at in range(0, len(samples) - length + 1, length)]
