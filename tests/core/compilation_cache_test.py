"""The next process reuses compiled programs from a cache of bounded size."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from musicrl_jax.core import compilation_cache

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json
import jax
from musicrl_jax.core import compilation_cache
compilation_cache.MIN_COMPILE_SECONDS = 0.0
compilation_cache.enable()
import warnings
warnings.simplefilter("error")
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name.rpartition("/")[2]))
print(jax.jit(lambda x: (x * 3 + 1).sum())(jax.numpy.arange(7.0)), hits.count("cache_hits"),
      jax.config.jax_compilation_cache_dir, jax.config.jax_compilation_cache_max_size)
"""


# --- Entries. ---


def compile_in_process(cache):
    """Returns the cache hits, folder and size limit of a process that compiles a function."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    settings = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**others, **settings},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    result, hits, folder, limit = done.stdout.split()
    assert result == "70.0"
    return int(hits), Path(folder), int(limit)


def test_the_next_process_reuses_programs_and_replaces_half_written_ones(tmp_path):
    hits, folder, limit = compile_in_process(tmp_path)
    assert hits == 0 and folder.parent == tmp_path / "musicrl-jax"
    assert limit == compilation_cache.MAX_BYTES > 0
    for entry in folder.glob("*-cache"):  # as a process that was killed leaves it
        entry.write_bytes(entry.read_bytes()[:10])
        entry.with_name(entry.name.removesuffix("-cache") + "-atime").unlink()
    assert compile_in_process(tmp_path)[0] == 0
    assert compile_in_process(tmp_path)[0] > 0


# --- Settings. ---

FOLDER, LIMIT, TIME = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def settings(monkeypatch):
    """Returns the settings that `enable` changes, without JAX's environment variables."""
    for name in (FOLDER, LIMIT, TIME):
        monkeypatch.delenv(name.upper(), raising=False)
    changes = {}
    config = SimpleNamespace(update=changes.__setitem__)
    monkeypatch.setattr(compilation_cache, "jax", SimpleNamespace(config=config))
    return changes


def test_jaxs_own_variables_win(tmp_path, monkeypatch, settings):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(LIMIT.upper(), "1000000")
    compilation_cache.enable()
    assert set(settings) == {FOLDER, TIME}
    assert Path(settings[FOLDER]).parent == tmp_path / "musicrl-jax"
    # The folder that the user names has no limit of ours.
    settings.clear()
    monkeypatch.delenv(LIMIT.upper())
    monkeypatch.setenv(FOLDER.upper(), str(tmp_path / "mine"))
    compilation_cache.enable()
    assert set(settings) == {TIME}


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, monkeypatch, settings):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compilation_cache.enable()
    assert not settings


@pytest.mark.parametrize("name", ["", "relative/folder"])
def test_the_cache_is_in_the_home_unless_the_named_folder_is_absolute(name, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", name)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compilation_cache.folder().parent == tmp_path / ".cache/musicrl-jax"
