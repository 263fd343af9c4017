"""A wheel has all shipped files inside the package, and works in an empty folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = "setup.py", "pyproject.toml", "LICENSE", "NOTICE", "musicrl_jax", "gin", "data"
BUILDER = """
import sys
from musicrl_jax.inputs import build
module = build._module("data/score_clips")
assert module.Builder.name == "score_clips" and "tiny" in module.Builder.builder_configs
assert not {"data", "data.records"} & set(sys.modules), "top-level names"
print(module.__file__)
"""

pytestmark = pytest.mark.slow


def do(*command, **settings):
    """Runs a command and returns its output."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Builds a wheel and returns its path; from a copy, since setuptools leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "tree").mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / "tree" / name)
    flags = "--no-deps", "--no-build-isolation", "--no-index", f"--wheel-dir={folder}"
    do(sys.executable, "-m", "pip", "wheel", *flags, folder / "tree")
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """Returns the Python of a new environment with the wheel and this environment's packages."""
    folder = tmp_path_factory.mktemp("environment")
    do(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin/python"
    install = "install", "--no-deps", "--no-index", wheel
    do(sys.executable, "-m", "pip", f"--python={python}", *install)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_a_wheel_has_no_other_package_at_the_top_level(wheel):
    """A top-level `gin` or `data` would hide gin-config and other people's packages."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"musicrl_jax"}
    for folder in ("gin", "data"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix != ".pyc":
                assert f"musicrl_jax/shipped/{path.relative_to(ROOT)}" in names
    assert wheel.stat().st_size < 25e6


def test_a_wheel_works_in_an_empty_folder(python, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    settings = {"cwd": tmp_path, "env": environment}
    musicrl = python.with_name("musicrl")
    for name in ("gin/runs/tiny.gin", "runs/tiny.gin", "tiny"):
        output = do(musicrl, "run", f"--gin_file={name}", "--dry_run", **settings)
        assert "run.stages" in output
    place = Path(do(python, "-c", BUILDER, **settings).splitlines()[-1])
    assert place.is_relative_to(python.parents[1])
    assert not list(tmp_path.iterdir())
