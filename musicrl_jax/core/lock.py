"""One process at a time writes in a folder: a second run there is refused, and a dead one's lock is taken over.

The lock is a file that its holder touches every few seconds. Where all hosts see one file system (a disk, NFS) it is
exclusive. On a mounted bucket (gcsfuse) it is as good as the mount: of two hosts that start within the same moment both
may win, as a file appears on other hosts only once it is closed.
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

LEASE_SECONDS = 60.0  # without a touch, after which a lock of another host is taken over; touched three times as often
POLL_SECONDS = 0.5

P = ParamSpec("P")
T = TypeVar("T")


@contextlib.contextmanager
def locked(folder: str | Path, name: str = "musicrl") -> Iterator[None]:
    """Holds the lock `folder`/.NAME.lock; the folder is made where it is not there.

    Of several hosts the first holds it for all. A lock whose process is dead is taken over: at once where it ran on
    this host, and after LEASE_SECONDS without a touch where it ran on another. A folder that cannot be written to needs
    no lock, as nothing changes there.

    Raises:
      ValueError: where another process holds it; it names host, process and start time.
      OSError: where the lock cannot be written, as on a full disk.
    """
    path = Path(folder).expanduser().absolute() / f".{name}.lock"
    with contextlib.ExitStack() as held:
        hosts.first_alone(_take)(path, held)
        yield


def holds(parameter: str, beside: bool = False) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorates a verb that writes where its `parameter` says, so that it runs inside `locked`.

    Args:
      parameter: of the verb; a folder.
      beside: for a file, or a folder that is moved into its place whole: the lock lies beside it.
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

        run.__signature__ = signature  # gin asks for it, and does not look behind a decorator
        return run

    return decorate


def _take(path: Path, held: contextlib.ExitStack) -> None:
    """Takes the lock until `held` is closed."""
    made = _make_folders(path.parent)
    held.callback(_remove_empty, made)  # a run that was refused leaves no folder behind
    if not os.access(path.parent, os.W_OK):
        return
    taken = functools.partial(_end_if_taken, path)
    lock = filelock.SoftFileLease(
        path, lease_duration=LEASE_SECONDS, thread_local=False, on_compromise=taken
    )
    try:
        lock.acquire(timeout=0)
    except (filelock.Timeout, PermissionError):  # the second where it is another user's
        _wait(lock, path)
    except OSError as error:
        raise OSError(
            f"{path} cannot be written: {error.strerror}; free some space, or mend the folder"
        ) from error
    held.callback(lock.release)
    about = _about(path)
    write_json(
        about,
        {
            "machine": _machine(),
            "host": socket.gethostname(),
            "process": os.getpid(),
            "since": _now(),
        },
    )
    held.callback(about.unlink, missing_ok=True)


def _make_folders(folder: Path) -> list[Path]:
    """Makes a folder, and returns what was made for it, the innermost first."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    with contextlib.suppress(OSError):  # what writes there next says it better
        folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    """Removes those of the folders that are empty, up to the first that is not."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _wait(lock: filelock.SoftFileLease, path: Path) -> None:
    """Takes over a lock of another machine once it has expired; ValueError where its holder lives."""
    deadline, waits = time.monotonic() + LEASE_SECONDS + 10 * POLL_SECONDS, False
    # On another machine a process that is dead cannot be told from one that lives; a holder that has not written who it
    # is has just started.
    while (holder := _holder(lock)).get("machine") != _machine() and time.monotonic() < deadline:
        if holder and not waits:
            print(
                f"{path.parent} is locked by {_named(holder)}: waits whether that one lives",
                flush=True,
            )
        waits = waits or bool(holder)
        hosts.stop_point()
        time.sleep(POLL_SECONDS)
        with contextlib.suppress(filelock.Timeout, PermissionError):
            lock.acquire(timeout=0)
            return
    raise ValueError(
        f"{path.parent} is in use by {_named(holder)}: wait for it, end it, or choose another folder; if that process "
        f"is no more, remove {path}"
    )


def _about(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _holder(lock: filelock.SoftFileLease) -> dict[str, str | int]:
    """Machine, host, process and start time of who holds the lock; {} where that is not written."""
    with contextlib.suppress(OSError, ValueError):
        holder = json.loads(_about(Path(lock.lock_file)).read_text())
        if (
            lock.owner is not None and lock.owner.pid == holder["process"]
        ):  # not of one whose lock was taken over
            return holder
    return {}


def _named(holder: dict[str, str | int]) -> str:
    if not holder:
        return "another process, which has just started"
    return f"process {holder['process']} on host {holder['host']}, since {holder['since']}"


def _machine() -> str:
    """What has process numbers of its own: a machine since its boot, or a container on it."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # Linux alone
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return " ".join(parts)


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())


def _end_if_taken(path: Path, compromise: filelock.LeaseCompromise) -> None:
    """Ends this process where another one has taken the lock over, as it may while this one is stopped: both would
    write. A touch that failed is no such thing, and is told.
    """
    now = filelock.SoftFileLease(path, lease_duration=LEASE_SECONDS)
    if now.owner is None or now.is_lock_held_by_us:
        print(
            f"{path} cannot be touched: {compromise.reason}; others may not see this run",
            file=sys.stderr,
        )
        return
    print(
        f"{path.parent} was taken over by {_named(_holder(now))} while this process was stopped",
        file=sys.stderr,
    )
    sys.stderr.flush()
    os._exit(1)
