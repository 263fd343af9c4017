"""Small files: written whole or not at all, read with what is wrong named."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def write_text(path: str | Path, content: str) -> None:
    """Writes UTF-8 in one move: whoever reads the file, or kills the writer, sees the old one or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(content, encoding="utf-8")
    os.replace(partial, path)


def write_json(path: str | Path, content: Any) -> None:
    """`write_text` of JSON."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def kept(
    folder: str | Path, name: str, made_of: Any, make: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The arrays that `make` returns, kept in a file for the next call: work that a kill must not lose.

    Args:
      folder: where such files are; whoever no longer needs them removes it.
      name: of the work.
      made_of: all that the arrays depend on, as JSON holds it; those of something else are not taken.
      make: does the work.
    """
    settings = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]
    path = Path(folder) / f"{settings}-{name}.npz"
    if path.exists():
        with np.load(path) as there:
            return dict(there)
    found = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **found)
    os.replace(partial, path)
    return found


def read_text(path: str | Path) -> str:
    """A file in UTF-8, without its byte order mark; ValueError that names file, line and byte where it is not UTF-8."""
    content = Path(path).read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        byte = content[error.start]
        raise ValueError(f"{path}, line {line}: byte {byte:#x} is not UTF-8: save it as UTF-8") from error
