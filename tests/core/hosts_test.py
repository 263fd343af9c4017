"""A process that is alone: it joins, hears SIGTERM and does what the first of several would do."""

import inspect
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from musicrl_jax.core import hosts


def test_who_is_alone_is_the_first_and_waits_for_no_one():
    assert hosts.first()
    hosts.wait_for_all("nothing")

    @hosts.first_alone
    def work(a: int, b: int = 2) -> int:
        return a + b

    assert work(1) == 3 and list(inspect.signature(work).parameters) == ["a", "b"]
    assert hosts.first_decides(lambda: True) is True and hosts.first_decides(lambda: False) is False
    with hosts.stopping_together() as stopping:
        assert not stopping()  # nobody told this process to stop
    assert hosts.Preempted("told").code == hosts.AGAIN == 75


PRELUDE = """
import gc, select, signal, time
from musicrl_jax.core import hosts
from musicrl_jax.core.progress import Progress
hosts.join()
"""
STEPS = """
with hosts.stopping_together() as stopping:
    print("ready", flush=True)
    for _ in Progress(range(10**6), "inner", 1):
        if stopping():
            break
        time.sleep(0.01)
print("saved", flush=True)
raise hosts.Preempted("saved step 3")
"""
ITEMS = """
print("ready", flush=True)
for _ in Progress(range(10**6), "items", 1):
    time.sleep(0.01)
"""
IN_A_CALLBACK = """
gc.callbacks.append(lambda *_: time.sleep(0.001))
print("ready", flush=True)
for _ in Progress(range(10**6), "items", 1):
    gc.collect(0)
"""
IN_A_COMPILATION = """
import ctypes
print("ready", flush=True)
while True:
    ctypes.CDLL(None).sleep(60)  # as a compilation, it lets no handler of Python's run
"""


def process_of(code, ignored=()):
    """A process of its own that has joined and is ready; started with signals ignored, as by nohup, cron and `&`."""
    ignore = "".join(
        f"import signal; signal.signal({int(number)}, signal.SIG_IGN)\n" for number in ignored
    )
    launch = "import os, sys; os.execv(sys.executable, [sys.executable, '-c', sys.argv[1]])"
    command = [sys.executable, "-c", ignore + launch, PRELUDE + code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


@pytest.mark.parametrize(
    "ignored", [(), (signal.SIGINT, signal.SIGHUP)], ids=["", "behind nohup and &"]
)
@pytest.mark.parametrize(
    ("code", "said"),
    [(STEPS, "saved\n"), (ITEMS, ""), (IN_A_CALLBACK, "")],
    ids=["a step ends", "an item ends", "a callback of the garbage collector is no matter"],
)
def test_sigterm_ends_a_process_that_has_joined_with_75(code, said, ignored):
    with process_of(code, ignored) as process:
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=60)
    assert out == said and "ignored" not in errors
    assert process.returncode == hosts.AGAIN


def test_a_second_sigterm_ends_a_process_at_once_where_no_python_runs():
    with process_of(IN_A_COMPILATION) as process:
        for _ in "12":
            time.sleep(0.2)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == -signal.SIGTERM


def test_a_stop_is_put_off_where_a_training_loop_saves(monkeypatch):
    monkeypatch.setattr(hosts, "_stop", threading.Event())
    hosts.stop_point()
    hosts._request_stop()
    assert hosts.stop_requested()
    with hosts.stopping_together() as stopping:
        hosts.stop_point()
        assert stopping()
        with hosts.stopping_together():
            pass
        hosts.stop_point()
    with pytest.raises(hosts.Preempted, match="told to stop"):
        hosts.stop_point()


@pytest.mark.parametrize("count", [None, "1"])
def test_a_lone_process_starts_no_coordination_service(monkeypatch, count):
    """Its heartbeat would end the process at a step of the wall clock, and there is nobody who waits for it."""
    monkeypatch.setattr(
        hosts.jax.distributed, "initialize", lambda *_, **__: pytest.fail("a service was started")
    )
    for name, value in zip(hosts.ADDRESS, ("localhost:1", count, "0"), strict=True):
        if count:
            monkeypatch.setenv(name, value)
    before = signal.getsignal(signal.SIGTERM)
    try:
        hosts.join()
        assert signal.getsignal(signal.SIGTERM) is hosts._request_stop
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_lone_process_that_was_stopped_for_a_while_goes_on():
    with process_of(ITEMS) as process:
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.0)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == hosts.AGAIN


class Store:
    """The coordination service's key-value store, in memory."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, allow_overwrite):
        assert allow_overwrite
        self.values[key] = value

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]


@pytest.fixture
def beats(monkeypatch):
    """(heartbeats of two hosts over one store, how this process would have ended)"""
    ends = []
    monkeypatch.setattr(hosts, "_stop", threading.Event())
    monkeypatch.setattr(hosts.distributed.global_state, "client", Store())
    monkeypatch.setattr(hosts.os, "_exit", ends.append)
    monkeypatch.setattr(hosts.atexit, "register", lambda _: None)
    return [hosts._Heartbeat(2, number) for number in range(2)], ends


def test_a_silent_host_is_lost_after_a_minute_of_own_heartbeats(beats):
    (one, other), ends = beats
    for _ in range(100):
        one._beat()
        one._leave_if_lost()
        other._beat()
    assert not ends
    for _ in range(hosts.LOST_TICKS - 1):
        one._beat()
        one._leave_if_lost()
    assert not ends
    one._beat()
    one._beat()
    one._leave_if_lost()
    assert ends == [hosts.LOST] and hosts.LOST_TICKS * hosts.TICK_SECONDS == 60


def test_all_hosts_hear_of_a_stop_and_leave_with_75_once_one_has_left(beats, monkeypatch):
    (one, other), ends = beats
    hosts._request_stop()
    other._beat()
    hosts._stop.clear()
    one._beat()
    assert hosts.stop_requested()
    for _ in range(hosts.LEFT_TICKS + 1):
        one._beat()
    monkeypatch.setattr(hosts, "_saving", True)
    one._leave_if_lost()
    assert not ends  # a training loop saves first
    monkeypatch.setattr(hosts, "_saving", False)
    one._leave_if_lost()
    assert ends == [hosts.AGAIN]


def test_half_an_address_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(
        ValueError,
        match="JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID belong together",
    ):
        hosts.join()


@pytest.mark.parametrize(
    ("processes", "message", "lost"),
    [
        (2, "peer closed", True),
        (1, "peer closed", False),
        (2, "RESOURCE_EXHAUSTED: no memory", False),
    ],
)
def test_what_counts_as_a_lost_host(monkeypatch, processes, message, lost):
    monkeypatch.setattr(hosts.jax, "process_count", lambda: processes)
    assert hosts.is_lost_host(RuntimeError(message)) == lost


FAKETIME = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), None)
WAITS = """
print("ready", flush=True)
for _ in Progress(range(10**6), "items", 1):
    time.sleep(0.05)
"""
STEPS_TOGETHER = """
import jax
print("ready", flush=True)
with hosts.stopping_together() as stopping:
    while not stopping():
        time.sleep(0.05)
hosts.wait_for_all("saved")
raise hosts.Preempted("saved")
"""
FIRST_ALONE = """
import jax

@hosts.first_alone
def work():
    for _ in Progress(range(10**6), "items", 1):
        time.sleep(0.05)

print("ready", flush=True)
work()
"""


def processes_of(code, count, folder, environment=None):
    """So many processes of one run that have met, or one that is alone; what they say lies in folder/NUMBER."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    started = []
    for number in range(count):
        who = (
            dict(zip(hosts.ADDRESS, (address, f"{count}", f"{number}"), strict=True))
            if count > 1
            else {}
        )
        with (folder / f"{number}").open("w") as file:
            command = [sys.executable, "-c", PRELUDE + code]
            settings = {**os.environ, **(environment or {}), **who}
            started.append(
                subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=settings)
            )
    deadline = time.monotonic() + 120
    while not all("ready" in (folder / f"{number}").read_text() for number in range(count)):
        assert time.monotonic() < deadline and not any(process.poll() for process in started), said(
            folder
        )
        time.sleep(0.05)
    return started


def said(folder):
    return "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("[0-9]")))


def ended(processes, seconds):
    """Their exit statuses; those that are still there after so many seconds are killed."""
    deadline = time.monotonic() + seconds
    try:
        return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.slow
@pytest.mark.skipif(FAKETIME is None, reason="needs libfaketime: apt-get install libfaketime")
@pytest.mark.parametrize(
    ("code", "count"), [(WAITS, 1), (STEPS_TOGETHER, 2)], ids=["alone", "two hosts"]
)
def test_a_step_of_the_wall_clock_ends_no_run(tmp_path, code, count):
    clock = tmp_path / "clock"
    clock.write_text("+0")
    faked = {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_NO_CACHE": "1",
    }
    code = code.replace(
        "time.sleep(", "select.select([], [], [], "
    )  # libfaketime breaks the former
    processes = processes_of(code, count, tmp_path, faked)
    for step in ("-3600", "+60", "+3600", "+315360000", "+0"):
        (tmp_path / "next").write_text(step)
        (tmp_path / "next").rename(clock)
        time.sleep(3 * hosts.TICK_SECONDS)
        assert not any(process.poll() for process in processes), (step, said(tmp_path))
    processes[-1].send_signal(signal.SIGTERM)
    assert ended(processes, 30) == [hosts.AGAIN] * count, said(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
@pytest.mark.parametrize(
    "code", [STEPS_TOGETHER, FIRST_ALONE, WAITS], ids=["steps", "work of the first", "loops"]
)
def test_two_hosts_stop_together_whichever_is_told(tmp_path, code, told):
    processes = processes_of(code, 2, tmp_path)
    time.sleep(1)
    processes[told].send_signal(signal.SIGTERM)
    assert ended(processes, 30) == [hosts.AGAIN] * 2, said(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("gone", [0, 1])
def test_a_host_that_is_lost_ends_the_other_within_about_a_minute(tmp_path, gone):
    processes = processes_of(STEPS_TOGETHER, 2, tmp_path)
    processes[gone].kill()
    status = ended(processes, 90)[1 - gone]
    assert status in (hosts.LOST, -signal.SIGABRT), said(
        tmp_path
    )  # ours, or JAX's own where the first is gone


@pytest.mark.slow
def test_whoever_is_done_first_waits_for_the_others(tmp_path):
    code = 'import jax\nprint("ready", flush=True)\ntime.sleep(8 * jax.process_index())\nprint("done", flush=True)\n'
    processes = processes_of(code, 2, tmp_path)
    assert ended(processes, 60) == [0, 0], said(tmp_path)
    assert said(tmp_path).count("done") == 2
