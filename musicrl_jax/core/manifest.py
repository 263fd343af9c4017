"""Manifests, which make the folder of a model or a state whole: written last, in one move.

A manifest holds the size and sha256 of every file and a digest of itself, so one flipped bit in any
of them is detected. Exported bundles contain a copy of this file, so it imports nothing of this
package.
"""

import contextlib
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
SEAL = "sha256"  # key of a manifest's digest of itself
HASH_THREADS = 8
SAVE_MARGIN = 1.1  # disk space required for a save, in units of the arrays' bytes

# --- Regular files. ---


def check_regular(path: str | Path) -> None:
    """Raises ValueError if `path` is no regular file or link to one, OSError if it is missing."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
        kind = kinds.get(stat.S_IFMT(mode), "device")
        raise ValueError(f"{path} is a {kind}, and must be a regular file")


def read_regular(path: str | Path) -> bytes:
    """Returns the content of a regular file, or of a link to one.

    Raises ValueError for a folder, a FIFO, a socket or a device: reading these fails or never ends.
    Raises the system's OSError, which names the file, if it is missing or cannot be read.
    """
    check_regular(path)
    return Path(path).read_bytes()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, and moves it to `path` once the block has written it.

    Readers see the old file or the new one, also if the writer is killed. Two processes that write
    the same file have different temporary paths.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    yield partial
    os.replace(partial, path)


def write_on_disk(path: Path, text: str, flush: bool = True) -> None:
    """Writes UTF-8, whole or not at all; with `flush`, a power cut does not undo it afterwards."""
    with replacing(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        if flush:
            file.flush()
            os.fsync(file.fileno())
    if flush:
        flush_names(path.parent)


def flush_names(folder: Path) -> None:
    """Flushes a folder's list of files to the disk, if the file system supports it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# --- JSON of a known kind. ---


@contextlib.contextmanager
def error_context(before: str = "", after: str = "") -> Iterator[None]:
    """Raises a ValueError of the block again, with words before and after its message."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{before}{error}{after}") from error


Kind = type | tuple[type, ...] | list["Kind"] | dict[Any, "Kind"]


def parse_json(raw: bytes, where: str) -> Any:
    """Parses JSON in UTF-8. Raises ValueError, which begins with `where`, for any fault in it."""
    try:
        content = json.loads(raw.decode("utf-8-sig"))
        if rb"\ud" in raw.lower():  # half of a surrogate pair cannot be printed or written
            json.dumps(content, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise ValueError(f"{where} is not UTF-8: {error.reason} at {error.start}") from error
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    return content


def check_kind(content: Any, kind: Kind, field: str = "") -> None:
    """Raises ValueError, which names the field, if JSON is not of the kind that its reader expects.

    Args:
      content: parsed JSON.
      kind: a type or several; [kind] for a list of any length; {str: kind} for an object with any
        names; otherwise {name: kind} for an object with at least these names. A name that ends in
        "?" may be missing.
      field: the path of `content` in the file, for the message.
    """
    # The type of the content itself.
    expected = list if isinstance(kind, list) else dict if isinstance(kind, dict) else kind
    types = expected if isinstance(expected, tuple) else (expected,)
    # Python takes True for an int, and JSON's 1 for no float: neither is meant.
    is_stray_bool = isinstance(content, bool) and bool not in types
    if is_stray_bool or not isinstance(content, (*types, int) if float in types else types):
        here, names = field or "its content", " or ".join(each.__name__ for each in types)
        raise ValueError(f"{here} is {json.dumps(content)[:60]} and must be of type {names}")

    # The kinds of its parts.
    if isinstance(kind, list):
        for number, part in enumerate(content):
            check_kind(part, kind[0], f"{field}[{number}]")
    elif isinstance(kind, dict):
        any_names, prefix = str in kind, f"{field}." if field else ""
        for name, part in (dict.fromkeys(content, kind[str]) if any_names else kind).items():
            inner = name if any_names else name.removesuffix("?")
            if inner in content:
                check_kind(content[inner], part, prefix + inner)
            elif inner == name:
                raise ValueError(f"{prefix}{inner} is missing")


# --- Manifests. ---


def sealed(content: dict[str, Any]) -> str:
    """Returns `content` as JSON with a digest of itself."""
    digest = hashlib.sha256(json.dumps(content, indent=1).encode()).hexdigest()
    return json.dumps({**content, SEAL: digest}, indent=1) + "\n"


def unsealed(path: Path, kind: Kind = dict, digest_required: bool = True) -> dict[str, Any]:
    """Reads a file written with `sealed`, and checks its digest and its kind; see `check_kind`.

    With digest_required=False a file without a digest, as older versions wrote it, is accepted.

    Raises ValueError, which says what is wrong, if a bit has changed or the file cannot be read.
    """
    try:
        raw = read_regular(path)
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror}") from error
    content = parse_json(raw, path.name)
    digest = content.pop(SEAL, None) if isinstance(content, dict) else None
    if (digest or digest_required) and (not digest or sealed(content).encode() != raw):
        raise ValueError(f"{path.name} does not have the digest that it names")
    with error_context(f"{path.name}: "):
        check_kind(content, kind)
    return content


FILES = {str: [(int, str)]}  # the kind of a manifest's list of files: {name: [bytes, sha256]}


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Writes the manifest of a folder: `content` and, under 'files', `described_files`."""
    write_on_disk(folder / MANIFEST, sealed({**content, "files": described_files(folder)}))


def described_files(folder: Path) -> dict[str, list[Any]]:
    """Returns {name: [bytes, sha256]} of the files in `folder`, and flushes them to the disk."""
    names = _file_names(folder)
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        hashes = list(pool.map(lambda name: _sha256(folder / name, flush=True), names))
    for inner in sorted({(folder / name).parent for name in names} | {folder}):
        flush_names(inner)
    sizes = [(folder / name).stat().st_size for name in names]
    return {name: [size, digest] for name, size, digest in zip(names, sizes, hashes, strict=True)}


def damage(folder: Path, files: dict[str, list[Any]], more: bool) -> str:
    """Returns what is wrong with the first file that is not as described, '' if all are.

    Args:
      folder: the folder of the manifest.
      files: {name: [bytes, sha256]}, from the manifest.
      more: whether other files are allowed.
    """
    # The list itself, and the names in it.
    for name, described in files.items():
        if [type(part) for part in described] != [int, str]:
            words = json.dumps(described)[:60]
            return f"{MANIFEST} says {words} of {name}, and not its size and sha256"
    present = _file_names(folder)
    if missing := sorted(set(files) - set(present)):
        return f"{missing[0]} is missing"
    if not more and (unknown := sorted(set(present) - set(files))):
        return f"{unknown[0]} does not belong to it"

    # Sizes and hashes.
    def fault(name: str) -> str:
        expected_size, expected_hash = files[name]
        try:
            if (size := (folder / name).stat().st_size) != expected_size:
                return f"{name} has {size} bytes, not {expected_size}"
            if (digest := _sha256(folder / name)) != expected_hash:
                return f"{name} has the sha256 {digest[:12]}, not {expected_hash[:12]}"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        except ValueError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return next(filter(None, pool.map(fault, files)), "")


def _sha256(path: Path, flush: bool = False) -> str:
    check_regular(path)
    with open(path, "rb") as file:
        if flush:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_names(folder: Path) -> list[str]:
    """Returns the files below a folder, without its manifest and Python's caches, sorted."""
    names = []
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        is_file = path.is_symlink() or not path.is_dir()
        if is_file and "__pycache__" not in name.parts and str(name) != MANIFEST:
            names.append(name.as_posix())
    return sorted(names)


# --- Disk space. ---


def bytes_needed(tree: Any) -> int:
    """Returns the disk space for a tree of arrays, with a margin for the files beside them."""
    import jax  # here, because a bundle checks its files before it imports JAX

    return int(SAVE_MARGIN * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))


def check_space(directory: Path, tree: Any) -> None:
    """Raises OSError if `directory` has no room for the arrays of `tree`. Call it before a save."""
    needed, free = bytes_needed(tree), shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(
            f"no space to save in {directory}: {needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB "
            "free; free some or choose another MODEL_DIR. What was saved before is whole."
        )
