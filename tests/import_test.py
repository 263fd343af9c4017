"""Imports follow the floors of the package, and each library has one home.

core <- models | losses | inputs | report <- systems <- objectives | rl | arena | serving | planning
     <- verbs <- cli | api
command <- cli
"""

import ast
import functools
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "musicrl_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
MAY_IMPORT = {
    "core": {"core"},
    "command": {"command"},  # help and completion may not wait for jax
    "models": {"core", "models"},
    "losses": {"core", "losses"},
    "inputs": {"core", "inputs"},
    "report": {"core", "report"},
    "systems": {"core", "models", "losses", "inputs", "systems"},
    "arena": {"core", "inputs", "systems", "arena"},
    "serving": {"core", "inputs", "systems", "serving"},
    "objectives": {"core", "models", "losses", "inputs", "systems", "objectives"},
    "rl": {"core", "losses", "systems", "rl"},
    "planning": {"core", "losses", "inputs", "systems", "objectives", "rl", "planning"},
}
# Only the systems and what trains their parts import models. All others import systems by their
# contract.
USE_MODELS = {"models", "systems", "objectives", "losses", "cli.py"}
# The command, the interface from Python, and the package itself; each with what it may not import.
FRONT_DOORS = {"cli.py": {"api"}, "api.py": {"cli", "command"}, "__init__.py": {"cli", "command"}}
CONTRACT = {"system", "player", "folder", "kinds"}
HOMES = {
    "gin": {"cli.py"},
    "argcomplete": {"command"},
    "tensorflow": {"inputs"},
    "seqio": {"inputs"},
    "tensorflow_datasets": {"inputs"},
    "apache_beam": {"inputs"},
    "sentencepiece": {"inputs"},
    "tokenizers": {"inputs"},
    "safetensors": {"core/tensors.py", "inputs", "pack.py", "serving"},
    "flax.linen": {"models", "core/sharding.py"},
    "orbax": {"core/checkpoint.py", "core/run_checkpoints.py"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
    "fastapi": {"serving"},
    "prometheus_client": {"serving"},
    "uvicorn": {"serving"},
    "librosa": {"arena"},
    "sklearn": {"arena"},
}


@functools.cache
def imports(path):
    """Returns each module that a file imports; `from a.b import c` as both a.b and a.b.c."""
    modules = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return modules


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    place = path.relative_to(PACKAGE)
    room = place.parts[0] if len(place.parts) > 1 else None
    for name in imports(path):
        parts = name.split(".")
        assert parts[0] != "data", f"{place} imports {name}: the package never imports the builders"
        if parts[0] != "musicrl_jax" or len(parts) < 2:
            continue
        if room in MAY_IMPORT:
            assert parts[1] in MAY_IMPORT[room], f"{place} imports {name}"
        elif place.name in FRONT_DOORS:
            assert parts[1] not in FRONT_DOORS[place.name], f"{place} imports {name}"
        else:
            allowed = {*MAY_IMPORT, "run"} - {"command"}
            assert parts[1] in allowed, f"{place} imports {name}: a verb imports no other verb"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_contract_of_systems_is_imported(path):
    place = path.relative_to(PACKAGE)
    if place.parts[0] in USE_MODELS:
        return
    for name in imports(path):
        parts = name.split(".")
        assert parts[:2] != ["musicrl_jax", "models"], f"{place} imports {name}, a model of a stack"
        if parts[:2] == ["musicrl_jax", "systems"] and len(parts) > 2:
            assert parts[2] in CONTRACT, f"{place} imports {name}, a concrete system"


def test_every_room_has_its_rule():
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert rooms == set(MAY_IMPORT)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_each_library_has_one_home(path):
    place = str(path.relative_to(PACKAGE))
    for name in imports(path):
        for library, homes in HOMES.items():
            if name == library or name.startswith(library + "."):
                assert place in homes or place.split("/")[0] in homes, f"{place} imports {library}"


def test_gin_folder_is_no_package():
    """An __init__.py there would hide the library of that name."""
    assert not list((PACKAGE.parent / "gin").rglob("__init__.py"))
