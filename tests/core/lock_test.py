"""One process at a time writes in a folder, and a dead one's lock is taken over."""

import contextlib
import inspect
import json
import os
import signal
import subprocess
import sys
import time

import filelock
import pytest

from musicrl_jax.core import hosts, lock

HOLD = """
import sys, time
from musicrl_jax.core import lock
try:
    with lock.locked(sys.argv[1]):
        print("held", flush=True)
        time.sleep(float(sys.argv[2]))
except ValueError as error:
    print(error, flush=True)
"""
# Waits for the folder of a round, so that all start at once, and prints the rounds that it wins.
RACE = """
import os, sys, time
from pathlib import Path
from musicrl_jax.core import lock
lock.POLL_SECONDS = 0.02
folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
for round in range(rounds):
    here = folder / f"{round}"
    (folder / f"ready-{round}-{os.getpid()}").touch()
    while not here.exists():
        time.sleep(0.0005)
    try:
        with lock.locked(here):
            print(round, flush=True)
            while not (folder / f"over-{round}").exists():
                time.sleep(0.0005)
    except ValueError:
        pass
    (folder / f"done-{round}-{os.getpid()}").touch()
"""


@contextlib.contextmanager
def holder(folder, code=HOLD):
    """Starts a process that holds the lock, and kills it at the end."""
    command = [sys.executable, "-c", code, str(folder), "60"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def current_holder(folder):
    return json.loads((folder / ".musicrl.lock.json").read_text())


# --- Two processes. ---


def test_a_second_process_is_refused_and_the_first_is_named(tmp_path):
    folder = tmp_path / "run"
    before = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    with holder(folder) as process:
        words = (
            rf"{folder} is in use by process {process.pid} on host .*, since (.* UTC): wait for "
            "it, end it"
        )
        with pytest.raises(ValueError, match=words), lock.locked(folder):
            pass
        after = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        assert before <= current_holder(folder)["since"] <= after
        # Locks of other names and folders are free.
        with lock.locked(folder, "another"), lock.locked(tmp_path):
            pass
    with lock.locked(folder):  # the holder was killed
        assert current_holder(folder)["process"] == os.getpid()
    assert not list(folder.iterdir())


# --- Release. ---


def test_the_lock_is_released_whatever_ends_the_work(tmp_path):
    for error in (hosts.Preempted("words"), ValueError("wrong"), KeyboardInterrupt()):
        with pytest.raises(type(error)), lock.locked(tmp_path):
            raise error
        assert not list(tmp_path.iterdir())


def test_a_folder_without_files_is_removed(tmp_path):
    """A verb refuses bad settings inside its lock."""
    with pytest.raises(ZeroDivisionError), lock.locked(tmp_path / "runs/votes"):
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())
    (tmp_path / "there").mkdir()
    with lock.locked(tmp_path / "there"), lock.locked(tmp_path / "runs/votes"):
        (tmp_path / "runs/votes/file").touch()
    assert (tmp_path / "there").exists() and (tmp_path / "runs/votes/file").exists()


# --- Taking over. ---


def test_a_lock_of_a_recycled_process_number_is_taken_over(tmp_path):
    with lock.locked(tmp_path):
        marker, holder_file = (
            (tmp_path / f".musicrl.lock{end}").read_text() for end in ("", ".json")
        )
    # This process's number, with an earlier start.
    start = next(line for line in marker.splitlines() if line.startswith("start="))
    earlier = marker.replace(start, f"start={int(start[6:]) - 1}")
    (tmp_path / ".musicrl.lock").write_text(earlier)
    (tmp_path / ".musicrl.lock.json").write_text(holder_file)
    with lock.locked(tmp_path):
        pass


@pytest.mark.parametrize("alive", [True, False])
def test_another_hosts_lock_is_taken_over_only_without_touches(
    tmp_path, monkeypatch, capsys, alive
):
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.4)
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.05)
    path = tmp_path / ".musicrl.lock"
    owner = filelock.SoftFileLease(
        path, lease_duration=0.4, heartbeat_interval=0.1 if alive else 0.39
    )
    owner.acquire()
    path.write_text(path.read_text().replace("host=", "host=far-"))
    content = {"machine": "far", "host": "far", "process": os.getpid(), "since": "yesterday"}
    (tmp_path / ".musicrl.lock.json").write_text(json.dumps(content))
    if alive:
        words = r"in use by process \d+ on host far, since yesterday"
        with pytest.raises(ValueError, match=words), lock.locked(tmp_path):
            pass
        owner.release()
    else:
        owner._stop_heartbeat()
        with lock.locked(tmp_path):
            assert current_holder(tmp_path)["machine"] != "far"
    assert f"locked by process {os.getpid()} on host far" in capsys.readouterr().out


def test_of_processes_that_start_at_once_one_gets_the_lock(tmp_path, processes):
    """In odd rounds all of them want to take over the lock of a dead process."""
    rounds, starters = 20, 3
    with holder(tmp_path / "dead"):
        pass
    stale = [path.name for path in (tmp_path / "dead").iterdir()]
    command = [sys.executable, "-c", RACE, str(tmp_path), f"{rounds}"]
    pipe = subprocess.PIPE
    racers = [processes.start(command, stdout=pipe, text=True) for _ in range(starters)]
    for number in range(rounds):
        # The folder of a round appears with its files, once all are ready.
        until(tmp_path, f"ready-{number}-*", starters)
        prepared = tmp_path / f"prepared-{number}"
        prepared.mkdir()
        for name in stale if number % 2 else ():
            (prepared / name).write_bytes((tmp_path / "dead" / name).read_bytes())
        prepared.rename(tmp_path / f"{number}")
        # All but the winner are refused.
        until(tmp_path, f"done-{number}-*", starters - 1)
        (tmp_path / f"over-{number}").touch()
    winners = "".join(racer.communicate(timeout=30)[0] for racer in racers).split()
    assert sorted(map(int, winners)) == list(range(rounds))


def until(folder, pattern, count):
    deadline = time.monotonic() + 30
    while len(list(folder.glob(pattern))) < count:
        assert time.monotonic() < deadline, pattern
        time.sleep(0.001)


def test_a_paused_process_ends_after_another_has_taken_over(tmp_path):
    code = "from musicrl_jax.core import lock; lock.LEASE_SECONDS = 0.4\n" + HOLD
    with holder(tmp_path, code) as process:
        process.send_signal(signal.SIGSTOP)
        lease = filelock.SoftFileLease(tmp_path / ".musicrl.lock", lease_duration=0.4)
        with lease.acquire(timeout=10):
            process.send_signal(signal.SIGCONT)
            assert process.wait(timeout=10) == 1
            assert "was taken over by" in process.stderr.read()


# --- Folders and verbs. ---


def test_a_folder_that_cannot_be_written_to_needs_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock.os, "access", lambda *_: False)
    with lock.locked(tmp_path):
        assert not list(tmp_path.iterdir())


def test_a_verb_locks_its_folder_and_keeps_its_signature(tmp_path):
    locks = []

    def verb(out: str, count: int = 2) -> int:
        locks.append(sorted(path.name for path in tmp_path.rglob("*.lock")))
        return count

    folder = str(tmp_path / "folder")
    locked_verb = lock.holds("out")(verb)
    assert locked_verb(folder) == 2 and inspect.signature(locked_verb) == inspect.signature(verb)
    lock.holds("out", beside=True)(verb)(out=f"{folder}/model")
    assert locks == [[".musicrl.lock"], [".model.lock"]]
