"""The table of captions: which recording says what, and the split of each recording."""

import hashlib
import heapq
import os
import pathlib
import re
from collections.abc import Iterable

from musicrl_jax.core import tables

Row = dict[str, str]

_COLUMNS = {"file": str, "caption": str}
# A line of a caption that is a row of its own: an open quote took it in, and a quote further down closed it.
_ROW_INSIDE = re.compile(
    r"[\r\n][^,\r\n]*\.(wav|wave|flac|ogg|oga|opus|mp3|aif|aiff|au|caf|w64)\"?,", re.IGNORECASE
)

HELD_OUT_SHARE = 0.05
LEAST_RECORDINGS = 3


def read_captions(path: pathlib.Path, allow_outside: bool = False) -> list[Row]:
    """Reads `file`, `caption` and `id` of each row of a .jsonl or .csv file, in its order.

    The id of a row is its `id`, be it 0 or "". Where that is missing or null, or an empty cell of a .csv, it is the
    name of the file.

    Args:
      path: the table.
      allow_outside: whether a `file` may be an absolute path, or lead out of the folder by `..`.

    Raises FileNotFoundError, or ValueError with file, line and column of the first row that is not as it should be.
    """
    rows, lines = [], {}
    for row in tables.read_rows(path, _COLUMNS):
        file, caption = (row.values[column] for column in _COLUMNS)
        for column in _COLUMNS:
            if not row.values[column].strip():
                raise row.error(column, f"{row.values[column]!r} where text should be")
        if _ROW_INSIDE.search(caption):
            raise row.error("caption", "the quote that opens here takes in another row: close it")
        if "\0" in file:
            raise row.error("file", f"{file!r} holds a NUL character: mend the name")
        if not allow_outside and _leads_outside(file):
            raise row.error(
                "file",
                f"{file!r} is not inside the folder: put it there, or build with allow_outside=True",
            )
        identity = _identity(row)
        if identity in lines:
            raise row.error(
                "id", f"{identity!r} is also on line {lines[identity]}: give each row another id"
            )
        lines[identity] = row.line
        # One name for one recording: ./a.wav is a.wav.
        rows.append({"file": os.path.normpath(file), "caption": caption, "id": identity})
    return rows


def _identity(row: tables.Row) -> str:
    identity = row.values.get("id")
    if identity is None or (identity == "" and row.path.suffix.lower() == ".csv"):
        return row.values["file"]
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        raise row.error("id", f"{identity!r} where text or a whole number should be")
    return str(identity)


def _leads_outside(file: str) -> bool:
    """Returns whether a path, by its text alone, is absolute or leaves the folder that it is relative to.

    Symbolic links are not looked at: who may put a link into the folder may put a recording there.
    """
    inner = os.path.normpath(file)
    return os.path.isabs(inner) or inner.split("/")[0] == ".."


def splits_of(files: Iterable[str]) -> dict[str, str]:
    """Returns the split of each file, by a hash of its name: 90 % train, 5 % validation, 5 % test.

    Few files do not come out so by a hash alone, so validation and test each hold at least a tenth of the files or 8,
    whichever is less, and at most a tenth: 32, 4 and 4 of 40. With fewer than 20 files each holds one.

    The hash puts the files on a circle. Test goes up from a fixed point of it, validation down. So a file that is added
    moves at most one other file between train and validation, and one between train and test, and none at all
    where the hash alone keeps the limits, as it nearly always does from 400 files on.

    Raises ValueError for fewer than three files, one for each split.
    """
    points = {
        file: int.from_bytes(hashlib.sha256(file.encode()).digest()[:8], "big") / 2**64
        - (1 - HELD_OUT_SHARE)
        for file in files
    }
    if len(points) < LEAST_RECORDINGS:
        raise ValueError(
            f"{len(points)} recordings can be used, and {LEAST_RECORDINGS} are needed, one for each of train, "
            "validation and test: add some, or cut a long one into several files"
        )
    most = max(1, len(points) // 10)
    least = min(8, most)
    splits = dict.fromkeys(points, "train")
    for split, direction in (("test", 1), ("validation", -1)):
        distances = {file: direction * point % 1.0 for file, point in points.items()}
        count = sum(distance < HELD_OUT_SHARE for distance in distances.values())
        nearest = heapq.nsmallest(min(max(count, least), most), distances, key=distances.get)
        splits.update(dict.fromkeys(nearest, split))
    return splits
