"""Lets one process at a time write in a folder. A second run is refused.

The lock is a file that its holder touches every few seconds. It is exclusive where all hosts see
one file system (a disk, NFS). On a mounted bucket (gcsfuse), where a file appears on other hosts
only once it is closed, two hosts that start in the same moment may both get the lock.
"""

import contextlib
import functools
import inspect
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

import filelock

from musicrl_jax.core import hosts
from musicrl_jax.core.files import write_json

LEASE_SECONDS = 60.0  # without a touch, after which another host's lock is free; a third per touch
POLL_SECONDS = 0.5

P = ParamSpec("P")
T = TypeVar("T")


@contextlib.contextmanager
def locked(folder: str | Path, name: str = "musicrl") -> Iterator[None]:
    """Holds the lock `folder`/.NAME.lock, and makes the folder if needed.

    The first of several hosts holds it for all. The lock of a dead process is taken over: at once
    if the process ran on this host, and after LEASE_SECONDS without a touch if it ran on another. A
    folder that cannot be written to needs no lock, since nothing changes there.

    Raises:
      ValueError: if another process holds it; names its host, number and start time.
      OSError: if the lock cannot be written, as on a full disk.
    """
    path = Path(folder).expanduser().absolute() / f".{name}.lock"
    with contextlib.ExitStack() as cleanup:
        hosts.first_alone(_acquire)(path, cleanup)
        yield


def holds(parameter: str, beside: bool = False) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorates a verb so that it runs inside `locked` of the folder that it writes in.

    Args:
      parameter: the verb's parameter that names the folder.
      beside: whether the parameter names a file, or a folder that is moved into place as a whole.
        The lock is then beside it.
    """

    def decorate(verb: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(verb)

        @functools.wraps(verb)
        def run(*arguments: P.args, **keywords: P.kwargs) -> T:
            bound = signature.bind(*arguments, **keywords)
            bound.apply_defaults()
            path = Path(bound.arguments[parameter])
            with locked(path.parent, path.name) if beside else locked(path):
                return verb(*arguments, **keywords)

        run.__signature__ = signature  # gin reads it, and ignores `__wrapped__`
        return run

    return decorate


# --- Acquiring. ---


def _acquire(path: Path, cleanup: contextlib.ExitStack) -> None:
    """Acquires the lock until `cleanup` is closed."""
    # A run that is refused leaves no new folder behind.
    new_folders = _make_folders(path.parent)
    cleanup.callback(_remove_empty, new_folders)
    if not os.access(path.parent, os.W_OK):
        return

    # Acquire the lock, or wait for its holder.
    end = functools.partial(_end_if_taken_over, path)
    lock = filelock.SoftFileLease(
        path, lease_duration=LEASE_SECONDS, thread_local=False, on_compromise=end
    )
    try:
        lock.acquire(timeout=0)
    except (filelock.Timeout, PermissionError):  # the latter for another user's lock
        _wait(lock, path)
    except OSError as error:
        raise OSError(
            f"{path} cannot be written: {error.strerror}; free some space, or mend the folder"
        ) from error
    cleanup.callback(lock.release)

    # Its holder, for the message to other processes.
    holder_file = _holder_file(path)
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    holder = {"machine": _machine(), "host": socket.gethostname(), "process": os.getpid()}
    write_json(holder_file, {**holder, "since": since})
    cleanup.callback(holder_file.unlink, missing_ok=True)


def _make_folders(folder: Path) -> list[Path]:
    """Makes a folder and its parents, and returns the new ones, the innermost first."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    with contextlib.suppress(OSError):  # whoever writes there next raises a clearer error
        folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    """Removes the folders in order, up to the first that is not empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _wait(lock: filelock.SoftFileLease, path: Path) -> None:
    """Takes over the lock of another machine once it has expired.

    Raises ValueError if its holder is alive.
    """
    deadline, reported = time.monotonic() + LEASE_SECONDS + 10 * POLL_SECONDS, False
    # A process on another machine counts as dead only once its lock has expired. A holder that has
    # not written its file yet has just started.
    while (holder := _holder(lock)).get("machine") != _machine() and time.monotonic() < deadline:
        if holder and not reported:
            print(
                f"{path.parent} is locked by {_name(holder)}: waiting to see if it is alive",
                flush=True,
            )
            reported = True
        hosts.stop_point()
        time.sleep(POLL_SECONDS)
        with contextlib.suppress(filelock.Timeout, PermissionError):
            lock.acquire(timeout=0)
            return
    raise ValueError(
        f"{path.parent} is in use by {_name(holder)}: wait for it, end it, or choose another "
        f"folder; if that process no longer exists, remove {path}"
    )


# --- The holder, beside the lock. ---


def _holder_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _holder(lock: filelock.SoftFileLease) -> dict[str, str | int]:
    """Returns machine, host, process and start time of the lock's holder, {} if unknown."""
    with contextlib.suppress(OSError, ValueError):
        holder = json.loads(_holder_file(Path(lock.lock_file)).read_text())
        # The file may be that of an earlier holder, whose lock was taken over.
        if lock.owner is not None and lock.owner.pid == holder["process"]:
            return holder
    return {}


def _name(holder: dict[str, str | int]) -> str:
    if not holder:
        return "another process, which has just started"
    return f"process {holder['process']} on host {holder['host']}, since {holder['since']}"


def _machine() -> str:
    """Identifies what numbers processes: a machine since its boot, or a container on it."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # on Linux only
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return " ".join(parts)


def _end_if_taken_over(path: Path, compromise: filelock.LeaseCompromise) -> None:
    """Ends this process if another one has taken over the lock while this one was stopped.

    Both would write otherwise. A touch that failed is only reported.
    """
    current = filelock.SoftFileLease(path, lease_duration=LEASE_SECONDS)
    if current.owner is None or current.is_lock_held_by_us:
        words = f"{path} cannot be touched: {compromise.reason}; others may not see this run"
        print(words, file=sys.stderr)
        return
    holder = _name(_holder(current))
    hosts.end_now(1, f"{path.parent} was taken over by {holder} while this process was stopped")
