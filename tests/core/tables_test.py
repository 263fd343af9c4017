"""Valid tables are read whole. A mistake raises an error with its line and column."""

import json
import os

import pytest

from musicrl_jax.core.tables import read_rows

COLUMNS = {"file": str, "caption": str}


def _rows(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text.encode())
    return read_rows(path, COLUMNS)


# --- Mistakes. ---

OPEN_QUOTE = "the quote that opens"
HALF_PAIR = "half of a surrogate pair"
CSV = [
    # Quotes that are not closed before the end, before another row's quote, or at all.
    ('file,caption\nok.mp3,"slow piano\nb.mp3,fast\n', f"line 2, column 'caption': {OPEN_QUOTE}"),
    ('file,caption\nok.mp3,"slow piano\nb.mp3,"fast"\n', f"line 2, column 'caption': {OPEN_QUOTE}"),
    ('file,caption\n\na,"x ""y"""\n"b.mp3,"fast"\n', f"line 4, column 'file': {OPEN_QUOTE}"),
    ('file,caption\n"two\nlines",a\nb,"c" d\n', f"line 4, column 'caption': {OPEN_QUOTE}"),
    ('file,caption\na,"' + "long\n" * 40000, f"line 2, column 'caption': {OPEN_QUOTE}"),
    ('file,"caption\na,b\n', f"line 1, column 2: {OPEN_QUOTE}"),
    # Rows of another length than the header.
    ("file,caption\na,b\nb,slow, sad\n", "line 3, column 3: 3 values for 2 columns: put quotes"),
    ("file,caption\na\n", "line 2, column 'caption': the row ends before it: 1 values for 2"),
    ("file,caption,\na,slow, sad\n", "line 2, column 3: ' sad' in a column without a name"),
    # Headers.
    ("file,caption,file\na,b,c\n", "line 1, column 'file': two columns of this name"),
    ("file;caption\na;b\n", "line 1, column 'file': .*; separate columns by commas"),
    ("", "line 1, column 'file': the column is missing"),
    ("file,caption\n\n", "no rows: give at least one with file, caption"),
    ("file,caption\na,b\0\n", "line 2: a NUL byte"),
]
# Text that is no flat object, or is JSON only to Python.
JSON = [
    ('{"file": "a", "caption": "\\ud800"}\n', f"line 1, column 'caption': {HALF_PAIR}"),
    ('{"file": "a", "caption": "b", "x": [{"\\udfff": 1}]}\n', f"line 1, column 'x': {HALF_PAIR}"),
    ('{"file": "a", "caption": "b", "\\udfff": 1}\n', rf"line 1, column '\S*udfff': {HALF_PAIR}"),
    ('\n{"file": "a", "file": "b"}\n', "line 2, column 'file': twice in one object"),
    ('{"file": "a", "caption": NaN}\n', "line 1: NaN is not JSON"),
    ("[" * 100000, "line 1: nested too deeply"),
    ('{"file": ' + "9" * 5000 + "}", "line 1: not JSON: Exceeds the limit"),
    ('{"file": "a", "caption": 7}\n', "line 1, column 'caption': 7 where text should be"),
    ('{"file": "a", "caption": null}\n', "line 1, column 'caption': None where text should be"),
    ('{"file": "a"}\n', "line 1, column 'caption': the column is missing"),
    ('{"file": "a", "caption": "b"}\n{"file": oops}\n', "line 2, column 10: not JSON"),
    ('{"file": "a", "caption": "b"} {}\n', "line 1, column 31: not JSON: Extra data"),
    ("7\n", "line 1, column 1: '7' is not a JSON object"),
    ("\n \n", "no rows"),
]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "file\tcaption\n", "ends in '.tsv': give a .csv or .jsonl"),
        *(("a.csv", *case) for case in CSV),
        *(("a.jsonl", *case) for case in JSON),
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


# --- Valid tables. ---


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_table_is_read_whole(tmp_path, mark, end):
    lines = ["file,caption,note", "", 'a,"slow, sad",', '"b","he said ""ah""",x']
    lines += ["  ", 'c,"two', 'lines",y']
    rows = _rows(tmp_path, "a.CSV", mark + end.join(lines))
    assert [(row.line, *row.values.values()) for row in rows] == [
        (3, "a", "slow, sad", ""),
        (4, "b", 'he said "ah"', "x"),
        (6, "c", f"two{end}lines", "y"),
    ]
    objects = [{"file": "a", "caption": "größer 😀", "id": 0}, {"caption": "", "file": "b"}]
    rows = _rows(tmp_path, "a.jsonl", mark + (end + end).join(map(json.dumps, objects)))
    assert [(row.line, row.values) for row in rows] == [(1, objects[0]), (3, objects[1])]


def test_the_unnamed_first_column_of_pandas_is_ignored(tmp_path):
    (row,) = _rows(tmp_path, "a.csv", ",file,caption\n0,a,b\n")
    assert row.values == {"file": "a", "caption": "b"}


# --- Other files. ---


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_a_folder_pipe_or_device_is_named_and_never_opened(tmp_path, make):
    path = tmp_path / "a.csv"
    make(path)
    with pytest.raises(ValueError, match=r"a\.csv is not a regular file"):
        read_rows(path, COLUMNS)
