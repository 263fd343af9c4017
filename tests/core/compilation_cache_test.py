"""Compiled functions are found again by the next process, in a folder of bounded size, or are done without."""

import os
import subprocess
import sys
from pathlib import Path

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


def compiled(**variables):
    """(hits, folder, most bytes) of a process that compiles a function, with these environment variables."""
    left = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment = {**left, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    result, hits, folder, most = done.stdout.split()
    assert result == "70.0"
    return int(hits), folder, int(most)


def test_the_next_process_finds_what_the_first_compiled(tmp_path):
    """Also once a process was killed while it wrote: half an entry is not one, and stops no other."""
    hits, folder, most = compiled(XDG_CACHE_HOME=str(tmp_path))
    assert hits == 0 and Path(folder).parent == tmp_path / "musicrl-jax"
    assert most == compilation_cache.MAX_BYTES > 0
    assert compiled(XDG_CACHE_HOME=str(tmp_path))[0] > 0
    entries = list(Path(folder).glob("*-cache"))
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[:10])
        entry.with_name(entry.name.removesuffix("-cache") + "-atime").unlink()
    assert compiled(XDG_CACHE_HOME=str(tmp_path))[0] == 0
    assert compiled(XDG_CACHE_HOME=str(tmp_path))[0] > 0


def test_jaxs_own_variables_win(tmp_path):
    mine = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "mine"), "XDG_CACHE_HOME": str(tmp_path)}
    assert compiled(**mine)[1:] == (str(tmp_path / "mine"), -1)
    assert not (tmp_path / "musicrl-jax").exists()
    small = {"JAX_COMPILATION_CACHE_MAX_SIZE": "1000000", "XDG_CACHE_HOME": str(tmp_path)}
    assert compiled(**small)[2] == 1_000_000


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    assert compiled(XDG_CACHE_HOME=str(tmp_path / "file"))[:2] == (0, "None")


@pytest.mark.parametrize("name", ["", "relative/folder"])
def test_without_an_absolute_cache_folder_it_is_in_the_home(name, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", name)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compilation_cache.folder().parent == tmp_path / ".cache/musicrl-jax"
