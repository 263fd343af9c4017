"""Processes that tests start: with default signals, and ended in any case.

A run of the tests that `nohup`, cron or `&` of a script started ignores SIGINT, and a process inherits what its parent
ignores. What a test leaves running would keep ports, locks and processor time from the tests after it.
"""

import contextlib
import os
import signal
import subprocess
import time
import uuid
from pathlib import Path

MARK = "MUSICRL_TEST_PROCESSES"  # a variable by which what left its process group is known as well
RESET = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)


def default_signals() -> None:
    """Lets processes start with default signals where this one was started with some ignored or blocked.

    This one does nothing at them, as before. A handler, other than ignoring, is not inherited.
    """
    for number in RESET:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, RESET)


class Processes:
    """Starts processes, each the leader of a group. At the end of the `with` block all of them are gone."""

    def __init__(self) -> None:
        self._mark = uuid.uuid4().hex
        self._started: list[subprocess.Popen] = []

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def start(self, command: list, **settings) -> subprocess.Popen:
        """`subprocess.Popen`."""
        default_signals()
        environment = {**(settings.pop("env", None) or os.environ), MARK: self._mark}
        process = subprocess.Popen(command, env=environment, start_new_session=True, **settings)
        self._started.append(process)
        return process

    def run(self, command: list, check: bool = False, timeout: float | None = None, **settings):
        """`subprocess.run`; its output is text. AssertionError that ends with stderr where `check` fails."""
        if settings.pop("capture_output", False):
            settings |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = self.start(command, text=True, **settings)
        out, err = process.communicate(timeout=timeout)
        assert not check or process.returncode == 0, (
            f"{command} ended with {process.returncode}: {(err or '')[-3000:]}"
        )
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def end(self) -> None:
        """Kills what still runs: the groups of what was started, and what these started in other groups."""
        for process in self._started:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        self._started.clear()
        deadline = time.monotonic() + 10
        while left := self._marked():
            assert time.monotonic() < deadline, f"processes {left} do not end"
            for number in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            time.sleep(0.01)

    def _marked(self) -> list[int]:
        """Processes that run with the mark, by Linux's /proc."""
        mark, found = f"{MARK}={self._mark}".encode(), []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # another's, or gone
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found
