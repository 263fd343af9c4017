"""A compilation cache for test files whose runs compile equal programs."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


@contextlib.contextmanager
def cached(folder: Path) -> Iterator[None]:
    """Keeps all compiled programs in a folder, and takes equal ones from there."""
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    _use(settings)
    try:
        yield
    finally:
        _use(before)


def _use(settings: dict[str, str | float | None]) -> None:
    """Sets JAX's settings, and has it read them again."""
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
