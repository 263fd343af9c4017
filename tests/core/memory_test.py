"""A program that does not fit is refused before it runs, with what would."""

import types

import jax
import jax.numpy as jnp
import pytest

from musicrl_jax.core import memory


def test_a_program_that_does_not_fit_says_what_would(monkeypatch):
    compiled = jax.jit(lambda x: jnp.repeat(x, 1000)).lower(jnp.zeros(1000, jnp.float32)).compile()
    monkeypatch.setattr(memory, "free_bytes", lambda: 2_000_000)  # of 4 MB
    with pytest.raises(ValueError, match=r"clip_seconds=500 needs 0\.0 GB .*: about 2[45]\d\.\d s would fit"):
        memory.check(compiled, "clip_seconds", 500)
    for free in (5_000_000, None):
        monkeypatch.setattr(memory, "free_bytes", lambda free=free: free)
        memory.check(compiled, "clip_seconds", 500)


@pytest.mark.parametrize(
    ("system", "limit", "used", "free"),
    [
        ("MemTotal: 9 kB\nMemAvailable:    3000 kB\n", None, None, 3_072_000),
        ("MemAvailable: 3000 kB", "max", "7", 3_072_000),
        ("MemAvailable: 3000 kB", "2000000", "500000", 1_500_030),
        (None, "2000000", "500000", None),
    ],
)
def test_free_memory_is_the_systems_and_the_containers(monkeypatch, tmp_path, system, limit, used, free):
    for name, text in (("meminfo", system), ("memory.max", limit), ("memory.current", used)):
        if text is not None:
            (tmp_path / name).write_text(text)
    (tmp_path / "memory.stat").write_text("anon 499970\nactive_file 10\ninactive_file 20\n")
    monkeypatch.setattr(memory, "SYSTEM", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "GROUP", tmp_path)
    assert memory.free_bytes() == free


def test_an_accelerator_says_itself_what_is_free(monkeypatch):
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 900, "bytes_in_use": 200})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert memory.free_bytes() == 700
