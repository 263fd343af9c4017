"""The processes of a run, one per host: they meet, stop together, and the first may work alone.

SIGTERM only sets a flag. Training loops check it through `stopping_together`, save and leave. Other
loops check it through `core.progress.Progress` or `stop_point`, which raise Preempted from ordinary
code. A second SIGTERM ends the process at once. A process that does not `join` has default signals.
"""

import atexit
import ctypes
import functools
import inspect
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn, ParamSpec, TypeVar

import jax
import numpy as np

# JAX's cluster detection and key-value store have no public names.
from jax._src import clusters, distributed
from jax.experimental import multihost_utils

# --- Exit statuses. ---
AGAIN = 75  # EX_TEMPFAIL: the run saved its state and wants to be started again
LOST = 134  # another host is gone; JAX itself ends with the same status

# --- Heartbeats, by which the hosts notice a stop and the loss of a host. ---
TICK_SECONDS = 2.0  # between two heartbeats
LOST_TICKS = 30  # own heartbeats without one of another host, after which that host counts as lost
LEFT_TICKS = 5  # the same after a stop was requested: that host has left, and nobody will save
ALIVE = "musicrl/alive/"  # prefix of the heartbeats' keys
STOP, END = "stop", "end"  # words in the heartbeat of a host that got SIGTERM, and in its last one

# --- Time limits in seconds. ---
NO_HEARTBEAT_SECONDS = 2**31 - 1  # turns off the heartbeats of JAX's coordination service
SHUTDOWN_SECONDS = 60  # the first host waits so long for the others to end
STOPPED_SECONDS = 15  # the same after a stop: the others leave LEFT_TICKS later at the latest
CLOSING_SECONDS = 3  # then, for the others to close their clients, which no message can tell
BARRIER_SECONDS = 600
POLL_SECONDS = 0.2
HANDLER_SECONDS = 10.0  # JAX sets its handler of SIGTERM in a thread, soon after `initialize`

ADDRESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
STOP_MESSAGE = "stopped; finished work is saved, and the same command resumes the run"
SA_RESETHAND = 0x80000000 - 2**32  # a flag of `struct sigaction`, as a C int

P = ParamSpec("P")
T = TypeVar("T")


class Preempted(SystemExit):
    """Raised when the run got SIGTERM. Its state is saved, and the same command resumes it."""

    def __init__(self, message: str):
        super().__init__(AGAIN)
        self.message = message

    def __str__(self) -> str:
        return self.message


_stop = threading.Event()  # set once this host or another one of the run got SIGTERM
_saving = False  # whether this process is inside `stopping_together`
# JAX's handler of SIGTERM, which agrees with the other hosts on a step.
_jax_handler: Callable[[int], None] | None = None
# Counters that are equal on all hosts, because the hosts make these calls in one order.
_steps, _barriers, _turns = itertools.count(), itertools.count(), itertools.count()
_alone = False  # whether this process is inside a function of `first_alone`

# --- Meeting the other hosts, and SIGTERM. ---


def join() -> None:
    """Connects the processes of this run, and makes SIGTERM set a flag from here on.

    On a TPU slice, in Slurm and in a GKE job JAX detects the processes. Elsewhere set
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Without these variables the
    process is alone and starts no coordination service, since nobody waits for its heartbeats.

    Raises ValueError if some of the three variables are set and others are not.
    """
    global _jax_handler
    # Who the processes are.
    values = [os.environ.get(name) for name in ADDRESS]
    if any(values) and not all(values):
        raise ValueError(
            f"{', '.join(ADDRESS)} belong together: set all three or none, not {values}"
        )
    if all(values):
        address, count, number = values[0], int(values[1]), int(values[2])
    else:
        detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
        address, count, number, _ = detect(None, None, None, None, None, 300)

    # JAX's coordination service counts heartbeats by the wall clock. If that clock is set back, the
    # service takes all hosts for lost, whatever the limit is. With "recoverable" hosts it ends none
    # of them; `_Heartbeat` ends them, by its own clock.
    if (count or 1) > 1:
        jax.config.update("jax_enable_recoverability", True)
        before = _c_handler()
        jax.distributed.initialize(
            *((address, count, number) if all(values) else ()),
            heartbeat_timeout_seconds=NO_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
        _jax_handler = _await_jax_handler(before)
        _Heartbeat(count, number).start()

    # SIGTERM.
    signal.signal(signal.SIGTERM, _request_stop)
    _end_at_second_signal()


def _request_stop(*_: object) -> None:
    _stop.set()
    _forward_to_jax()


def _forward_to_jax() -> None:
    """Makes JAX agree on a step with the other hosts, if a training loop runs.

    Elsewhere the hosts count no steps: JAX's thread would wait for them, and this process for it.
    """
    if _jax_handler is not None and _saving and _stop.is_set():
        _jax_handler(signal.SIGTERM)


class _SigAction(ctypes.Structure):
    """`struct sigaction` of the C library on 64-bit Linux."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_char * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


def _sigaction(new: _SigAction | None = None) -> _SigAction:
    """Returns how the C library handles SIGTERM, and sets `new` if given.

    Python's `signal` module sees only Python's own handlers.
    """
    old = _SigAction()
    if ctypes.CDLL(None).sigaction(
        signal.SIGTERM, None if new is None else ctypes.byref(new), ctypes.byref(old)
    ):
        raise OSError("SIGTERM's handler cannot be read")
    return old


def _c_handler() -> int | None:
    return _sigaction().handler if sys.platform == "linux" else None


def _await_jax_handler(before: int | None) -> Callable[[int], None] | None:
    """Waits until JAX has replaced the handler `before`, and returns JAX's handler of SIGTERM.

    Returns None if JAX's preemption service is turned off.
    """
    if distributed.global_state.preemption_sync_manager is None:
        return None
    deadline = time.monotonic() + HANDLER_SECONDS
    while (handler := _c_handler()) == before:
        if time.monotonic() > deadline:
            raise OSError(
                "JAX does not handle SIGTERM, so hosts could not stop together: check jax's version"
            )
        time.sleep(0.01)
    return ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)


def _end_at_second_signal() -> None:
    """Gives the second SIGTERM its default action, which ends the process.

    This is set in the C library, because Python's own handlers wait for the end of a compilation.
    """
    if sys.platform == "linux":
        action = _sigaction()
        action.flags |= SA_RESETHAND
        _sigaction(action)


# --- Stopping. ---


def stop_requested() -> bool:
    """Returns whether this run got SIGTERM, on this host or, a few seconds ago, on another."""
    return _stop.is_set()


def stop_point() -> None:
    """Raises Preempted if the run got SIGTERM, unless a training loop is about to save and leave.

    For loops whose finished items are already saved. `core.progress.Progress` calls it by itself.
    """
    if _stop.is_set() and not _saving:
        raise Preempted(STOP_MESSAGE)


def end(status: int) -> NoReturn:
    """Ends this process as `sys.exit` does, but without Python's finalisation.

    Freeing the memory of TensorFlow and JAX takes ten seconds, in which a preempted machine may go.
    """
    # As the interpreter does: waits for threads, then runs the exit functions. No public names.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextmanager
def stopping_together() -> Iterator[Callable[[], bool]]:
    """Yields `stopping`, and keeps `stop_point` from raising inside the block.

    All hosts call `stopping()` once per step. It returns True in the same step on all of them, soon
    after one of them got SIGTERM.
    """
    global _saving
    before, _saving = _saving, True
    _forward_to_jax()
    try:
        if jax.process_count() > 1:
            yield lambda: multihost_utils.reached_preemption_sync_point(next(_steps))
        else:
            yield _stop.is_set
    finally:
        _saving = before


# --- Heartbeats. ---


class _Heartbeat(threading.Thread):
    """Publishes that this host is alive, and checks that the others are.

    Time is counted in this thread's own ticks, so neither a step of the wall clock nor a pause of
    this process makes another host look lost. The thread ends the process with LOST if another host
    is gone, and with AGAIN if the run stops and another host has left already: this one may wait
    for it inside a step.
    """

    def __init__(self, count: int, number: int):
        super().__init__(name="heartbeat", daemon=True)
        self._count, self._number, self._ticks = count, number, 0
        self._client = distributed.global_state.client
        self._last: dict[str, str] = {}  # the last heartbeat of each host, by key
        self._silent = dict.fromkeys(range(count), 0)  # ticks since then, by host
        self._ended = threading.Event()
        atexit.register(self.end)  # before JAX's own, which closes the client

    def run(self) -> None:
        """Beats until `end`."""
        while not self._ended.wait(TICK_SECONDS):
            # If the service is gone, all other hosts are silent.
            with suppress(jax.errors.JaxRuntimeError):
                self._beat()
            self._leave_if_lost()

    def end(self) -> None:
        """Stops the thread, publishes the last heartbeat and closes JAX's client.

        The first host waits for the last heartbeats of the others, whose clients need its service.
        """
        self._ended.set()
        self.join()
        pause = threading.Event()  # never set: unlike time.sleep, it ignores steps of the clock
        with suppress(jax.errors.JaxRuntimeError):
            self._beat()
            deadline = time.monotonic() + (STOPPED_SECONDS if _stop.is_set() else SHUTDOWN_SECONDS)
            while self._number == 0 and not self._all_ended() and time.monotonic() < deadline:
                pause.wait(POLL_SECONDS)
                self._beat()
        # The others close their clients.
        if self._number == 0:
            pause.wait(CLOSING_SECONDS)
        with suppress(jax.errors.JaxRuntimeError):
            distributed.global_state.shutdown()

    def _all_ended(self) -> bool:
        return sum(END in word.split() for word in self._last.values()) == self._count

    def _beat(self) -> None:
        # Own time, and the silence of the others.
        self._ticks += 1
        for number in self._silent:
            self._silent[number] += number != self._number
        # This host's heartbeat.
        flags = {STOP: _stop.is_set(), END: self._ended.is_set()}
        words = [f"{self._ticks}", *(name for name, is_set in flags.items() if is_set)]
        self._client.key_value_set(f"{ALIVE}{self._number}", " ".join(words), allow_overwrite=True)
        # The heartbeats of all hosts.
        for key, word in self._client.key_value_dir_get(ALIVE):
            if self._last.get(key) != word:
                self._silent[int(key.rsplit("/", 1)[1])] = 0
            self._last[key] = word
            if STOP in word.split():
                _stop.set()

    def _leave_if_lost(self) -> None:
        # The host that has been silent longest.
        silent = max(self._silent, key=self._silent.get)
        ticks = self._silent[silent]
        seconds = ticks * TICK_SECONDS
        if _stop.is_set() and not _saving and ticks >= LEFT_TICKS:
            end_now(AGAIN, f"host {silent} has left: {STOP_MESSAGE}")
        if ticks >= LOST_TICKS:
            end_now(LOST, f"host {silent} is lost: silent for {seconds:.0f} s; start all again")


def end_now(status: int, message: str) -> None:
    """Ends this process at once, from any thread, with a message on stderr."""
    print(message, file=sys.stderr, flush=True)
    os._exit(status)


# --- Work of the first host. ---


def first() -> bool:
    """Returns whether this is the first host, which writes the files that all hosts share."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Returns once every host has called it. Raises JaxRuntimeError after BARRIER_SECONDS."""
    if jax.process_count() > 1:
        barrier = f"musicrl/{what}/{next(_barriers)}"
        distributed.global_state.client.wait_at_barrier(barrier, BARRIER_SECONDS * 1000)


def first_alone(work: Callable[P, T]) -> Callable[P, T | None]:
    """Returns a function that runs `work` on the first host while the others wait.

    The others return None. If `work` raises or is preempted, the function raises on all hosts.
    """

    @functools.wraps(work)
    def run(*arguments: P.args, **keywords: P.kwargs) -> T | None:
        global _alone
        # Inside another such function no host waits.
        if jax.process_count() == 1 or _alone:
            return work(*arguments, **keywords)
        turn = f"musicrl/{next(_turns) + 1}/"
        client = distributed.global_state.client

        # The other hosts poll for the outcome, so that SIGTERM here reaches the first by heartbeat.
        if not first():
            while not (entries := client.key_value_dir_get(turn)):
                time.sleep(POLL_SECONDS)
            outcome = entries[0][1]
            if outcome == "preempted":
                raise Preempted(STOP_MESSAGE)
            if outcome != "done":
                raise ValueError(f"the first host failed: {outcome}")
            return None

        # The first host works, and publishes the outcome.
        outcome, _alone = "lost", True
        try:
            result = work(*arguments, **keywords)
            outcome = "done"
        except Preempted:
            outcome = "preempted"
            raise
        except Exception as error:
            outcome = f"{error}" or type(error).__name__
            raise
        finally:
            _alone = False
            client.key_value_set(turn + work.__name__, outcome)
        return result

    run.__signature__ = inspect.signature(work)  # gin reads it, and ignores `__wrapped__`
    return run


def first_decides(question: Callable[[], int]) -> int:
    """Returns the first host's answer, a bool or an int32, on all hosts.

    For questions about files: another host might see another answer a moment later.
    """
    answer = first_alone(question)()
    if jax.process_count() == 1 or _alone:
        return answer
    return int(multihost_utils.broadcast_one_to_all(np.int32(answer or 0)))


def is_lost_host(error: Exception) -> bool:
    """Returns whether an error of JAX means that another host is gone, and no mistake."""
    return jax.process_count() > 1 and "RESOURCE_EXHAUSTED" not in str(error)
