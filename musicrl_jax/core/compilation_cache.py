"""Turns on JAX's persistent compilation cache: a second `generate` reuses the first one's programs.

The cache is in the user's cache folder and bounded in size. JAX's environment variables win:
JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false turns it off.
"""

import contextlib
import hashlib
import os
import platform
from pathlib import Path

import filelock
import jax

from musicrl_jax.core.files import can_write

MAX_BYTES = 2 << 30  # beyond, the least recently used entries are removed
MIN_COMPILE_SECONDS = 0.1  # programs that compile faster are not cached; JAX's default is 1
LOCK_SECONDS = 10


def folder() -> Path:
    """Returns the cache folder: $XDG_CACHE_HOME (or ~/.cache) / musicrl-jax / xla-MACHINE-CPU.

    Machines that share a home may have different CPUs, and code for one may not run on another.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    home = named if named.is_absolute() else Path("~/.cache").expanduser()
    return home / "musicrl-jax" / f"xla-{platform.machine()}-{_cpu()}"


def _cpu() -> str:
    """Returns a short hash of this CPU's features, or of its name if the features are unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    features = sorted({line for line in lines if line.startswith(("flags", "Features"))})
    return hashlib.sha256("\n".join(features or [platform.processor()]).encode()).hexdigest()[:8]


def enable() -> None:
    """Turns the cache on in this process. Does nothing if its folder cannot be written."""
    settings = {"jax_persistent_cache_min_compile_time_secs": MIN_COMPILE_SECONDS}
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        try:
            directory = folder()
            if not can_write(directory):
                return
            _remove_partial_entries(directory)
        except (OSError, RuntimeError):  # a disk that fails, or a user without a home
            return
        settings["jax_compilation_cache_dir"] = str(directory)
        settings["jax_compilation_cache_max_size"] = (
            MAX_BYTES  # not of a folder that the user named
        )
    # The user's own variables win.
    for name, value in settings.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)


def _remove_partial_entries(directory: Path) -> None:
    """Removes the entries of processes that were killed while they wrote.

    JAX writes an entry in place, and then its access time. It would never replace half an entry,
    and an entry without an access time makes each later write fail (jax 0.10 to 0.12).
    """
    lock = filelock.FileLock(directory / ".lockfile", timeout=LOCK_SECONDS)
    with contextlib.suppress(filelock.Timeout), lock:
        for entry in directory.glob("*-cache"):
            time = entry.with_name(entry.name.removesuffix("-cache") + "-atime")
            if not time.exists() or time.stat().st_size != 8:
                entry.unlink(missing_ok=True)
                time.unlink(missing_ok=True)
