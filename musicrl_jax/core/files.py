"""Small files: written whole or not at all, read with what is wrong named."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: str | Path, content: Any) -> None:
    """Writes JSON in one move: whoever reads it, or kills the writer, sees the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


def read_text(path: str | Path) -> str:
    """A file in UTF-8, without its byte order mark; ValueError that names file, line and byte where it is not UTF-8."""
    content = Path(path).read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        byte = content[error.start]
        raise ValueError(f"{path}, line {line}: byte {byte:#x} is not UTF-8: save it as UTF-8") from error
