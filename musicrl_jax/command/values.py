"""Checks values of gin files and flags against the annotations of the parameters that they set."""

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

SEQUENCES = list, tuple, Sequence
UNIONS = typing.Union, types.UnionType
WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    type(None): "None",
}


class Reference(str):
    """A reference or a macro inside a gin value, by its text, such as '@Clips()'.

    Attributes:
      target: the class that it calls; None if it is unknown or not a class.
    """

    target: type | None = None

    def __repr__(self) -> str:
        return str(self)


# --- values ---------------------------------------------------------------------------------------


def fits(value: Any, annotation: Any) -> bool:
    """Tells whether a value is of an annotation's type; True for a type that cannot be checked.

    Stricter than Python where Python hides mistakes: a bool is no number, a text no sequence.
    """
    kind, parts = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if annotation is Any:
        return True
    if kind in UNIONS:
        return any(fits(value, part) for part in parts)
    # Nothing is known of what a function returns, so a reference to one fits.
    if isinstance(value, Reference):
        return value.target is None or not is_class(kind) or issubclass(value.target, kind)
    if kind is typing.Literal:
        return value in parts
    if kind in SEQUENCES:
        return _sequence_fits(value, kind, parts)
    if kind in (dict, Mapping):
        return isinstance(value, Mapping) and all(
            fits(key, parts[0]) and fits(each, parts[1]) for key, each in value.items() if parts
        )
    # To Python a bool is an int.
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return not is_class(kind) or isinstance(value, kind)


def _sequence_fits(value: Any, kind: Any, parts: tuple[Any, ...]) -> bool:
    """Tells whether a value is a list or a tuple of `kind` whose elements fit `parts`."""
    if not isinstance(value, tuple if kind is tuple else (list, tuple)):
        return False
    if kind is tuple and parts and parts[-1] is not Ellipsis:
        return len(value) == len(parts) and all(map(fits, value, parts))
    return all(fits(each, parts[0]) for each in value if parts)


def is_class(kind: Any) -> bool:
    """Tells whether isinstance can check a type: it is a class, and neither a protocol nor Any."""
    missing = kind in (inspect.Parameter.empty, Any)
    return isinstance(kind, type) and not missing and not getattr(kind, "_is_protocol", False)


# --- annotations ----------------------------------------------------------------------------------


def described(annotation: Any) -> str:
    """Returns an annotation in words, such as 'a number or None'."""
    kind, parts = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if kind in UNIONS:
        return " or ".join(map(described, parts))
    if kind in WORDS:
        return WORDS[kind]
    nouns = [described(part).removeprefix("a ") for part in parts if part is not ...]
    if kind in SEQUENCES:
        return f"{'a tuple' if kind is tuple else 'a list'} of {', '.join(nouns)}"
    if kind in (dict, Mapping):
        return f"a dict of {' to '.join(nouns)}"
    return getattr(kind, "__name__", str(kind))


def annotations(function: Callable) -> dict[str, Any]:
    """Returns the annotation of each parameter; {} if a name in them cannot be resolved."""
    try:
        return typing.get_type_hints(function)
    except NameError:  # of a user's own config: a name that only type checkers import
        return {}


def element_kind(annotation: Any) -> tuple[Any, Any]:
    """Returns (list or tuple, the type of its elements) of a parameter that takes several values.

    Returns (None, Any) for any other annotation.
    """
    union = typing.get_origin(annotation) in UNIONS
    for kind in typing.get_args(annotation) if union else (annotation,):
        if typing.get_origin(kind) in SEQUENCES:
            return typing.get_origin(kind), (*typing.get_args(kind), Any)[0]
    return None, Any
