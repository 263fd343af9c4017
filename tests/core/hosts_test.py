"""A process that is alone: it joins, hears SIGTERM and does what the first of several would do."""

import inspect
import signal
import subprocess
import sys

import pytest

from musicrl_jax.core import hosts


def test_who_is_alone_is_the_first_and_waits_for_no_one():
    assert hosts.first()
    hosts.wait_for_all("nothing")

    @hosts.first_alone
    def work(a: int, b: int = 2) -> int:
        return a + b

    assert work(1) == 3 and list(inspect.signature(work).parameters) == ["a", "b"]
    with hosts.stopping_together() as told:
        assert not told()  # who has not joined is never told
    assert hosts.Preempted("told").code == hosts.AGAIN == 75


@pytest.mark.parametrize(
    ("work", "said"),
    [
        ("print('joined', flush=True)\ntime.sleep(60)", "told to stop"),
        (
            "with hosts.stopping_together() as told:\n"
            "    print('joined', flush=True)\n"
            "    while not told():\n"
            "        time.sleep(0.01)\n"
            "print('saved', flush=True)\n"
            "raise hosts.Preempted('saved step 3')",
            "saved",
        ),
    ],
    ids=["at once", "at the end of a step"],
)
def test_sigterm_ends_a_process_that_has_joined_with_75(work, said, processes):
    code = f"""
import time
from musicrl_jax.core import hosts
hosts.join()
try:
    exec({work!r})
except hosts.Preempted as stop:
    print(stop, flush=True)
    raise
"""
    process = processes.start([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline() == "joined\n"
        process.send_signal(signal.SIGTERM)
        assert said in process.stdout.read()
    assert process.returncode == hosts.AGAIN


def test_half_an_address_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(ValueError, match="JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID belong together"):
        hosts.join()


@pytest.mark.parametrize(
    ("processes", "message", "lost"),
    [(2, "peer closed", True), (1, "peer closed", False), (2, "RESOURCE_EXHAUSTED: no memory", False)],
)
def test_what_counts_as_a_lost_host(monkeypatch, processes, message, lost):
    monkeypatch.setattr(hosts.jax, "process_count", lambda: processes)
    assert hosts.lost(RuntimeError(message)) == lost
