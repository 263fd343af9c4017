"""Describes the stages of a run: the verb that each calls, and its arguments."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Stage(NamedTuple):
    """A call of a verb, with its arguments by name."""

    verb: str
    arguments: Mapping[str, Any]

    @property
    def settings(self) -> Mapping[str, Any]:
        """The arguments, and the fields of the verb's config if it takes one."""
        config = self.arguments.get("config")
        return self.arguments if config is None else {**self.arguments, **vars(config)}

    def with_batch(self, batch_size: int) -> "Stage":
        """Returns the stage with another batch size."""
        changed: dict[str, Any] = {"batch_size": batch_size}
        if "config" in self.arguments:
            changed = {"config": dataclasses.replace(self.arguments["config"], **changed)}
        return self._replace(arguments={**self.arguments, **changed})


def describable(verb: Callable) -> Callable:
    """Returns the verb as a function that, called with describe=True, returns a Stage instead."""
    signature = inspect.signature(verb)

    @functools.wraps(verb)
    def stage(*values: Any, describe: bool = False, **named: Any) -> Any:
        if not describe:
            return verb(*values, **named)
        bound = signature.bind(*values, **named)
        bound.apply_defaults()
        return Stage(verb.__name__, bound.arguments)

    stage.__signature__ = signature  # gin does not look behind a decorator
    return stage
