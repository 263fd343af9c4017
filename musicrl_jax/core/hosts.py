"""The processes of a run, one on each host: how they find each other, stop together and leave work to the first.

`join` comes before everything else, also for a process that is alone: only then does JAX see SIGTERM coming. Who does
not join is alone and is stopped as any process is.
"""

import ctypes
import functools
import inspect
import itertools
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import jax
from jax._src import distributed  # for its key-value store, which has no public name
from jax.experimental import multihost_utils

AGAIN = 75  # EX_TEMPFAIL, the exit status of a run that saved its state and wants to be started again
LOST = 134  # that of a process that lost another one; the same as JAX's own end in that case
HEARTBEAT_SECONDS = 60
BARRIER_SECONDS = 600
POLL_SECONDS = 0.2
WHO = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"

P = ParamSpec("P")
T = TypeVar("T")


class Preempted(SystemExit):
    """The run was told to stop; what it had is saved, and the same command goes on with it."""

    def __init__(self, told: str):
        super().__init__(AGAIN)
        self.told = told

    def __str__(self) -> str:
        return self.told


_native: ctypes.Array | None = None  # JAX's handler of SIGTERM, which agrees with the other hosts on a step
_asked = itertools.count()  # over all loops of a run
_barriers = itertools.count()
_waits, _alone = 0, False


def join() -> None:
    """Meets the other processes of this run.

    On a TPU slice, in Slurm and in a GKE job JAX finds them itself; elsewhere JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID say who they are. A process with none of these is alone.
    """
    global _native
    limits = {"heartbeat_timeout_seconds": HEARTBEAT_SECONDS, "shutdown_timeout_seconds": HEARTBEAT_SECONDS}
    told = [os.environ.get(name) for name in WHO]
    if any(told) and not all(told):
        raise ValueError(f"{', '.join(WHO)} belong together: set all three or none, not {told}")
    if all(told):
        jax.distributed.initialize(told[0], int(told[1]), int(told[2]), **limits)
    else:
        try:
            jax.distributed.initialize(**limits)
        except ValueError:  # no cluster that JAX knows
            with socket.socket() as free:
                free.bind(("localhost", 0))
                address = f"localhost:{free.getsockname()[1]}"
            jax.distributed.initialize(address, 1, 0, **limits)
    _native = _handler()
    signal.signal(signal.SIGTERM, _leave)


def _handler(other: ctypes.Array | None = None) -> ctypes.Array:
    """What handles SIGTERM, as the C library keeps it; `other` takes its place. Python sees its own handlers alone."""
    old = ctypes.create_string_buffer(512)  # more than any platform's struct sigaction
    if ctypes.CDLL(None).sigaction(signal.SIGTERM, other, old):
        raise OSError("SIGTERM's handler cannot be read")
    return old


def _leave(*_: object) -> None:
    raise Preempted("told to stop; what is done is kept, and the same command goes on")


@contextmanager
def stopping_together() -> Iterator[Callable[[], bool]]:
    """In the block SIGTERM does not end the process: `told()`, called by all hosts in every step, turns true in one
    and the same step for all of them, soon after one of them got the signal."""
    if _native is None:
        yield lambda: False
        return
    ours = _handler(_native)
    try:
        yield lambda: multihost_utils.reached_preemption_sync_point(next(_asked))
    finally:
        _handler(ours)


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
        if jax.process_count() == 1 or _alone:  # inside of another such function, where no one waits
            return work(*arguments, **keywords)
        _waits += 1  # the same on all hosts, which call such functions in one order
        told = f"musicrl/{_waits}/"
        client = distributed.global_state.client
        if not first():
            while not (ended := client.key_value_dir_get(told)):
                time.sleep(POLL_SECONDS)  # in Python, where a signal is heard
            how = ended[0][1]
            if how == "preempted":
                _leave()
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

    done.__signature__ = inspect.signature(work)  # gin asks for it, and does not look behind a decorator
    return done


def lost(error: Exception) -> bool:
    """Whether an error of JAX means that another host is gone, not that there is a mistake."""
    return jax.process_count() > 1 and "RESOURCE_EXHAUSTED" not in str(error)
