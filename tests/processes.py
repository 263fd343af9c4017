"""Starts processes for tests with default signals, and ends them in any case.

Tests that `nohup`, cron or a script's `&` started ignore SIGINT, and their processes would inherit
that. A process that outlives its test would keep ports, locks and processor time.
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
import uuid
from pathlib import Path

# An environment variable that identifies processes which have left their process group.
MARK = "MUSICRL_TEST_PROCESSES"
RESET = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)


def default_signals() -> None:
    """Lets processes start with default signals although this one ignores or blocks some.

    A child inherits ignored signals but no handlers, so handlers without effect replace them here.
    """
    for number in RESET:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, RESET)


class Processes:
    """Starts processes, each in its own group. The end of the `with` block kills all of them."""

    def __init__(self) -> None:
        self._mark = uuid.uuid4().hex
        self._started: list[subprocess.Popen] = []

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def start(self, command: list, **settings) -> subprocess.Popen:
        """Starts a process as `subprocess.Popen` does."""
        default_signals()
        environment = {**(settings.pop("env", None) or os.environ), MARK: self._mark}
        process = subprocess.Popen(command, env=environment, start_new_session=True, **settings)
        self._started.append(process)
        return process

    def start_hosts(
        self, command: list, folder: Path, count: int, env: dict[str, str] | None = None
    ) -> list[subprocess.Popen]:
        """Starts `count` hosts of one run. Host i appends its output to folder/log-i.txt."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        started = []
        for number in range(count):
            settings = {**os.environ, **(env or {}), "JAX_COORDINATOR_ADDRESS": address}
            settings |= {"JAX_NUM_PROCESSES": f"{count}", "JAX_PROCESS_ID": f"{number}"}
            with (folder / f"log-{number}.txt").open("a") as log:
                started.append(
                    self.start(command, env=settings, stdout=log, stderr=subprocess.STDOUT)
                )
        return started

    def run(self, command: list, check: bool = False, timeout: float | None = None, **settings):
        """Runs a process as `subprocess.run` does, with text as output.

        Raises AssertionError, which ends with stderr, if `check` fails.
        """
        if settings.pop("capture_output", False):
            settings |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = self.start(command, text=True, **settings)
        out, err = process.communicate(timeout=timeout)
        assert not check or process.returncode == 0, (
            f"{command} ended with {process.returncode}: {(err or '')[-3000:]}"
        )
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def wait(self, started: list[subprocess.Popen], seconds: float) -> list[int]:
        """Returns the exit statuses. Raises TimeoutExpired if a process runs any longer."""
        deadline = time.monotonic() + seconds
        return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in started]

    def end(self) -> None:
        """Kills the processes that still run, and those that they started in any group."""
        for process in self._started:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        self._started.clear()
        deadline = time.monotonic() + 10
        while numbers := self._marked():
            assert time.monotonic() < deadline, f"processes {numbers} do not end"
            for number in numbers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            time.sleep(0.01)

    def _marked(self) -> list[int]:
        """Returns the numbers of processes that run with the mark, from Linux's /proc."""
        mark, numbers = f"{MARK}={self._mark}".encode(), []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # another user's process, or an ended one
                if mark in path.read_bytes().split(b"\0"):
                    numbers.append(int(path.parent.name))
        return numbers
