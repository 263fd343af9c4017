"""Tables: what is right is read whole, and what is wrong is named with its line and column."""

import json
import os

import pytest

from musicrl_jax.core.tables import read_rows

COLUMNS = {"file": str, "caption": str}


def _rows(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text.encode())
    return read_rows(path, COLUMNS)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        # Quotes that are not closed before the end, before another row's quote, or at all.
        (
            "a.csv",
            'file,caption\nok.mp3,"slow piano\nb.mp3,fast\n',
            "line 2, column 'caption': the quote that opens",
        ),
        (
            "a.csv",
            'file,caption\nok.mp3,"slow piano\nb.mp3,"fast"\n',
            "line 2, column 'caption': the quote that opens",
        ),
        (
            "a.csv",
            'file,caption\n\na,"x ""y"""\n"b.mp3,"fast"\n',
            "line 4, column 'file': the quote that opens",
        ),
        (
            "a.csv",
            'file,caption\n"two\nlines",a\nb,"c" d\n',
            "line 4, column 'caption': the quote that opens",
        ),
        (
            "a.csv",
            'file,caption\na,"' + "long\n" * 40000,
            "line 2, column 'caption': the quote that opens",
        ),
        ("a.csv", 'file,"caption\na,b\n', "line 1, column 2: the quote that opens"),
        # Rows of another length than the header.
        (
            "a.csv",
            "file,caption\na,b\nb,slow, sad\n",
            "line 3, column 3: 3 values for 2 columns: put quotes",
        ),
        (
            "a.csv",
            "file,caption\na\n",
            "line 2, column 'caption': the row ends before it: 1 values for 2",
        ),
        (
            "a.csv",
            "file,caption,\na,slow, sad\n",
            "line 2, column 3: ' sad' in a column without a name",
        ),
        # Headers.
        ("a.csv", "file,caption,file\na,b,c\n", "line 1, column 'file': two columns of this name"),
        ("a.csv", "file;caption\na;b\n", "line 1, column 'file': .*; separate columns by commas"),
        ("a.csv", "", "line 1, column 'file': the column is missing"),
        ("a.csv", "file,caption\n\n", "no rows: give at least one with file, caption"),
        ("a.csv", "file,caption\na,b\0\n", "line 2: a NUL byte"),
        ("a.tsv", "file\tcaption\n", "ends in '.tsv': give a .csv or .jsonl"),
        # JSON.
        (
            "a.jsonl",
            '{"file": "a", "caption": "\\ud800"}\n',
            "line 1, column 'caption': half of a surrogate pair",
        ),
        (
            "a.jsonl",
            '{"file": "a", "caption": "b", "x": [{"\\udfff": 1}]}\n',
            "line 1, column 'x': half of a surrogate",
        ),
        (
            "a.jsonl",
            '{"file": "a", "caption": "b", "\\udfff": 1}\n',
            r"line 1, column '\S*udfff': half of a surrogate",
        ),
        ("a.jsonl", '\n{"file": "a", "file": "b"}\n', "line 2, column 'file': twice in one object"),
        ("a.jsonl", '{"file": "a", "caption": NaN}\n', "line 1: NaN is not JSON"),
        ("a.jsonl", "[" * 100000, "line 1: nested too deeply"),
        ("a.jsonl", '{"file": ' + "9" * 5000 + "}", "line 1: not JSON: Exceeds the limit"),
        (
            "a.jsonl",
            '{"file": "a", "caption": 7}\n',
            "line 1, column 'caption': 7 where text should be",
        ),
        (
            "a.jsonl",
            '{"file": "a", "caption": null}\n',
            "line 1, column 'caption': None where text should be",
        ),
        ("a.jsonl", '{"file": "a"}\n', "line 1, column 'caption': the column is missing"),
        (
            "a.jsonl",
            '{"file": "a", "caption": "b"}\n{"file": oops}\n',
            "line 2, column 10: not JSON",
        ),
        (
            "a.jsonl",
            '{"file": "a", "caption": "b"} {}\n',
            "line 1, column 31: not JSON: Extra data",
        ),
        ("a.jsonl", "7\n", "line 1, column 1: '7' is not a JSON object"),
        ("a.jsonl", "\n \n", "no rows"),
    ],
)
def test_a_mistake_is_an_error_with_its_line_and_column(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        _rows(tmp_path, name, text)


def test_json_of_any_depth_is_read_or_refused(tmp_path):
    for depth in range(100, 4000, 100):
        text = '{"file": "a", "caption": "b", "x": ' + "[" * depth + "]" * depth + "}"
        try:
            assert _rows(tmp_path, "a.jsonl", text)
        except ValueError as error:
            assert "line 1: nested too deeply" in str(error)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_table_is_read_whole(tmp_path, mark, end):
    lines = [
        "file,caption,note",
        "",
        'a,"slow, sad",',
        '"b","he said ""ah""",x',
        "  ",
        'c,"two',
        'lines",y',
    ]
    rows = _rows(tmp_path, "a.CSV", mark + end.join(lines))
    assert [(row.line, *row.values.values()) for row in rows] == [
        (3, "a", "slow, sad", ""),
        (4, "b", 'he said "ah"', "x"),
        (6, "c", f"two{end}lines", "y"),
    ]
    objects = [{"file": "a", "caption": "größer 😀", "id": 0}, {"caption": "", "file": "b"}]
    rows = _rows(tmp_path, "a.jsonl", mark + (end + end).join(map(json.dumps, objects)))
    assert [(row.line, row.values) for row in rows] == [(1, objects[0]), (3, objects[1])]


def test_the_unnamed_first_column_of_pandas_is_passed_over(tmp_path):
    (row,) = _rows(tmp_path, "a.csv", ",file,caption\n0,a,b\n")
    assert row.values == {"file": "a", "caption": "b"}


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_regular_file_is_named_and_never_opened(tmp_path, kind):
    path = tmp_path / "a.csv"
    {"pipe": os.mkfifo, "folder": os.mkdir, "device": lambda path: os.symlink("/dev/zero", path)}[
        kind
    ](path)
    with pytest.raises(ValueError, match=r"a\.csv is not a regular file"):
        read_rows(path, COLUMNS)
