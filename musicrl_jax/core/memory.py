"""Whether a compiled program fits into memory, before it runs: a machine that is short of it says so too late."""

import contextlib
from pathlib import Path

import jax

GROUP = Path("/sys/fs/cgroup")  # a container's limits, where it has any
SYSTEM = Path("/proc/meminfo")


def free_bytes() -> int | None:
    """Returns the memory that a program on the first device can have; None where the system does not say."""
    if (statistics := jax.local_devices()[0].memory_stats()) and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    found = []
    with contextlib.suppress(OSError, KeyError, ValueError):
        lines = dict(line.split(":") for line in SYSTEM.read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
        # A container's use counts files that are cached, which give way to a program.
        limit, used = (int((GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (GROUP / "memory.stat").read_text().splitlines())
        found.append(limit - used + int(counts["inactive_file"]) + int(counts["active_file"]))
    return min(found, default=None)


def check(compiled: jax.stages.Compiled, setting: str, seconds: float) -> None:
    """Raises ValueError where a program that draws `seconds` of sound needs more memory than is free.

    Args:
      compiled: the program; its arguments are in memory already.
      setting: the name of the setting that gives its length, for the message.
      seconds: the length.
    """
    needs, free = compiled.memory_analysis(), free_bytes()
    needed = needs.temp_size_in_bytes + needs.output_size_in_bytes - needs.alias_size_in_bytes
    if free is not None and needed > free:
        # Memory grows with the length or faster, so that a proportional share fits.
        raise ValueError(
            f"{setting}={seconds:g} needs {needed / 1e9:.1f} GB of memory, and {max(free, 0) / 1e9:.1f} GB are free: "
            f"about {max(seconds * free / needed, 0.0):.1f} s would fit"
        )
