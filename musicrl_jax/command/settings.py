"""Prints what could be set for a run: a gin file with comments, or JSON."""

import inspect
import json
import textwrap
from collections.abc import Callable, Sequence
from typing import NamedTuple

from musicrl_jax.command import signatures
from musicrl_jax.command.help import WIDTH
from musicrl_jax.command.signatures import Parameter


class Setting(NamedTuple):
    """A macro, or a parameter of something that a run refers to.

    Attributes:
      name: as gin binds it, such as 'r/RLConfig.steps'.
      type: its annotation; 'macro' for a macro.
      default: its default as source; None if there is none.
      bound: what gin binds, as gin writes it; None if nothing.
      value: `bound` with its macros resolved, or the default.
      doc: what the docstring says of it.
    """

    name: str
    type: str
    default: str | None
    bound: str | None
    value: str | None
    doc: str


def parameters(called: Callable) -> Sequence[Parameter]:
    """Returns what a function or a class takes; without types in words if it has no source."""
    try:
        return signatures.read(f"{called.__module__}:{called.__qualname__}").parameters
    except LookupError:  # of a user's own module: defined by other means than a statement
        pass
    read = []
    for name, parameter in inspect.signature(called).parameters.items():
        default = None if parameter.default is parameter.empty else repr(parameter.default)
        read.append(Parameter(name, inspect.formatannotation(parameter.annotation), default, ""))
    return read


def as_json(settings: Sequence[Setting]) -> str:
    """Returns settings as a JSON list of objects, with the fields of `Setting`."""
    return json.dumps([setting._asdict() for setting in settings], indent=1)


def as_gin(settings: Sequence[Setting]) -> str:
    """Returns settings as a gin file, one a line; those that are not bound are comments."""
    lines = []
    group = ""
    for each in settings:
        # A heading over the settings of one object.
        owner = each.name.rpartition(".")[0] or "macros"
        if owner != group:
            lines += ["", f"# {owner}"]
            group = owner

        # The binding, and what it means.
        binding = f"{each.name} = {each.bound}"
        if each.bound is None:
            binding = f"# {each.name} = {each.default or 'REQUIRED'}"
        comment = f"# {each.type}: {each.doc}".removesuffix(": ")
        lines.append(f"{binding:<48}  {textwrap.shorten(comment, WIDTH, placeholder=' ...')}")
    return "\n".join(lines).strip()
