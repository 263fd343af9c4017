"""Reads the table of captions and assigns each recording to a split."""

import hashlib
import heapq
import os
import pathlib
import re
from collections.abc import Iterable

from musicrl_jax.core import tables

Row = dict[str, str]

_COLUMNS = {"file": str, "caption": str}
# A caption with a line that is a row itself: a quote opened above it is closed somewhere below.
_ROW_INSIDE = re.compile(
    r"[\r\n][^,\r\n]*\.(wav|wave|flac|ogg|oga|opus|mp3|aif|aiff|au|caf|w64)\"?,", re.IGNORECASE
)

HELD_OUT_SHARE = 0.05
LEAST_RECORDINGS = 3


def read_captions(path: pathlib.Path, allow_outside: bool = False) -> list[Row]:
    """Reads `file`, `caption` and `id` of each row of a .jsonl or .csv file, in order.

    A row without `id` (missing, null, or an empty cell of a .csv) gets the name of its file as id.
    The ids 0 and "" are ids.

    Args:
      path: the table.
      allow_outside: whether a `file` may be an absolute path, or leave the folder by `..`.

    Raises:
      FileNotFoundError: the table does not exist.
      ValueError: a row is invalid. Names file, line and column of the first such row.
    """
    rows, lines = [], {}
    for row in tables.read_rows(path, _COLUMNS):
        # Its texts.
        file, caption = (row.values[column] for column in _COLUMNS)
        for column in _COLUMNS:
            if not row.values[column].strip():
                raise row.error(column, f"{row.values[column]!r} where text should be")
        if _ROW_INSIDE.search(caption):
            raise row.error("caption", "the quote that opens here takes in another row: close it")
        if "\0" in file:
            raise row.error("file", f"{file!r} holds a NUL character: mend the name")
        if not allow_outside and _leads_outside(file):
            remedy = "put it there, or build with allow_outside=True"
            raise row.error("file", f"{file!r} is not inside the folder: {remedy}")

        # Its id, which no other row may have.
        identity = _identity(row)
        if identity in lines:
            remedy = "give each row another id"
            raise row.error("id", f"{identity!r} is also on line {lines[identity]}: {remedy}")
        lines[identity] = row.line
        # Each recording has one name: ./a.wav is a.wav.
        rows.append({"file": os.path.normpath(file), "caption": caption, "id": identity})
    return rows


def _identity(row: tables.Row) -> str:
    """Returns the id of a row."""
    identity = row.values.get("id")
    if identity is None or (identity == "" and row.path.suffix.lower() == ".csv"):
        return row.values["file"]
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        raise row.error("id", f"{identity!r} where text or a whole number should be")
    return str(identity)


def _leads_outside(file: str) -> bool:
    """Returns whether the text of a path is absolute or leaves its folder.

    Ignores symbolic links: whoever can put a link into the folder can put a recording there.
    """
    inner = os.path.normpath(file)
    return os.path.isabs(inner) or inner.split("/")[0] == ".."


def splits_of(files: Iterable[str]) -> dict[str, str]:
    """Returns the split of each file by a hash of its name: 90 % train, 5 % validation, 5 % test.

    A hash alone gives unreliable shares for few files. So validation and test each get at least
    min(8, a tenth of the files) and at most a tenth, but at least one: of 40 files 4 each.

    The hash places files on a circle. Test extends upwards from a fixed point, validation
    downwards. So a new file moves at most one other file between train and validation, and one
    between train and test. From about 400 files on the hash alone decides, and no file moves.

    Raises ValueError for fewer than three files, one for each split.
    """
    # Position on the circle, relative to the fixed point.
    points = {}
    for file in files:
        digest = hashlib.sha256(file.encode()).digest()
        points[file] = int.from_bytes(digest[:8], "big") / 2**64 - (1 - HELD_OUT_SHARE)
    if len(points) < LEAST_RECORDINGS:
        raise ValueError(
            f"{len(points)} recordings can be used, and {LEAST_RECORDINGS} are needed, one for "
            "each of train, validation and test: add some, or cut a long one into several files"
        )

    # The nearest files in each direction.
    most = max(1, len(points) // 10)
    least = min(8, most)
    splits = dict.fromkeys(points, "train")
    for split, direction in (("test", 1), ("validation", -1)):
        distances = {file: direction * point % 1.0 for file, point in points.items()}
        count = sum(distance < HELD_OUT_SHARE for distance in distances.values())
        nearest = heapq.nsmallest(min(max(count, least), most), distances, key=distances.get)
        splits.update(dict.fromkeys(nearest, split))
    return splits
