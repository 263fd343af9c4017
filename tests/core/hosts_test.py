"""A process joins, stops at SIGTERM, and does what the first of several hosts does."""

import inspect
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from musicrl_jax.core import hosts


def test_a_lone_process_is_the_first_host_and_waits_for_no_other():
    assert hosts.first()
    hosts.wait_for_all("nothing")

    @hosts.first_alone
    def work(a: int, b: int = 2) -> int:
        return a + b

    # gin reads the signature.
    assert work(1) == 3 and list(inspect.signature(work).parameters) == ["a", "b"]
    for answer in (True, False, 7):
        assert hosts.first_decides(lambda answer=answer: answer) == answer
    with hosts.stopping_together() as stopping:
        assert not stopping()
    assert hosts.Preempted("words").code == hosts.AGAIN == 75


# --- Code of the processes that tests start; each prints "ready". ---

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
IN_C = """
import ctypes
print("ready", flush=True)
while True:
    ctypes.CDLL(None).sleep(60)  # like a compilation, it lets no Python handler run
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


# --- A lone process. ---


def start_alone(processes, code, ignored):
    """Starts a process that joins, with some signals ignored, as by nohup, cron and `&`."""
    ignore = "".join(
        f"import signal; signal.signal({int(number)}, signal.SIG_IGN)\n" for number in ignored
    )
    launch = "import os, sys; os.execv(sys.executable, [sys.executable, '-c', sys.argv[1]])"
    command = [sys.executable, "-c", ignore + launch, PRELUDE + code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return processes.start(command, text=True, **pipes)


def test_sigterm_ends_a_joined_process_with_75(processes):
    """After a step of a training loop, after an item, behind nohup, and in a callback of gc.

    Also after the process was paused, and at once, by the second SIGTERM, where no Python runs.
    """
    background = (signal.SIGINT, signal.SIGHUP)
    cases = {STEPS: background, ITEMS: background, IN_A_CALLBACK: (), IN_C: ()}
    workers = {code: start_alone(processes, code, ignored) for code, ignored in cases.items()}
    for worker in workers.values():
        assert worker.stdout.readline() == "ready\n", worker.stderr.read()
    # One is paused.
    workers[ITEMS].send_signal(signal.SIGSTOP)
    time.sleep(1.0)
    workers[ITEMS].send_signal(signal.SIGCONT)
    time.sleep(0.2)
    # All get SIGTERM.
    for worker in workers.values():
        assert worker.poll() is None
        worker.send_signal(signal.SIGTERM)
    for code, words in ((STEPS, "saved\n"), (ITEMS, ""), (IN_A_CALLBACK, "")):
        out, errors = workers[code].communicate(timeout=60)
        assert out == words and "ignored" not in errors
        assert workers[code].returncode == hosts.AGAIN
    # The last one, in which no Python runs, gets a second.
    time.sleep(0.2)
    assert workers[IN_C].poll() is None
    workers[IN_C].send_signal(signal.SIGTERM)
    assert workers[IN_C].wait(timeout=10) == -signal.SIGTERM


def test_stop_point_does_not_raise_inside_a_training_loop(monkeypatch):
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
    with pytest.raises(hosts.Preempted, match="the same command resumes"):
        hosts.stop_point()


@pytest.mark.parametrize("count", [None, "1"])
def test_a_lone_process_starts_no_coordination_service(monkeypatch, count):
    """The service's heartbeat would end the process at a step of the wall clock."""
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


# --- Heartbeats. ---


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
    """Returns the heartbeats of two hosts with one store, and the exit statuses of this process."""
    ends = []
    monkeypatch.setattr(hosts, "_stop", threading.Event())
    monkeypatch.setattr(hosts.distributed.global_state, "client", Store())
    monkeypatch.setattr(hosts.os, "_exit", ends.append)
    monkeypatch.setattr(hosts.atexit, "register", lambda _: None)
    return [hosts._Heartbeat(2, number) for number in range(2)], ends


def test_a_silent_host_is_lost_after_a_minute_of_own_heartbeats(beats):
    (one, other), ends = beats
    # Both beat.
    for _ in range(100):
        one._beat()
        one._leave_if_lost()
        other._beat()
    assert not ends
    # One beats alone.
    for _ in range(hosts.LOST_TICKS - 1):
        one._beat()
        one._leave_if_lost()
    assert not ends
    one._beat()
    one._beat()
    one._leave_if_lost()
    assert ends == [hosts.LOST] and hosts.LOST_TICKS * hosts.TICK_SECONDS == 60


def test_a_stop_reaches_all_hosts_which_leave_with_75_once_one_has_left(beats, monkeypatch):
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
def test_errors_of_several_hosts_but_for_memory_mean_a_lost_host(
    monkeypatch, processes, message, lost
):
    monkeypatch.setattr(hosts.jax, "process_count", lambda: processes)
    assert hosts.is_lost_host(RuntimeError(message)) == lost


# --- Several processes. ---

FAKETIME = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), None)


def start_hosts(processes, code, count, folder, environment=None):
    """Starts `count` hosts of one run and waits until they have met."""
    command = [sys.executable, "-c", PRELUDE + code]
    workers = processes.start_hosts(command, folder, count, environment)
    deadline = time.monotonic() + 120
    while output(folder).count("ready") < count:
        assert time.monotonic() < deadline, output(folder)
        assert not any(worker.poll() for worker in workers), output(folder)
        time.sleep(0.05)
    return workers


def output(folder):
    return "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("log-*")))


@pytest.mark.slow
@pytest.mark.skipif(FAKETIME is None, reason="needs libfaketime: apt-get install libfaketime")
@pytest.mark.parametrize(
    ("code", "count"), [(ITEMS, 1), (STEPS_TOGETHER, 2)], ids=["alone", "two hosts"]
)
def test_a_step_of_the_wall_clock_ends_no_run(processes, tmp_path, code, count):
    clock = tmp_path / "clock"
    clock.write_text("+0")
    faked = {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_NO_CACHE": "1",
    }
    # libfaketime breaks time.sleep.
    code = code.replace("time.sleep(", "select.select([], [], [], ")
    workers = start_hosts(processes, code, count, tmp_path, faked)
    for step in ("-3600", "+60", "+3600", "+315360000", "+0"):
        (tmp_path / "next").write_text(step)
        (tmp_path / "next").rename(clock)
        time.sleep(3 * hosts.TICK_SECONDS)
        assert not any(worker.poll() for worker in workers), (step, output(tmp_path))
    workers[-1].send_signal(signal.SIGTERM)
    assert processes.wait(workers, 30) == [hosts.AGAIN] * count, output(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    "code", [STEPS_TOGETHER, FIRST_ALONE, ITEMS], ids=["steps", "work of the first", "loops"]
)
def test_two_hosts_stop_together_at_sigterm_to_either(processes, tmp_path, code, number):
    workers = start_hosts(processes, code, 2, tmp_path)
    time.sleep(1)
    workers[number].send_signal(signal.SIGTERM)
    assert processes.wait(workers, 30) == [hosts.AGAIN] * 2, output(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_host_that_is_lost_ends_the_other_within_about_a_minute(processes, tmp_path, number):
    workers = start_hosts(processes, STEPS_TOGETHER, 2, tmp_path)
    workers[number].kill()
    status = processes.wait(workers, 90)[1 - number]
    # JAX's own abort if the first host is lost.
    assert status in (hosts.LOST, -signal.SIGABRT), output(tmp_path)


@pytest.mark.slow
def test_a_finished_host_waits_for_the_others(processes, tmp_path):
    code = """
import jax
print("ready", flush=True)
time.sleep(8 * jax.process_index())
print("done", flush=True)
"""
    workers = start_hosts(processes, code, 2, tmp_path)
    assert processes.wait(workers, 60) == [0, 0], output(tmp_path)
    assert output(tmp_path).count("done") == 2
