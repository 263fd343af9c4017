"""What makes a folder of a model or of a state whole: a manifest, written last and in one move.

It holds the size and sha256 of every file and a digest of itself, so that one flipped bit in any of them is noticed.
"""

import contextlib
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

MANIFEST = "manifest.json"
SEAL = "sha256"  # the key of a manifest's digest of itself
READERS = 8  # files that are hashed at a time
SAVE_MARGIN = 1.1  # the disk space asked for, over the bytes of the arrays


def sealed(content: dict[str, Any]) -> str:
    """JSON with a digest of itself."""
    digest = hashlib.sha256(json.dumps(content, indent=1).encode()).hexdigest()
    return json.dumps({**content, SEAL: digest}, indent=1) + "\n"


def unsealed(path: Path, seal: str = "asked for") -> dict[str, Any]:
    """What was sealed; ValueError that says what is wrong where a bit has changed or the file cannot be read.

    With seal="if there" a file without a digest, as older versions wrote it, is taken as it is.
    """
    try:
        raw = path.read_bytes()
        content = json.loads(raw)
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error
    there = isinstance(content, dict) and content.pop(SEAL, None)
    if (there or seal == "asked for") and (not there or sealed(content).encode() != raw):
        raise ValueError(f"{path.name} does not have the digest that it names")
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
    with open(path, "rb") as file:
        if flush:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_names(folder: Path) -> list[str]:
    """The files in a folder and the folders in it, but for its manifest and what Python leaves beside its modules."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.as_posix() for path in found if "__pycache__" not in path.parts and str(path) != MANIFEST)


def described_files(folder: Path) -> dict[str, list[Any]]:
    """{name: [bytes, sha256]} of the files in `folder`; they are on the disk then."""
    names = _file_names(folder)
    with ThreadPoolExecutor(READERS) as pool:
        hashes = list(pool.map(lambda name: _sha256(folder / name, flush=True), names))
    for inner in sorted({(folder / name).parent for name in names} | {folder}):
        flush_names(inner)
    return {name: [(folder / name).stat().st_size, found] for name, found in zip(names, hashes, strict=True)}


def damage(folder: Path, files: dict[str, list[Any]], more: bool) -> str:
    """What is wrong with the first file that is not as described, '' where all are; `more` files may be allowed."""
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
        return ""

    with ThreadPoolExecutor(READERS) as pool:
        return next(filter(None, pool.map(wrong, files)), "")


def bytes_needed(tree: Any) -> int:
    """Of disk space, for a tree of arrays and what is written beside them."""
    return int(SAVE_MARGIN * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))


def check_space(directory: Path, tree: Any) -> None:
    """OSError, before anything is written, where `directory` has no room for the arrays of `tree`."""
    needed, free = bytes_needed(tree), shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(
            f"no space to save in {directory}: {needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free; "
            f"free some or choose another MODEL_DIR. What was saved before is whole."
        )
