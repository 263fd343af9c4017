"""Files are written whole or not at all; finished work is cached, unfinished work removed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from musicrl_jax.core import files

# --- Cached work. ---


def test_work_is_done_once_and_again_for_other_inputs(tmp_path):
    calls = []

    def compute():
        calls.append(len(calls))
        return {"a": np.full((2, 3), len(calls), np.float32), "b": np.array(["words"])}

    first, again = (files.cached(tmp_path, "work", {"seed": 1}, compute) for _ in range(2))
    assert calls == [0] and set(again) == {"a", "b"}
    for name, array in first.items():
        assert again[name].dtype == array.dtype
        np.testing.assert_array_equal(again[name], array)
    assert files.cached(tmp_path, "work", {"seed": 2}, compute)["a"][0, 0] == 2
    assert files.cached(tmp_path, "other work", {"seed": 1}, compute)["a"][0, 0] == 3


def test_failed_work_leaves_no_file(tmp_path):
    with pytest.raises(ZeroDivisionError):
        files.cached(tmp_path, "work", None, lambda: {"a": np.asarray(1 // 0)})
    assert not list(tmp_path.iterdir())


# --- Writing. ---


def test_two_writers_of_a_file_have_different_partial_files(tmp_path, monkeypatch):
    """Two stages of one run, in two processes, both write seconds.json."""
    path, move = tmp_path / "seconds.json", os.replace

    def interrupted(partial, target):
        monkeypatch.setattr(files.os, "replace", move)
        monkeypatch.setattr(files.os, "getpid", lambda: 2)
        files.write_text(path, "second")  # by another process, in between
        move(partial, target)

    monkeypatch.setattr(files.os, "getpid", lambda: 1)
    monkeypatch.setattr(files.os, "replace", interrupted)
    files.write_text(path, "first")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_unfinished_files_of_dead_writers_are_removed_and_others_named(tmp_path, capsys):
    old, young, finished = (
        tmp_path / name for name in ("incomplete.A_1.0.0", "incomplete.B_1.0.0", "1.0.0")
    )
    for path in (old, young, finished):
        path.mkdir()
        (path / "shard").write_bytes(b"data")
    then = time.time() - 3600 * (files.ABANDONED_HOURS + 1)
    for path in (old / "shard", old, young, finished / "shard", finished):
        os.utime(path, (then, then))  # the file in the young folder is new
    files.remove_abandoned(tmp_path, "incomplete.*")
    assert sorted(tmp_path.iterdir()) == [finished, young]
    assert capsys.readouterr().out.splitlines() == [
        f"{old} was not finished, and nothing changed in it for 7 hours: removed",
        f"{young} is not finished: if no other process is writing it, remove it",
    ]


# --- Cache folders. ---


def test_caches_go_to_a_private_folder_if_home_is_read_only(tmp_path, monkeypatch):
    variables = {}
    monkeypatch.setattr(os, "environ", variables)
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    variables["XDG_CACHE_HOME"] = str(tmp_path / "home/.cache")  # can be made
    files.provide_caches()
    assert set(variables) == {"XDG_CACHE_HOME"}
    variables["XDG_CACHE_HOME"] = "/proc/nobody/.cache"  # cannot
    variables["MPLCONFIGDIR"] = "the user's"
    files.provide_caches()
    folder = Path(variables["NUMBA_CACHE_DIR"])
    assert folder == tmp_path / f"musicrl-cache-{os.getuid()}/numba"
    assert (
        folder.parent.stat().st_mode & 0o777 == 0o700 and variables["MPLCONFIGDIR"] == "the user's"
    )
    # A folder that others can write to, or a link, is not used: numba runs its content.
    folder.parent.chmod(0o777)
    for _ in range(2):
        del variables["NUMBA_CACHE_DIR"]
        files.provide_caches()
        other = Path(variables["NUMBA_CACHE_DIR"]).parent
        assert other != folder.parent and other.stat().st_mode & 0o777 == 0o700
        folder.parent.unlink() if folder.parent.is_symlink() else folder.parent.rmdir()
        folder.parent.symlink_to(tmp_path)


# Listens with librosa, in a process that may provide cache folders.
LISTEN = """
import sys
import numpy as np
from musicrl_jax.arena.audience import Audience
from musicrl_jax.arena.listeners import training_panel
if sys.argv[1] == "provided":
    Audience(training_panel(), None).check(16_000)
from musicrl_jax.arena import ears
ears.analyse(np.zeros(16_000, np.float32))
print("heard")
"""


@pytest.mark.slow
@pytest.mark.parametrize("provided", [True, False])
def test_listening_works_if_home_and_the_environment_are_read_only(tmp_path, provided):
    """As in a container that runs as nobody. Without a cache folder numba raises an error."""
    pytest.importorskip("librosa")
    environment = {
        k: v for k, v in os.environ.items() if k not in (*files.CACHES, "XDG_CACHE_HOME")
    }
    environment |= {"HOME": "/proc/nobody", "TMPDIR": str(tmp_path)}
    # Without a locator of folders beside librosa.
    locators = "UserProvidedCacheLocator,UserWideCacheLocator"
    environment["NUMBA_CACHE_LOCATOR_CLASSES"] = locators
    command = [sys.executable, "-c", LISTEN, "provided" if provided else ""]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ("heard" in done.stdout) == provided, done.stderr
    assert provided or "no locator available" in done.stderr
