"""The processes of a run, one on each host: how they find each other, stop together and leave work to the first.

SIGTERM sets a flag and does no more. Training loops look at it through `stopping_together`, save and leave; every other
loop looks at it through `core.progress.Progress` or `stop_point`, which raise Preempted from ordinary code. A second
SIGTERM ends the process at once. Whoever does not `join` is stopped as any process is.
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
from jax._src import (
    clusters,
    distributed,
)  # cluster detection and key-value store, which have no public names
from jax.experimental import multihost_utils

AGAIN = (
    75  # EX_TEMPFAIL, the exit status of a run that saved its state and wants to be started again
)
LOST = 134  # that of a process that lost another one; the same as JAX's own end in that case
TICK_SECONDS = 2.0  # between two heartbeats
LOST_TICKS = (
    30  # heartbeats of this host without one of another, after which that one counts as lost
)
LEFT_TICKS = 5  # the same once the run is told to stop: the other one has left, and nothing more will be saved
NO_HEARTBEAT_SECONDS = 2**31 - 1
SHUTDOWN_SECONDS = 60
STOPPED_SECONDS = 15  # the same once the run is told to stop; the others leave LEFT_TICKS after the first at the latest
CLOSING_SECONDS = 3  # that the service is there for the others to close their clients, which no message can tell of
BARRIER_SECONDS = 600
POLL_SECONDS = 0.2
HANDLER_SECONDS = 10.0  # JAX sets its handler of SIGTERM in a thread, soon after `initialize`
ADDRESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
ALIVE = "musicrl/alive/"
TOLD = "told to stop; what is done is kept, and the same command goes on"
STOP, END = "stop", "end"  # in the heartbeat of a host that got SIGTERM, and in the last one

P = ParamSpec("P")
T = TypeVar("T")


class Preempted(SystemExit):
    """The run was told to stop; what it had is saved, and the same command goes on with it."""

    def __init__(self, told: str):
        super().__init__(AGAIN)
        self.told = told

    def __str__(self) -> str:
        return self.told


_stop = threading.Event()  # this host, or another one of the run, got SIGTERM
_saving = False  # inside `stopping_together`
_native: Callable[[int], None] | None = (
    None  # JAX's handler of SIGTERM, which agrees with the other hosts on a step
)
_asked = itertools.count()  # over all loops of a run
_barriers = itertools.count()
_waits, _alone = 0, False


def join() -> None:
    """Meets the other processes of this run, and has SIGTERM set a flag from here on.

    On a TPU slice, in Slurm and in a GKE job JAX finds them itself; elsewhere JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID say who they are. A process with none of these is alone, and starts no
    coordination service: nobody waits for its heartbeats.

    Raises ValueError where some of the three variables are set and others are not.
    """
    global _native
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
    if (count or 1) > 1:
        # JAX's service counts heartbeats by the wall clock, and takes all hosts for lost when that is set back,
        # whatever the limit is. One of "recoverable" hosts ends none for it; `_Heartbeat` does, by its own clock.
        jax.config.update("jax_enable_recoverability", True)
        before = _c_handler()
        jax.distributed.initialize(
            *((address, count, number) if all(values) else ()),
            heartbeat_timeout_seconds=NO_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
        _native = _set_by_jax(before)
        _Heartbeat(count, number).start()
    signal.signal(signal.SIGTERM, _request_stop)
    _end_at_second_signal()


def _request_stop(*_: object) -> None:
    _stop.set()
    _tell_jax()


def _tell_jax() -> None:
    """Has JAX agree on a step with the other hosts, in a training loop alone: elsewhere its thread would wait for the
    steps of hosts that do not count any, and with it the end of this process.
    """
    if _native is not None and _saving and _stop.is_set():
        _native(signal.SIGTERM)


class _SigAction(ctypes.Structure):
    """`struct sigaction` of the C library on 64-bit Linux."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_char * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


SA_RESETHAND = 0x80000000 - 2**32  # as a C int


def _sigaction(new: _SigAction | None = None) -> _SigAction:
    """What handles SIGTERM in the C library; `new` takes its place. Python sees its own handlers alone."""
    old = _SigAction()
    if ctypes.CDLL(None).sigaction(
        signal.SIGTERM, None if new is None else ctypes.byref(new), ctypes.byref(old)
    ):
        raise OSError("SIGTERM's handler cannot be read")
    return old


def _c_handler() -> int | None:
    return _sigaction().handler if sys.platform == "linux" else None


def _set_by_jax(before: int | None) -> Callable[[int], None] | None:
    """JAX's handler of SIGTERM, as soon as it is in the place of `before`; None where its service is turned off."""
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
    """Gives the next SIGTERM but one its default action, already in the C library: Python's own handlers wait for the
    end of a compilation.
    """
    if sys.platform == "linux":
        action = _sigaction()
        action.flags |= SA_RESETHAND
        _sigaction(action)


def stop_requested() -> bool:
    """Whether this run got SIGTERM, on this host or, as known a few seconds later, on another."""
    return _stop.is_set()


def stop_point() -> None:
    """Raises Preempted where the run got SIGTERM, unless a training loop is about to save and leave.

    For loops that leave nothing behind but what they have finished; `core.progress.Progress` calls it for its own.
    """
    if _stop.is_set() and not _saving:
        raise Preempted(TOLD)


def end(status: int) -> NoReturn:
    """Ends this process as `sys.exit` does, but without Python's finalisation: to clear what TensorFlow and JAX leave
    in memory takes ten seconds, in which a pre-empted machine may go.
    """
    threading._shutdown()  # waits for threads, as the interpreter itself does; neither has a public name
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextmanager
def stopping_together() -> Iterator[Callable[[], bool]]:
    """In the block `stop_point` does not raise. `stopping()`, called by all hosts in every step, turns true in one and
    the same step for all of them, soon after one of them got SIGTERM.
    """
    global _saving
    before, _saving = _saving, True
    _tell_jax()
    try:
        if jax.process_count() > 1:
            yield lambda: multihost_utils.reached_preemption_sync_point(next(_asked))
        else:
            yield _stop.is_set
    finally:
        _saving = before


class _Heartbeat(threading.Thread):
    """Tells the other hosts that this one is alive, and looks whether they are.

    Time is counted in this thread's own ticks: neither a step of the wall clock nor a pause of this process makes
    another host look lost. Ends the process, with LOST, where another host is gone; with AGAIN where the run was told
    to stop and another host has left already, as from a loop whose steps this one waits in.
    """

    def __init__(self, count: int, number: int):
        super().__init__(name="heartbeat", daemon=True)
        self._count, self._number, self._ticks = count, number, 0
        self._client = distributed.global_state.client
        self._last: dict[str, str] = {}
        self._silent = dict.fromkeys(range(count), 0)
        self._ended = threading.Event()
        atexit.register(self.end)  # before JAX's own, which closes the client

    def run(self) -> None:
        """Beats until `end`."""
        while not self._ended.wait(TICK_SECONDS):
            with suppress(
                jax.errors.JaxRuntimeError
            ):  # the service is gone; then all others are silent
                self._beat()
            self._leave_if_lost()

    def end(self) -> None:
        """Stops, says so to the others, and closes JAX's client; the first host, whose service must outlive all other
        clients, waits for their last words.
        """
        self._ended.set()
        self.join()
        pause = (
            threading.Event()
        )  # never set; as `run` waits, which a step of the clock does not disturb
        with suppress(jax.errors.JaxRuntimeError):
            self._beat()
            deadline = time.monotonic() + (STOPPED_SECONDS if _stop.is_set() else SHUTDOWN_SECONDS)
            while self._number == 0 and not self._all_ended() and time.monotonic() < deadline:
                pause.wait(POLL_SECONDS)
                self._beat()
        if self._number == 0:
            pause.wait(CLOSING_SECONDS)
        with suppress(jax.errors.JaxRuntimeError):
            distributed.global_state.shutdown()

    def _all_ended(self) -> bool:
        return sum(END in word.split() for word in self._last.values()) == self._count

    def _beat(self) -> None:
        self._ticks += 1
        for number in self._silent:
            self._silent[number] += number != self._number
        said = {STOP: _stop.is_set(), END: self._ended.is_set()}
        word = " ".join([f"{self._ticks}", *(name for name, true in said.items() if true)])
        self._client.key_value_set(f"{ALIVE}{self._number}", word, allow_overwrite=True)
        for key, word in self._client.key_value_dir_get(ALIVE):
            if self._last.get(key) != word:
                self._silent[int(key.rsplit("/", 1)[1])] = 0
            self._last[key] = word
            if STOP in word.split():
                _stop.set()

    def _leave_if_lost(self) -> None:
        silent = max(self._silent, key=self._silent.get)
        ticks = self._silent[silent]
        if _stop.is_set() and not _saving and ticks >= LEFT_TICKS:
            print(
                f"host {silent} has left; what is done is kept, and the same command goes on",
                file=sys.stderr,
            )
            sys.stderr.flush()
            os._exit(AGAIN)
        if ticks >= LOST_TICKS:
            print(
                f"host {silent} is lost: silent for {ticks * TICK_SECONDS:.0f} s; start all again",
                file=sys.stderr,
            )
            sys.stderr.flush()
            os._exit(LOST)


def first() -> bool:
    """Whether this is the process that writes what all have in common."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Returns once every host is here; JaxRuntimeError where one is not within BARRIER_SECONDS."""
    if jax.process_count() > 1:
        barrier = f"musicrl/{what}/{next(_barriers)}"
        distributed.global_state.client.wait_at_barrier(barrier, BARRIER_SECONDS * 1000)


def first_alone(work: Callable[P, T]) -> Callable[P, T | None]:
    """A function that the first host does while the others wait; None for those. It fails, or stops, on all of them."""

    @functools.wraps(work)
    def done(*arguments: P.args, **keywords: P.kwargs) -> T | None:
        global _waits, _alone
        if (
            jax.process_count() == 1 or _alone
        ):  # inside of another such function, where no one waits
            return work(*arguments, **keywords)
        _waits += 1  # the same on all hosts, which call such functions in one order
        told = f"musicrl/{_waits}/"
        client = distributed.global_state.client
        if not first():
            while not (ended := client.key_value_dir_get(told)):
                time.sleep(POLL_SECONDS)  # SIGTERM here reaches the first host by the heartbeat
            how = ended[0][1]
            if how == "preempted":
                raise Preempted(TOLD)
            if how != "done":
                raise ValueError(f"the first host failed: {how}")
            return None
        how, _alone = "lost", True
        try:
            result = work(*arguments, **keywords)
            how = "done"
        except Preempted:
            how = "preempted"
            raise
        except Exception as error:
            how = f"{error}" or type(error).__name__
            raise
        finally:
            _alone = False
            client.key_value_set(told + work.__name__, how)
        return result

    done.__signature__ = inspect.signature(
        work
    )  # gin asks for it, and does not look behind a decorator
    return done


def first_decides(question: Callable[[], bool]) -> bool:
    """Returns the first host's answer on all hosts, which may then do different work together.

    What is asked about files could have another answer a moment later on another host.
    """
    answer = first_alone(question)()
    if jax.process_count() == 1 or _alone:
        return answer
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(bool(answer))))


def is_lost_host(error: Exception) -> bool:
    """Whether an error of JAX means that another host is gone, not that there is a mistake."""
    return jax.process_count() > 1 and "RESOURCE_EXHAUSTED" not in str(error)
