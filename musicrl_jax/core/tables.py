"""Tables that people write: rows from a .csv or .jsonl file, read strictly.

What is wrong is an error that names file, line and column. Nothing is guessed, cut short or left out.
"""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from musicrl_jax.core.files import read_text

_OPEN_QUOTE = "the quote that opens here is not closed before the next comma: close it, and double a quote inside a quoted value"
_QUOTED = re.compile(r'"(?:[^"]++|"")*+"')
_END_OF_VALUE = re.compile(r"[,\r\n]|\Z")
_SHOWN = 80  # characters of a wrong value that a message repeats
_KINDS = {str: "text", list: "a list"}


class Row(NamedTuple):
    """One row of a table.

    Attributes:
      path: the file.
      line: where the row begins, from 1.
      values: by column; text in a .csv, any JSON in a .jsonl.
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
      columns: the type of each column that every row must have, `str` or `list`. Text may be empty.
      only: whether rows of a .jsonl file must have no other columns.

    Raises FileNotFoundError where there is no file, and ValueError, with file, line and column, where it is no regular
    file or of another kind, has no rows, or where a row is not as it should be.
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
        _check(row, columns, only)
    if not rows:
        raise ValueError(f"{path}: no rows: give at least one with {', '.join(columns)}")
    return rows


def _error(path: Path, line: int, message: str, column: str | int | None = None) -> ValueError:
    place = f"{path}, line {line}" if column is None else f"{path}, line {line}, column {column!r}"
    return ValueError(f"{place}: {message}")


def _check(row: Row, columns: Mapping[str, type], only: bool) -> None:
    """Raises ValueError where a column is missing, is one too many or is of another type."""
    names = sorted(row.values)
    for column, kind in columns.items():
        if column not in row.values:
            raise row.error(column, f"the column is missing; there are {names}")
        value = row.values[column]
        if not isinstance(value, kind):
            raise row.error(column, f"{repr(value)[:_SHOWN]} where {_KINDS[kind]} should be")
    if only and (others := [name for name in names if name not in columns]):
        raise row.error(others[0], f"no such column; there are {', '.join(columns)}, and no others")


def _csv_rows(path: Path, text: str, columns: Mapping[str, type]) -> Iterator[Row]:
    """Yields the rows of CSV text, each with as many values as the header has columns."""
    records = _csv_records(path, text)
    line, header = next(records, (1, []))
    _check_header(path, line, header, columns)
    for line, values in records:
        if len(values) > len(header):
            raise _error(
                path,
                line,
                f"{len(values)} values for {len(header)} columns: put quotes around a value that holds a comma",
                len(header) + 1,
            )
        if len(values) < len(header):
            missing = header[len(values)]
            raise _error(
                path,
                line,
                f"the row ends before it: {len(values)} values for {len(header)} columns",
                missing,
            )
        for number, (name, value) in enumerate(zip(header, values, strict=True), start=1):
            # Tables of pandas have a first column without a name; elsewhere it is the rest of a value with a comma.
            if not name and value.strip() and number > 1:
                raise _error(
                    path,
                    line,
                    f"{value[:_SHOWN]!r} in a column without a name: name or empty it",
                    number,
                )
        yield Row(
            path, line, {name: value for name, value in zip(header, values, strict=True) if name}
        )


def _check_header(path: Path, line: int, header: list[str], columns: Mapping[str, type]) -> None:
    for number, name in enumerate(header, start=1):
        if name and name in header[: number - 1]:
            raise _error(path, line, "two columns of this name: rename one", name)
    for column in columns:
        if column not in header:
            hint = (
                "; separate columns by commas"
                if len(header) == 1 and set(header[0]) & set(";\t|")
                else ""
            )
            raise _error(path, line, f"the column is missing; there are {header}{hint}", column)


def _csv_records(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Yields the values of each record that is not blank, and the line where it begins."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = []
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            record = "".join(list(io.StringIO(text, newline=""))[line - 1 :])
            raise _record_error(path, line, record, header, str(error)) from error
        if len(values) > 1 or "".join(values).strip():
            header = header or values
            yield line, values


def _record_error(
    path: Path, line: int, record: str, header: list[str], message: str
) -> ValueError:
    """Returns an error that names the value of a record, which begins on `line`, whose quote is not closed."""
    position, number = 0, 1
    while position < len(record):
        if record[position] == '"':
            value = _QUOTED.match(record, position)
            if value is None or record[value.end() : value.end() + 1] not in ("", ",", "\r", "\n"):
                line += (
                    len(io.StringIO(record[:position], newline="").readlines()) - 1
                    if position
                    else 0
                )
                column = header[number - 1] if number <= len(header) else number
                return _error(path, line, _OPEN_QUOTE, column)
            position = value.end()
        else:
            position = _END_OF_VALUE.search(record, position).start()
        if record[position : position + 1] != ",":
            break
        position, number = position + 1, number + 1
    return _error(path, line, message)


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    """Yields the objects of JSON lines."""
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            try:
                yield Row(path, line, _json_object(path, line, content))
            except RecursionError as error:
                raise _error(path, line, "nested too deeply: give one flat object") from error


def _json_object(path: Path, line: int, content: str) -> dict[str, Any]:
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
        if str(error).startswith(str(path)):
            raise
        raise _error(path, line, f"not JSON: {error}") from error  # a number of thousands of digits
    if not isinstance(value, dict):
        raise _error(path, line, f"{content.strip()[:_SHOWN]!r} is not a JSON object", 1)
    for name, part in value.items():
        try:
            json.dumps([name, part], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            # An escape in JSON may be half of a surrogate pair, which no UTF-8 holds.
            column = name.encode(errors="backslashreplace").decode()
            raise _error(
                path, line, "half of a surrogate pair: write the character itself", column
            ) from error
    return value
