"""Small files: written whole or not at all, read with clear errors, set aside if damaged."""

import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from musicrl_jax.core import hosts
from musicrl_jax.core.manifest import (
    Kind,
    check_kind,
    check_regular,
    error_context,
    parse_json,
    read_regular,
    replacing,
    write_on_disk,
)

DAMAGED = ".damaged"  # suffix of a file or folder that was set aside
REMEDY = "restore a copy, or delete it"
ABANDONED_HOURS = 6.0  # without a change, after which an unfinished entry has no writer

# --- Text and JSON. ---


def write_text(path: str | Path, content: str) -> None:
    """Writes UTF-8, whole or not at all, and makes the file's folder if needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_on_disk(path, content, flush=False)


def write_json(path: str | Path, content: Any) -> None:
    """Writes JSON, whole or not at all, and makes the file's folder if needed."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_text(path: str | Path) -> str:
    """Reads a regular file in UTF-8, without its byte order mark.

    Raises ValueError, which names file, line and byte, if it is not UTF-8.
    """
    content = read_regular(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = content[: error.start].count(b"\n") + 1, content[error.start]
        raise ValueError(
            f"{path}, line {line}: byte {byte:#x} is not UTF-8: save it as UTF-8"
        ) from error


def read_json(path: str | Path, kind: Kind = dict, remedy: str = REMEDY) -> Any:
    """Reads JSON from a regular file and checks that it is of the expected kind.

    Args:
      path: the file.
      kind: what the reader expects; see `manifest.check_kind`.
      remedy: what to do about a damaged file; it ends the message.

    Raises:
      ValueError: names the file, what is wrong with it and the remedy.
      OSError: if there is no file or it cannot be read; names it.
    """
    with error_context(after=f": {remedy}"):
        raw = read_regular(path)
    return json_from(raw, str(path), kind, remedy)


def json_from(raw: bytes, where: str, kind: Kind = dict, remedy: str = REMEDY) -> Any:
    """Parses JSON and checks its kind, as `read_json` does; `where` names it in errors."""
    with error_context(after=f": {remedy}"):
        content = parse_json(raw, where)
        with error_context(f"{where}: "):
            check_kind(content, kind)
        return content


# --- Arrays. ---


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Reads the arrays of an .npz file.

    Raises ValueError, which names the file, if it is damaged, and OSError if there is none.
    """
    check_regular(path)
    try:
        # NumPy leaves a file open that it opened itself and cannot read.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        if not arrays:  # zipfile takes the NUL bytes of a power cut for an empty archive
            raise ValueError("it holds no arrays")
        # For a member that is not an array, NumPy returns bytes.
        if odd := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
            raise ValueError(f"{odd[0]} is no array")
        return arrays
    except Exception as error:  # zipfile, zlib and numpy raise at least eight types for damage
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"{path} is no whole .npz ({reason}): {REMEDY}") from error


def cached(
    folder: str | Path, name: str, inputs: Any, compute: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Returns the arrays of `compute`, from the file of an earlier call if there is one.

    So a run that was killed does not repeat the work. All hosts call it and return the same arrays;
    the first host alone checks for the file and writes it.

    Args:
      folder: the folder of such files; the caller removes it when no host needs them.
      name: the name of the work.
      inputs: all that the arrays depend on, as JSON; with other inputs they are computed again.
      compute: does the work, on all hosts together.
    """
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]
    path = Path(folder) / f"{digest}-{name}.npz"
    if hosts.first_decides(lambda: _read_whole(path) is not None):
        return read_arrays(path)
    arrays = compute()
    if hosts.first():
        _write_arrays(path, arrays)
    return arrays


def cached_at(path: Path, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns the arrays of `compute`, from the file if there is one; each host on its own.

    Args:
      path: names all that the arrays depend on.
      compute: does the work, on this host alone.
    """
    arrays = _read_whole(path)
    if arrays is None:
        arrays = compute()
        _write_arrays(path, arrays)
    return arrays


def _read_whole(path: Path) -> dict[str, np.ndarray] | None:
    """Reads an .npz file. Returns None if it is missing or damaged; a damaged one is set aside."""
    if os.path.lexists(path):
        try:
            return read_arrays(path)
        except (ValueError, OSError) as error:
            set_aside(path, str(error).removeprefix(f"{path} ").removesuffix(f": {REMEDY}"))
    return None


def _write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an .npz file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)


# --- Damaged and unfinished files. ---


def set_aside(path: str | Path, reason: str) -> Path:
    """Renames a damaged file to NAME.damaged or NAME.damaged.2, and reports and returns it."""
    path, number = Path(path), 1
    aside = path.with_name(path.name + DAMAGED)
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}{DAMAGED}.{number}")
    os.rename(path, aside)
    print(f"{path} is damaged: {reason}; set aside as {aside.name}", flush=True)
    return aside


def remove_abandoned(folder: str | Path, pattern: str) -> None:
    """Removes, and reports, what killed writers left unfinished in `folder`.

    A writer writes all the time, so an entry without a change for ABANDONED_HOURS has none. A
    younger entry is only reported.
    """
    for path in sorted(Path(folder).glob(pattern)):
        is_folder = path.is_dir() and not path.is_symlink()
        entries = [path, *(path.rglob("*") if is_folder else ())]
        try:
            newest = max(entry.lstat().st_mtime for entry in entries)
        except FileNotFoundError:
            continue  # its writer has just finished
        hours = (time.time() - newest) / 3600
        if hours < ABANDONED_HOURS:
            message = "is not finished: if no other process is writing it, remove it"
        else:
            message = f"was not finished, and nothing changed in it for {hours:.0f} hours: removed"
            if is_folder:
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        print(f"{path} {message}", flush=True)


# --- Cache folders of other libraries. ---

# Environment variables that name the cache folder of a library, and our names for these folders.
CACHES = {"NUMBA_CACHE_DIR": "numba", "MPLCONFIGDIR": "matplotlib"}


def provide_caches() -> None:
    """Gives libraries another cache folder if the user's cache folder cannot be written.

    Call it before librosa or matplotlib is imported. Without a cache folder, as in a container that
    runs as nobody, numba raises an error. Variables that are set already stay.
    """
    if can_write(Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))):
        return
    if missing := [variable for variable in CACHES if not os.environ.get(variable)]:
        root = _private_folder()
        os.environ.update({variable: str(root / CACHES[variable]) for variable in missing})


def can_write(folder: Path) -> bool:
    """Returns whether a file can be written in `folder`, which is made if needed.

    Writes a temporary file, because permissions alone do not tell.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def _private_folder() -> Path:
    """Returns a temporary folder that only this user can write to, the same one for all processes.

    numba runs the code in its cache. So a folder that others can write to is not used.
    """
    folder = Path(tempfile.gettempdir()) / f"musicrl-cache-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        state = folder.lstat()
        is_own = stat.S_ISDIR(state.st_mode) and state.st_uid == os.getuid()
        if is_own and not state.st_mode & 0o022:
            return folder
    except OSError:
        pass  # a new folder for this process alone replaces it
    return Path(tempfile.mkdtemp(prefix="musicrl-cache-"))
