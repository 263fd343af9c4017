"""Small files: written whole or not at all, read with faults named, set aside if damaged."""

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
from musicrl_jax.core.manifest import Kind, check_kind, check_regular, parse_json, read_regular

DAMAGED = ".damaged"  # the ending of a file that was set aside
REMEDY = "restore a copy, or delete it"
ABANDONED_HOURS = 6.0  # an unfinished folder in which nothing changed for so long has no writer


def write_text(path: str | Path, content: str) -> None:
    """Writes UTF-8 in one move: whoever reads the file, or kills the writer, sees the old one or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of two processes that write the file at once, each has a partial file of its own.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(content, encoding="utf-8")
    os.replace(partial, path)


def write_json(path: str | Path, content: Any) -> None:
    """`write_text` of JSON."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_text(path: str | Path) -> str:
    """Reads a regular file in UTF-8, without its byte order mark.

    Raises ValueError that names file, line and byte of a fault.
    """
    content = read_regular(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        byte = content[error.start]
        raise ValueError(
            f"{path}, line {line}: byte {byte:#x} is not UTF-8: save it as UTF-8"
        ) from error


def read_json(path: str | Path, kind: Kind = dict, remedy: str = REMEDY) -> Any:
    """Reads JSON from a regular file and checks that it is of the expected kind.

    Args:
      path: of the file.
      kind: what the reader expects; see `manifest.check_kind`.
      remedy: what to do about a damaged file; it ends the message.

    Raises:
      ValueError: names the file, what is wrong with it and the remedy.
      OSError: if there is no file or it cannot be read; names it.
    """
    try:
        raw = read_regular(path)
    except ValueError as error:
        raise ValueError(f"{error}: {remedy}") from error
    return json_from(raw, str(path), kind, remedy)


def json_from(raw: bytes, where: str, kind: Kind = dict, remedy: str = REMEDY) -> Any:
    """`read_json` of bytes that were read already; `where` names them."""
    try:
        content = parse_json(raw)
    except ValueError as error:
        raise ValueError(f"{where} {error}: {remedy}") from error
    try:
        check_kind(content, kind)
    except ValueError as error:
        raise ValueError(f"{where}: {error}: {remedy}") from error
    return content


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Reads an .npz of arrays; ValueError names a damaged one, OSError one that is not there."""
    check_regular(path)
    try:
        # NumPy leaves a file open that it opened itself and cannot read.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as there:
            arrays = {name: there[name] for name in there.files}
        if not arrays:  # zipfile takes the NUL bytes of a power cut for an empty archive
            raise ValueError("it holds no arrays")
        if odd := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
            raise ValueError(f"{odd[0]} is no array")  # which NumPy gives as bytes
        return arrays
    except (
        Exception
    ) as error:  # for damage zipfile, zlib and numpy raise at least eight kinds of errors
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"{path} is no whole .npz ({reason}): {REMEDY}") from error


def set_aside(path: str | Path, reason: str) -> Path:
    """Renames a damaged file to NAME.damaged or NAME.damaged.2, says so, and returns the path."""
    path, number = Path(path), 1
    aside = path.with_name(path.name + DAMAGED)
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}{DAMAGED}.{number}")
    os.rename(path, aside)
    print(f"{path} is damaged: {reason}; set aside as {aside.name}", flush=True)
    return aside


def cached(
    folder: str | Path, name: str, made_of: Any, make: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Returns the arrays of `make`, from the file of an earlier call if there is one.

    A kill must not lose such work. All hosts call it and return the same arrays; the first alone
    looks for the file and writes it.

    Args:
      folder: where such files are; whoever no longer needs them removes it, after all hosts.
      name: of the work.
      made_of: all that the arrays depend on, as JSON holds it; those of something else are not taken.
      make: does the work, on all hosts together.
    """
    settings = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]
    path = Path(folder) / f"{settings}-{name}.npz"
    if hosts.first_decides(lambda: _read_whole(path) is not None):
        return read_arrays(path)
    arrays = make()
    if hosts.first():
        _write_arrays(path, arrays)
    return arrays


def cached_at(path: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns the arrays of `make`, from the file if it is there; each host looks for itself.

    Args:
      path: says what the arrays depend on.
      make: does the work, on this host alone.
    """
    arrays = _read_whole(path)
    if arrays is None:
        arrays = make()
        _write_arrays(path, arrays)
    return arrays


def _read_whole(path: Path) -> dict[str, np.ndarray] | None:
    """Returns the arrays of a file; None without one. A damaged one is named and set aside."""
    if os.path.lexists(path):
        try:
            return read_arrays(path)
        except (ValueError, OSError) as error:
            set_aside(path, str(error).removeprefix(f"{path} ").removesuffix(f": {REMEDY}"))
    return None


def _write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an .npz in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial.npz")
    np.savez(partial, **arrays)
    os.replace(partial, path)


def remove_abandoned(folder: str | Path, pattern: str) -> None:
    """Removes what killed writers left unfinished in `folder`, and names it.

    A writer writes all the time, so an entry in which nothing changed for ABANDONED_HOURS has none.
    A younger one is named alone.
    """
    for path in sorted(Path(folder).glob(pattern)):
        is_folder = path.is_dir() and not path.is_symlink()
        try:
            changes = [
                each.lstat().st_mtime for each in (path, *(path.rglob("*") if is_folder else ()))
            ]
        except FileNotFoundError:
            continue  # its writer has just finished
        hours = (time.time() - max(changes)) / 3600
        if hours < ABANDONED_HOURS:
            print(
                f"{path} is not finished: if no other process is writing it, remove it", flush=True
            )
            continue
        if is_folder:
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        print(
            f"{path} was not finished, and nothing changed in it for {hours:.0f} hours: removed",
            flush=True,
        )


# The variables by which libraries that write when they are imported take another folder.
CACHES = {"NUMBA_CACHE_DIR": "numba", "MPLCONFIGDIR": "matplotlib"}


def provide_caches() -> None:
    """Gives libraries that keep a cache another folder, if the user's cache folder cannot be written.

    Call it before librosa or matplotlib is imported. Otherwise numba raises an error for the first
    function that it should keep, in a container that runs as nobody for instance. Variables that
    are set already are left alone.
    """
    if _can_write(Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))):
        return
    if missing := [variable for variable in CACHES if not os.environ.get(variable)]:
        root = _private_folder()
        os.environ.update({variable: str(root / CACHES[variable]) for variable in missing})


def _can_write(folder: Path) -> bool:
    """Tells whether a file can be made in `folder`, by making one; permissions do not say it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def _private_folder() -> Path:
    """Returns a temporary folder that nobody else can write to; a user's processes share it if possible.

    numba runs what it finds in its cache. So a folder that others may have filled is not taken.
    """
    folder = Path(tempfile.gettempdir()) / f"musicrl-cache-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        state = folder.lstat()
        if (
            stat.S_ISDIR(state.st_mode)
            and state.st_uid == os.getuid()
            and not state.st_mode & 0o022
        ):
            return folder
    except OSError:
        pass  # it cannot be made or looked at: a new folder of this process alone takes its place
    return Path(tempfile.mkdtemp(prefix="musicrl-cache-"))
