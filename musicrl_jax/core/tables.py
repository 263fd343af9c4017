"""Reads tables that people write, .csv or .jsonl files, strictly.

Any mistake raises an error that names file, line and column. No value is guessed, cut or dropped.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from musicrl_jax.core.files import read_text

_OPEN_QUOTE = (
    "the quote that opens here is not closed before the next comma: close it, and double a quote "
    "inside a quoted value"
)
_LINE_END = re.compile(r"\r\n?|\n")
# A value, quoted or plain, and what ends it. Python's csv does not say where a wrong value is.
_VALUE = re.compile(r'(?:"((?:[^"]++|"")*+)"|([^",\r\n][^,\r\n]*+|))(,|\r\n?|\n|\Z)')
_MAX_SHOWN = 80  # characters of a wrong value in a message
_KINDS = {str: "text", list: "a list"}


class Row(NamedTuple):
    """One row of a table.

    Attributes:
      path: the file.
      line: the number of its first line, from 1.
      values: by column; text in a .csv file, any JSON in a .jsonl file.
    """

    path: Path
    line: int
    values: dict[str, Any]

    def error(self, column: str, message: str) -> ValueError:
        """Returns an error that names file, line and column."""
        return _error(self.path, self.line, message, column)


def read_rows(path: str | Path, columns: Mapping[str, type], only: bool = False) -> list[Row]:
    """Reads all rows of a .csv or .jsonl file, in its order. Blank lines are skipped.

    Args:
      path: the file, in UTF-8, with or without a byte order mark.
      columns: the type of each required column, `str` or `list`. Text may be empty.
      only: whether rows of a .jsonl file must have no other columns.

    Raises:
      FileNotFoundError: if there is no file.
      ValueError: if it is not a regular .csv or .jsonl file, has no rows, or has a wrong row; names
        file, line and column.
    """
    path = Path(path)
    if not path.is_file():
        if path.exists():
            raise ValueError(f"{path} is not a regular file: give a .csv or .jsonl file")
        raise FileNotFoundError(
            f"{path} does not exist: give a .csv or .jsonl file with {', '.join(columns)}"
        )
    kind = path.suffix.lower()
    if kind not in (".csv", ".jsonl"):
        raise ValueError(f"{path} ends in {path.suffix!r}: give a .csv or .jsonl file")
    text = read_text(path)
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise _error(path, line, "a NUL byte: save the file again as UTF-8")
    rows = list(_csv_rows(path, text, columns) if kind == ".csv" else _json_rows(path, text))
    for row in rows:
        _check_row(row, columns, only)
    if not rows:
        raise ValueError(f"{path}: no rows: give at least one with {', '.join(columns)}")
    return rows


# --- Checks. ---


def _error(path: Path, line: int, message: str, column: str | int | None = None) -> ValueError:
    place = f"{path}, line {line}" if column is None else f"{path}, line {line}, column {column!r}"
    return ValueError(f"{place}: {message}")


def _check_row(row: Row, columns: Mapping[str, type], only: bool) -> None:
    """Raises ValueError if a column is missing, unexpected or of another type."""
    names = sorted(row.values)
    for column, kind in columns.items():
        if column not in row.values:
            raise row.error(column, f"the column is missing; there are {names}")
        value = row.values[column]
        if not isinstance(value, kind):
            raise row.error(column, f"{repr(value)[:_MAX_SHOWN]} where {_KINDS[kind]} should be")
    if only and (others := [name for name in names if name not in columns]):
        raise row.error(others[0], f"no such column; there are {', '.join(columns)}, and no others")


# --- CSV. ---


def _csv_rows(path: Path, text: str, columns: Mapping[str, type]) -> Iterator[Row]:
    """Yields the rows of CSV text, each with as many values as the header has columns."""
    records = _csv_records(path, text)
    line, header = next(records, (1, []))
    _check_header(path, line, header, columns)
    for line, values in records:
        # As many values as columns.
        counts = f"{len(values)} values for {len(header)} columns"
        if len(values) > len(header):
            message = f"{counts}: put quotes around a value that holds a comma"
            raise _error(path, line, message, len(header) + 1)
        if len(values) < len(header):
            message = f"the row ends before it: {counts}"
            raise _error(path, line, message, header[len(values)])

        # A first column without a name is pandas's index. Another one has the rest of a value with
        # a comma.
        cells = list(zip(header, values, strict=True))
        for number, (name, value) in enumerate(cells, start=1):
            if not name and value.strip() and number > 1:
                message = f"{value[:_MAX_SHOWN]!r} in a column without a name: name or empty it"
                raise _error(path, line, message, number)
        yield Row(path, line, {name: value for name, value in cells if name})


def _check_header(path: Path, line: int, header: list[str], columns: Mapping[str, type]) -> None:
    """Raises ValueError if two columns have one name or a required column is missing."""
    for number, name in enumerate(header, start=1):
        if name and name in header[: number - 1]:
            raise _error(path, line, "two columns of this name: rename one", name)
    for column in columns:
        if column not in header:
            has_other_separator = len(header) == 1 and set(header[0]) & set(";\t|")
            hint = "; separate columns by commas" if has_other_separator else ""
            raise _error(path, line, f"the column is missing; there are {header}{hint}", column)


def _csv_records(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Yields the first line's number and the values of each record that is not blank."""
    position, line, header = 0, 1, []
    while position < len(text):
        # The values of one record, which may go over several lines.
        first_line, values, end = line, [], ","
        while end == ",":
            value = _VALUE.match(text, position)
            if value is None:
                number = len(values)
                column = header[number] if number < len(header) else number + 1
                raise _error(path, line, _OPEN_QUOTE, column)
            quoted, plain, end = value.groups()
            values.append(plain if quoted is None else quoted.replace('""', '"'))
            position = value.end()
            line += len(_LINE_END.findall(value.group()))
        if len(values) > 1 or values[0].strip():
            header = header or values
            yield first_line, values


# --- JSON lines. ---


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    """Yields the objects of JSON lines."""
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            try:
                yield Row(path, line, _json_object(path, line, content))
            except RecursionError as error:
                raise _error(path, line, "nested too deeply: give one flat object") from error


def _json_object(path: Path, line: int, content: str) -> dict[str, Any]:
    """Parses one line. Raises ValueError if it is not an object, or is JSON only to Python."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise _error(path, line, "twice in one object: delete one", name)
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise _error(path, line, f"{constant} is not JSON: give a number or null")

    try:
        value = json.loads(content, object_pairs_hook=unique, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise _error(path, line, f"not JSON: {error.msg}", error.colno) from error
    except ValueError as error:
        if str(error).startswith(str(path)):  # from `unique` or `refuse`
            raise
        raise _error(path, line, f"not JSON: {error}") from error  # a number of thousands of digits
    if not isinstance(value, dict):
        raise _error(path, line, f"{content.strip()[:_MAX_SHOWN]!r} is not a JSON object", 1)

    # An escape may be half of a surrogate pair, which UTF-8 cannot encode.
    for name, part in value.items():
        try:
            json.dumps([name, part], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            column = name.encode(errors="backslashreplace").decode()
            message = "half of a surrogate pair: write the character itself"
            raise _error(path, line, message, column) from error
    return value
