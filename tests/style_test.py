"""Limits of style that ruff does not know: verbs, names, comments and headings."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = "musicrl_jax", "data", "launch", "tests"
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
PACKAGE = [path for path in FILES if path.is_relative_to(ROOT / "musicrl_jax")]

# A name says what a thing is, not that something happened to it.
BANNED = set(
    re.findall(
        r"\w+",
        "found asked told heard drawn seen given kept about watched hear know knows made taken "
        "wanted left lies stands",
    )
)
# A verb in the third person, as 'Returns'; nouns in the plural are none.
VERB = re.compile(r"[A-Z][a-z]+s")
NOUNS = set(
    re.findall(
        r"\w+",
        "Arrays As Bytes Clips Codes Figures Files Frames Has Is Its Keys Lines Losses Metrics "
        "Models Names Paths Prompts Rewards Rows Scores Settings Stages Steps This Tokens Values "
        "Weights",
    )
)
VERB_SHARE, COMMENT_SHARE = 0.95, 0.05
FUNCTION_LINES, LINES_WITHOUT_HEADING = 100, 40  # without signature and docstring
PARAMETERS, VERB_PARAMETERS = 8, 11
EXCEPTIONS = 15


def trees(paths: list[Path]) -> Iterator[tuple[Path, str, ast.Module]]:
    """Yields path, text and syntax tree of Python files."""
    for path in paths:
        text = path.read_text(encoding="utf-8")
        yield path, text, ast.parse(text)


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yields all functions and methods."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def is_property(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Tells whether a function is a property, whose docstring is a noun."""
    return any("property" in ast.unparse(each) for each in function.decorator_list)


def names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields (line, name) of each variable, attribute, parameter, function and class."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_of_functions_start_with_a_verb(folder):
    verbs, others = 0, []
    for path, _, tree in trees([path for path in FILES if path.is_relative_to(ROOT / folder)]):
        for function in functions(tree):
            docstring = ast.get_docstring(function)
            if not docstring or is_property(function) or function.name.startswith("test_"):
                continue
            word = re.split(r"\W", docstring, maxsplit=1)[0]
            if VERB.fullmatch(word) and word not in NOUNS:
                verbs += 1
            else:
                others.append(f"{path.name}:{function.lineno}: {docstring.splitlines()[0]}")
    assert verbs >= VERB_SHARE * (verbs + len(others)), "\n".join(others)


def test_no_name_says_that_something_happened():
    banned = []
    for path, _, tree in trees(FILES):
        banned += [f"{path}:{line}: {name}" for line, name in names(tree) if name in BANNED]
    assert not banned, "\n".join(banned)


def test_one_line_of_twenty_of_the_package_is_a_comment():
    comments = lines = 0
    for _, text, _ in trees(PACKAGE):
        written = [line.strip() for line in text.splitlines() if line.strip()]
        lines += len(written)
        comments += sum(line.startswith("#") for line in written)
    assert comments >= COMMENT_SHARE * lines


def test_functions_are_short_and_long_ones_have_headings():
    wrong = []
    for path, text, tree in trees(PACKAGE):
        for function in functions(tree):
            first = function.body[1 if ast.get_docstring(function) else 0 :][:1] or [function]
            body = text.splitlines()[first[0].lineno - 1 : function.end_lineno]
            if len(body) > FUNCTION_LINES:
                wrong.append(f"{path}:{function.lineno}: {function.name} has {len(body)} lines")
            heading = any(line.strip().startswith("#") for line in body)
            if len(body) > LINES_WITHOUT_HEADING and not heading:
                wrong.append(f"{path}:{function.lineno}: {function.name} has no section comment")
            arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            count = sum(each.arg not in ("self", "cls") for each in arguments)
            verb = path.parent.name == "musicrl_jax" and path.stem == function.name
            if count > (VERB_PARAMETERS if verb else PARAMETERS):
                wrong.append(f"{path}:{function.lineno}: {function.name} has {count} parameters")
    assert not wrong, "\n".join(wrong)


def test_lint_has_few_exceptions():
    """They are ruff's ignored rules, its rules for files, and `noqa` comments."""
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    exceptions = [*lint["ignore"], *lint.get("per-file-ignores", {})]
    for path, text, _ in trees(FILES):
        for number, line in enumerate(text.splitlines(), start=1):
            if re.search(r"#\s*noqa", line):
                exceptions.append(f"{path.name}:{number}")
    assert len(exceptions) <= EXCEPTIONS, exceptions
