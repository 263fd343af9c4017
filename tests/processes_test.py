"""Processes of tests have default signals and do not outlive their test."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import Processes, default_signals

# Prints a line once it runs.
SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]


@pytest.fixture
def ignored():
    """Ignores SIGINT, as `nohup` does."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_process_gets_a_signal_that_the_tests_ignore(ignored, processes):
    process = processes.start(SLEEP, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(20) in (-signal.SIGINT, 1)
    os.kill(os.getpid(), signal.SIGINT)  # the tests go on ignoring it


def test_handlers_of_other_signals_stay():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    default_signals()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(
    "command", ["sleep 60 & echo $!; wait", "setsid sleep 60 & echo $!"], ids=["group", "session"]
)
def test_no_process_outlives_its_test(command):
    with Processes() as processes:
        process = processes.start(["bash", "-c", command], stdout=subprocess.PIPE, text=True)
        child = int(process.stdout.readline())
        assert Path(f"/proc/{child}").exists()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}/environ").exists() and Path(f"/proc/{child}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "the child of a process outlives it"
        time.sleep(0.01)


def test_the_error_of_a_failed_command_ends_with_its_stderr(processes):
    with pytest.raises(AssertionError, match=r"ended with 3: .*words"):
        processes.run(["bash", "-c", "echo words >&2; exit 3"], check=True, capture_output=True)
    assert processes.run(["echo", "x"], capture_output=True).stdout == "x\n"
