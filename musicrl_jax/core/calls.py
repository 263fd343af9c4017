"""Calls of verbs, recorded in place of being done while a run is planned."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from musicrl_jax.core import checkpoint

PLANNED = "planned"  # the content hash of every model that is not there yet


class Call(NamedTuple):
    """A verb that was called and not done, with its arguments by name."""

    verb: str
    arguments: dict[str, Any]


_recording = False


@contextmanager
def recorded() -> Iterator[None]:
    """Lets verbs in the block return a Call and do nothing."""
    global _recording
    _recording = True
    try:
        yield
    finally:
        _recording = False


def recordable(verb: Callable) -> Callable:
    """Returns the verb as one that, while a run is planned, returns a Call and does nothing."""

    @functools.wraps(verb)
    def call(*given: Any, **named: Any) -> Any:
        if not _recording:
            return verb(*given, **named)
        bound = inspect.signature(verb).bind(*given, **named)
        bound.apply_defaults()
        return Call(verb.__name__, bound.arguments)

    call.__signature__ = inspect.signature(
        verb
    )  # gin asks for it, and does not look behind a decorator
    return call


def model_hash(directory: str) -> str:
    """Returns `checkpoint.model_hash`; while a run is planned, that of any model."""
    return PLANNED if _recording else checkpoint.model_hash(directory)
