"""Reads what functions and config classes take from their source, without importing it.

An import of a verb brings jax and takes seconds; help and shell completion may not.
"""

import ast
import functools
import importlib.util
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ENTRY = re.compile(r"(\w+(?:, \w+)*): (.*)")  # of a docstring's Args or Attributes
SECTIONS = ("Args:", "Attributes:")
ENDS = ("Raises:", "Returns:", *SECTIONS)


class Parameter(NamedTuple):
    """A parameter of a function, or a field of a dataclass.

    Attributes:
      name: of the parameter.
      type: its annotation, as source.
      default: its default, as source; None if it has to be set.
      doc: what the docstring says of it; '' if nothing.
    """

    name: str
    type: str
    default: str | None
    doc: str


class Signature(NamedTuple):
    """The docstring and the parameters of a function or a dataclass."""

    doc: str
    parameters: tuple[Parameter, ...]


@functools.cache
def read(place: str) -> Signature:
    """Returns the signature of 'module:name', a function or a dataclass.

    Fields of base classes come first, as in the dataclass. Raises LookupError if it is neither.
    """
    # The docstring, and what base classes say.
    node, module = _definition(place)
    docstring = ast.get_docstring(node) or ""
    entries = documented(docstring)
    parameters = {}
    if isinstance(node, ast.ClassDef):
        for base in _bases(node, module):
            parameters |= {each.name: each for each in read(base).parameters}
        items = list(_fields(node))
    else:
        items = list(_arguments(node))

    # Its own parameters. A field that is declared again keeps its place, as in the dataclass.
    for name, annotation, default in items:
        inherited = parameters[name].doc if name in parameters else ""
        shown = None if default is None else _source(default, module)
        doc = entries.get(name, inherited)
        parameters[name] = Parameter(name, ast.unparse(annotation), shown, doc)
    return Signature(_prose(docstring), tuple(parameters.values()))


def parents(place: str) -> set[str]:
    """Returns the places of a class's base classes, and of theirs."""
    node, module = _definition(place)
    bases = set(_bases(node, module)) if isinstance(node, ast.ClassDef) else set()
    return bases.union(*map(parents, bases))


# --- docstrings -----------------------------------------------------------------------------------


def documented(docstring: str) -> dict[str, str]:
    """Returns the entries of a docstring's Args or Attributes, {name: text}, in google's style."""
    entries: dict[str, str] = {}
    for section in SECTIONS:
        _, _, rest = docstring.partition(f"\n{section}\n")
        block = re.split(r"\n(?=\S)", rest)[0]
        names: list[str] = []
        for line in textwrap.dedent(block).splitlines():
            if match := ENTRY.fullmatch(line):
                names, text = match[1].split(", "), match[2]
                entries |= dict.fromkeys(names, text)
            else:
                entries |= {name: f"{entries[name]} {line.strip()}".strip() for name in names}
    return entries


def _prose(docstring: str) -> str:
    """Returns a docstring up to its sections."""
    lines = docstring.splitlines()
    ends = [number for number, line in enumerate(lines) if line in ENDS]
    return "\n".join(lines[: min(ends, default=len(lines))]).strip()


# --- source ---------------------------------------------------------------------------------------


@functools.cache
def _tree(module: str) -> ast.Module:
    """Parses a module's source."""
    # Finding a module imports the packages that it is in, and they are light.
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.has_location:
        raise LookupError(f"no source of {module}")
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def _definition(place: str) -> tuple[ast.FunctionDef | ast.ClassDef, str]:
    """Returns the node of 'module:name' and its module; follows `from MODULE import NAME`."""
    module, _, name = place.partition(":")
    body = _tree(module).body
    # Definitions first: a module may import another object of the same name under an alias.
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node, module
    for node in body:
        if isinstance(node, ast.ImportFrom) and name in [each.name for each in node.names]:
            return _definition(f"{node.module}:{name}")
    raise LookupError(f"{module} defines neither a function nor a class {name}")


def _bases(node: ast.ClassDef, module: str) -> Iterator[str]:
    """Yields the places of base classes that are in this package."""
    for base in node.bases:
        if not isinstance(base, ast.Name):
            continue
        try:
            definition, where = _definition(f"{module}:{base.id}")
        except (LookupError, ImportError):
            continue
        if where.startswith("musicrl_jax"):
            yield f"{where}:{definition.name}"


def _arguments(node: ast.FunctionDef) -> Iterator[tuple[str, ast.expr, ast.expr | None]]:
    """Yields (name, annotation, default) of a function's arguments."""
    arguments = node.args
    # Defaults belong to the last arguments.
    missing = [None] * (len(arguments.args) - len(arguments.defaults))
    yield from _annotated(arguments.args, [*missing, *arguments.defaults])
    yield from _annotated(arguments.kwonlyargs, arguments.kw_defaults)


def _annotated(
    arguments: list[ast.arg], defaults: list[ast.expr | None]
) -> Iterator[tuple[str, ast.expr, ast.expr | None]]:
    for argument, default in zip(arguments, defaults, strict=True):
        yield argument.arg, argument.annotation or ast.Name("Any"), default


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr, ast.expr | None]]:
    """Yields (name, annotation, default) of a dataclass's fields."""
    for each in node.body:
        if not isinstance(each, ast.AnnAssign) or "ClassVar" in ast.unparse(each.annotation):
            continue
        default = each.value
        if isinstance(default, ast.Call) and ast.unparse(default.func).endswith("field"):
            options = {option.arg: option.value for option in default.keywords}
            default = options.get("default")
            if "default_factory" in options:
                default = ast.Call(options["default_factory"], [], [])
        elif isinstance(default, ast.Call) and default.args and ast.unparse(default.func).islower():
            default = default.args[0]  # a helper that returns a field with this default
        yield each.target.id, each.annotation, default


def _source(default: ast.expr, module: str) -> str:
    """Returns a default as source; of a constant of the module, its value."""
    name = ast.unparse(default)
    for node in _tree(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.unparse(node.value)
    return name
