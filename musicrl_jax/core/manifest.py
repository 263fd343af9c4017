"""What makes a folder of a model or of a state whole: a manifest, written last and in one move.

It holds the size and sha256 of every file and a digest of itself, so that one flipped bit in any of them is noticed.
"""

import contextlib
import hashlib
import json
import os
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
SEAL = "sha256"  # the key of a manifest's digest of itself
READERS = 8  # files that are hashed at a time
SAVE_MARGIN = 1.1  # the disk space asked for, over the bytes of the arrays


def sealed(content: dict[str, Any]) -> str:
    """JSON with a digest of itself."""
    digest = hashlib.sha256(json.dumps(content, indent=1).encode()).hexdigest()
    return json.dumps({**content, SEAL: digest}, indent=1) + "\n"


def read_regular(path: str | Path) -> bytes:
    """Returns the content of a regular file, or of a link to one.

    Raises ValueError for a folder, a FIFO, a socket or a device: reading these fails or never ends.
    Raises the system's OSError, which names the file, if there is none or it cannot be read.
    """
    check_regular(path)
    return Path(path).read_bytes()


def check_regular(path: str | Path) -> None:
    """Raises ValueError if `path` is something other than a regular file, OSError if it is nothing."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
        kind = kinds.get(stat.S_IFMT(mode), "device")
        raise ValueError(f"{path} is a {kind}, and must be a regular file")


def parse_json(raw: bytes) -> Any:
    """Parses JSON in UTF-8; whatever is wrong with it becomes one ValueError."""
    try:
        content = json.loads(raw.decode("utf-8-sig"))
        if rb"\ud" in raw.lower():  # half of a surrogate pair cannot be printed or written
            json.dumps(content, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise ValueError(f"is not UTF-8: {error.reason} at {error.start}") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error
    return content


Kind = type | tuple[type, ...] | list["Kind"] | dict[Any, "Kind"]


def check_kind(content: Any, kind: Kind, field: str = "") -> None:
    """Raises ValueError, by name of the field, if JSON is not of the kind that its reader expects.

    Args:
      content: parsed JSON.
      kind: a type or several; [kind] for a list of any length; {str: kind} for an object with any
        names; otherwise {name: kind} for an object with at least these names. A name that ends in
        "?" may be missing.
      field: where `content` stands, for the message.
    """
    here = field or "its content"
    expected = list if isinstance(kind, list) else dict if isinstance(kind, dict) else kind
    types = expected if isinstance(expected, tuple) else (expected,)
    # Python takes True for a whole number, and JSON's 1 for no float: neither is meant.
    if (isinstance(content, bool) and bool not in types) or not isinstance(
        content, (*types, int) if float in types else types
    ):
        names = " or ".join(each.__name__ for each in types)
        raise ValueError(f"{here} is {json.dumps(content)[:60]} and must be of type {names}")
    if isinstance(kind, list):
        for number, part in enumerate(content):
            check_kind(part, kind[0], f"{field}[{number}]")
    elif isinstance(kind, dict) and str in kind:
        for name, part in content.items():
            check_kind(part, kind[str], f"{field}.{name}" if field else name)
    elif isinstance(kind, dict):
        for name, part in kind.items():
            inner = name.removesuffix("?")
            if inner in content:
                check_kind(content[inner], part, f"{field}.{inner}" if field else inner)
            elif inner == name:
                raise ValueError(f"{f'{field}.' if field else ''}{inner} is missing")


def unsealed(path: Path, seal: str = "asked for", kind: Kind = dict) -> dict[str, Any]:
    """Returns what was sealed, checked to be of a `kind`; see `check_kind`.

    Raises ValueError that says what is wrong if a bit has changed or the file cannot be read. With
    seal="if there" a file without a digest, as older versions wrote it, is taken as it is.
    """
    try:
        raw = read_regular(path)
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror}") from error
    except ValueError as error:  # it names the whole path, and callers do too
        raise ValueError(str(error).replace(str(path), path.name)) from error
    try:
        content = parse_json(raw)
    except ValueError as error:
        raise ValueError(f"{path.name} {error}") from error
    there = content.pop(SEAL, None) if isinstance(content, dict) else None
    if (there or seal == "asked for") and (not there or sealed(content).encode() != raw):
        raise ValueError(f"{path.name} does not have the digest that it names")
    try:
        check_kind(content, kind)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    return content


def write_on_disk(path: Path, text: str) -> None:
    """`files.write_text`, and back once a power cut would not undo it."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    flush_names(path.parent)


def flush_names(folder: Path) -> None:
    """Puts a folder's list of files on the disk, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sha256(path: Path, flush: bool = False) -> str:
    check_regular(path)
    with open(path, "rb") as file:
        if flush:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_names(folder: Path) -> list[str]:
    """The files in a folder and the folders in it, but for its manifest and what Python leaves beside its modules."""
    found = (
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    )
    return sorted(
        path.as_posix()
        for path in found
        if "__pycache__" not in path.parts and str(path) != MANIFEST
    )


def described_files(folder: Path) -> dict[str, list[Any]]:
    """{name: [bytes, sha256]} of the files in `folder`; they are on the disk then."""
    names = _file_names(folder)
    with ThreadPoolExecutor(READERS) as pool:
        hashes = list(pool.map(lambda name: _sha256(folder / name, flush=True), names))
    for inner in sorted({(folder / name).parent for name in names} | {folder}):
        flush_names(inner)
    return {
        name: [(folder / name).stat().st_size, found]
        for name, found in zip(names, hashes, strict=True)
    }


FILES = {str: [(int, str)]}  # the kind of a manifest's list of files


def damage(folder: Path, files: dict[str, list[Any]], more: bool) -> str:
    """Says what is wrong with the first file that is not as described; '' if all are.

    `more` allows other files.
    """
    for name, described in files.items():
        if [type(part) for part in described] != [int, str]:
            words = json.dumps(described)[:60]
            return f"{MANIFEST} says {words} of {name}, and not its size and sha256"
    there = _file_names(folder)
    if missing := sorted(set(files) - set(there)):
        return f"{missing[0]} is missing"
    if not more and (unknown := sorted(set(there) - set(files))):
        return f"{unknown[0]} does not belong to it"

    def wrong(name: str) -> str:
        size, wanted = files[name]
        try:
            if (found := (folder / name).stat().st_size) != size:
                return f"{name} has {found} bytes, not {size}"
            if (found := _sha256(folder / name)) != wanted:
                return f"{name} has the sha256 {found[:12]}, not {wanted[:12]}"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        except ValueError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(READERS) as pool:
        return next(filter(None, pool.map(wrong, files)), "")


def bytes_needed(tree: Any) -> int:
    """Returns the disk space that a tree of arrays needs, with what is written beside them."""
    import jax  # here: files.py reads for those who need no JAX

    return int(SAVE_MARGIN * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))


def check_space(directory: Path, tree: Any) -> None:
    """OSError, before anything is written, where `directory` has no room for the arrays of `tree`."""
    needed, free = bytes_needed(tree), shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(
            f"no space to save in {directory}: {needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free; "
            f"free some or choose another MODEL_DIR. What was saved before is whole."
        )
