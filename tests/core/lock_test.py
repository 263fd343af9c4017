"""Of several processes one writes in a folder; a dead one leaves it to the next."""

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
# Starts at once where the file is there, so that imports do not part the starts; many rounds, one line each.
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


def holder(folder, seconds=60.0):
    command = [sys.executable, "-c", HOLD, str(folder), f"{seconds}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_second_process_is_refused_with_who_the_first_is(tmp_path):
    folder = tmp_path / "run"
    before = lock._now()
    with holder(folder) as process:
        try:
            assert process.stdout.readline() == "held\n"
            refused = rf"{folder} is in use by process {process.pid} on host .*, since (.* UTC): wait for it, end it"
            with pytest.raises(ValueError, match=refused) as error, lock.locked(folder):
                pass
            assert before <= str(error.value).split("since ")[1][: len(before)] <= lock._now()
            with (
                lock.locked(folder, "another"),
                lock.locked(tmp_path),
            ):  # other things are others' locks
                pass
        finally:
            process.kill()
    with lock.locked(folder):  # of one that was killed
        assert json.loads((folder / ".musicrl.lock.json").read_text())["process"] == os.getpid()
    assert not list(folder.iterdir())


def test_the_lock_is_released_whatever_ends_the_work(tmp_path):
    for error in (hosts.Preempted("told"), ValueError("wrong"), KeyboardInterrupt()):
        with pytest.raises(type(error)), lock.locked(tmp_path):
            raise error
        assert not list(tmp_path.iterdir())


def test_work_that_wrote_nothing_leaves_no_folder(tmp_path):
    """A verb refuses bad settings inside its lock."""
    with pytest.raises(ZeroDivisionError), lock.locked(tmp_path / "runs/votes"):
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())
    (tmp_path / "there").mkdir()
    with lock.locked(tmp_path / "there"), lock.locked(tmp_path / "runs/votes"):
        (tmp_path / "runs/votes/file").touch()
    assert (tmp_path / "there").exists() and (tmp_path / "runs/votes/file").exists()


def test_a_lock_of_a_recycled_process_number_is_taken_over(tmp_path):
    with lock.locked(tmp_path):
        marker, about = ((tmp_path / f".musicrl.lock{end}").read_text() for end in ("", ".json"))
    start = next(line for line in marker.splitlines() if line.startswith("start="))
    earlier = marker.replace(
        start, f"start={int(start[6:]) - 1}"
    )  # this process's number, an earlier start
    (tmp_path / ".musicrl.lock").write_text(earlier)
    (tmp_path / ".musicrl.lock.json").write_text(about)
    with lock.locked(tmp_path):
        pass


@pytest.mark.parametrize("alive", [True, False])
def test_of_a_process_on_another_host_a_touch_is_waited_for(tmp_path, monkeypatch, capsys, alive):
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.4)
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.05)
    path = tmp_path / ".musicrl.lock"
    owner = filelock.SoftFileLease(
        path, lease_duration=0.4, heartbeat_interval=0.1 if alive else 0.39
    )
    owner.acquire()
    path.write_text(path.read_text().replace("host=", "host=far-"))
    about = {"machine": "far", "host": "far", "process": os.getpid(), "since": "yesterday"}
    (tmp_path / ".musicrl.lock.json").write_text(json.dumps(about))
    if not alive:
        owner._stop_heartbeat()
    if alive:
        with (
            pytest.raises(ValueError, match=r"in use by process \d+ on host far, since yesterday"),
            lock.locked(tmp_path),
        ):
            pass
        owner.release()
    else:
        with lock.locked(tmp_path):
            assert (
                json.loads((tmp_path / ".musicrl.lock.json").read_text())["process"] == os.getpid()
            )
    assert f"locked by process {os.getpid()} on host far" in capsys.readouterr().out


def test_two_starts_at_one_moment_never_both_win(tmp_path):
    """In odd rounds a lock of a dead process is there, which all want to take over."""
    rounds, starters = 20, 3
    with holder(tmp_path / "dead") as process:
        assert process.stdout.readline() == "held\n"
        process.kill()
    stale = [path.name for path in (tmp_path / "dead").iterdir()]
    command = [sys.executable, "-c", RACE, str(tmp_path), f"{rounds}"]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(starters)]
    try:
        for number in range(rounds):
            until(tmp_path, f"ready-{number}-*", starters)
            prepared = tmp_path / f"prepared-{number}"
            prepared.mkdir()
            for name in stale if number % 2 else ():
                (prepared / name).write_bytes((tmp_path / "dead" / name).read_bytes())
            prepared.rename(tmp_path / f"{number}")
            until(tmp_path, f"done-{number}-*", starters - 1)  # the refused
            (tmp_path / f"over-{number}").touch()
        winners = "".join(racer.communicate(timeout=30)[0] for racer in racers).split()
    finally:
        for racer in racers:
            racer.kill()
    assert sorted(map(int, winners)) == list(range(rounds))


def until(folder, pattern, count):
    deadline = time.monotonic() + 30
    while len(list(folder.glob(pattern))) < count:
        assert time.monotonic() < deadline, pattern
        time.sleep(0.001)


def test_whoever_was_stopped_while_another_took_over_ends(tmp_path):
    code = "from musicrl_jax.core import lock; lock.LEASE_SECONDS = 0.4\n" + HOLD
    command = [sys.executable, "-c", code, str(tmp_path), "60"]
    errors = {"stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, stdout=subprocess.PIPE, **errors) as process:
        try:
            assert process.stdout.readline() == "held\n"
            process.send_signal(signal.SIGSTOP)
            lease = filelock.SoftFileLease(tmp_path / ".musicrl.lock", lease_duration=0.4)
            lease.acquire(timeout=10)
            process.send_signal(signal.SIGCONT)
            assert process.wait(timeout=10) == 1
            assert "was taken over by" in process.stderr.read()
        finally:
            process.kill()
            lease.release()


def test_a_folder_that_cannot_be_written_to_needs_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock.os, "access", lambda *_: False)
    with lock.locked(tmp_path):
        assert not list(tmp_path.iterdir())


def test_a_verb_locks_what_it_writes_and_keeps_its_signature(tmp_path):
    seen = []

    def verb(out: str, count: int = 2) -> int:
        seen.append(sorted(path.name for path in tmp_path.rglob("*.lock")))
        return count

    folder = str(tmp_path / "folder")
    held = lock.holds("out")(verb)
    assert held(folder) == 2 and inspect.signature(held) == inspect.signature(verb)
    lock.holds("out", beside=True)(verb)(out=f"{folder}/model")
    assert seen == [[".musicrl.lock"], [".model.lock"]]
