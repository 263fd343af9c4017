"""Compiled functions, kept on disk between processes: a second `generate` finds those of the first.

JAX's own persistent cache, in the user's cache folder and bounded in size. JAX's environment
variables win: JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false
does without, and so on.
"""

import contextlib
import hashlib
import os
import platform
import tempfile
from pathlib import Path

import filelock
import jax

MAX_BYTES = 2 << 30  # the entries that were used least recently are removed beyond
MIN_COMPILE_SECONDS = 0.1  # of compiling: what is quicker is not kept. JAX's default is a second
LOCK_SECONDS = 10


def folder() -> Path:
    """Returns the cache's folder for this machine: $XDG_CACHE_HOME/musicrl-jax/xla-..., or ~/.cache
    in its place.

    Code for one CPU may not run on another, and homes are shared between machines, so that each
    kind has its own.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    home = named if named.is_absolute() else Path("~/.cache").expanduser()
    return home / "musicrl-jax" / f"xla-{platform.machine()}-{_cpu()}"


def _cpu() -> str:
    """A short hash of what this CPU can do; of its name where the system does not list that."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    able = sorted({line for line in lines if line.startswith(("flags", "Features"))}) or [
        platform.processor()
    ]
    return hashlib.sha256("\n".join(able).encode()).hexdigest()[:8]


def enable() -> None:
    """Turns the cache on in this process; leaves it off where its folder cannot be written, which
    is no error.
    """
    settings = {
        "jax_compilation_cache_max_size": MAX_BYTES,
        "jax_persistent_cache_min_compile_time_secs": MIN_COMPILE_SECONDS,
    }
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        try:
            directory = folder()
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass
            _remove_halves(directory)
        except (OSError, RuntimeError):  # read-only, full, or a user without a home
            return
        settings["jax_compilation_cache_dir"] = str(directory)
    else:
        del settings["jax_compilation_cache_max_size"]  # of somebody else's folder
    for name, value in settings.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)


def _remove_halves(directory: Path) -> None:
    """Removes entries of processes that were killed while they wrote.

    JAX writes an entry in place and then the time of its use. Half an entry would never be
    replaced, and one without a time makes each later one fail (jax 0.10 to 0.12).
    """
    with (
        contextlib.suppress(filelock.Timeout),
        filelock.FileLock(directory / ".lockfile", timeout=LOCK_SECONDS),
    ):
        for entry in directory.glob("*-cache"):
            time = entry.with_name(entry.name.removesuffix("-cache") + "-atime")
            if not time.exists() or time.stat().st_size != 8:
                entry.unlink(missing_ok=True)
                time.unlink(missing_ok=True)
