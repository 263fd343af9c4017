"""Tests of launch/Dockerfile without Docker: its lint, and its steps in empty folders."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "launch/Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """Returns (name, words) of each instruction of the Dockerfile."""
    text = re.sub(r"^#.*\n", "", IMAGE.read_text(), flags=re.M)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [tuple(line.split(" ", 1)) for line in lines if line.strip()]


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint", path=f"{ROOT / '.venv/bin'}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("no hadolint: launch/setup.sh installs it")
    linted = subprocess.run([hadolint, str(IMAGE)], capture_output=True, text=True, check=False)
    assert linted.returncode == 0, linted.stdout


def test_both_stages_have_a_python_with_pinned_requirements():
    images = [words.split(" ")[0] for name, words in instructions() if name == "FROM"]
    (version,) = {re.match(r"python:(\d+\.\d+)-slim", image)[1] for image in images}
    assert (ROOT / f"launch/requirements-{version}.txt").is_file()


@pytest.mark.parametrize(("platform", "extra"), [("cpu", ""), ("tpu", "tpu"), ("cuda", "cuda")])
def test_a_platform_installs_its_extra(platform, extra):
    (step,) = (words for name, words in instructions() if name == "RUN" and "setup.sh" in words)
    script = step.replace("launch/setup.sh", "printf '%s\\n' setup.sh")
    printed = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        env={"PLATFORM": platform, "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert printed == ["setup.sh", *([extra] if extra else [])]
    assert not extra or f'"{extra}": [' in (ROOT / "setup.py").read_text()


@pytest.mark.slow
def test_the_steps_make_an_environment_that_runs_without_the_checkout(tmp_path):
    # The files of `COPY . .`.
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    ignored = (ROOT / "launch/Dockerfile.dockerignore").read_text().split()
    source = tmp_path / "source"
    for name in tracked:
        if name.split("/")[0] not in ignored:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)

    # The installation, in another folder.
    (step,) = (words for name, words in instructions() if name == "RUN" and "setup.sh" in words)
    environment = {"PLATFORM": "cpu", "PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    opt, cache = tmp_path / "opt", tmp_path / "cache"
    subprocess.run(
        ["bash", "-euo", "pipefail", "-c", step.replace("/opt/musicrl", str(opt))],
        cwd=source,
        env={**os.environ, **environment},
        check=True,
        timeout=1500,
    )
    shutil.rmtree(source)

    # The entry point. It may write to its volume only.
    cache.mkdir()
    for folder in (opt, *opt.rglob("*")):
        if folder.is_dir():
            folder.chmod(0o555)
    settings = {
        "PATH": f"{opt}/bin:/usr/bin:/bin",
        "HOME": str(cache),
        "XDG_CACHE_HOME": str(cache),
    }
    printed = subprocess.run(
        ["musicrl", "run", "--gin_file=tiny", "--dry_run"],
        cwd=cache,
        env=settings,
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    ).stdout
    assert "run.stages" in printed
    for folder in (opt, *opt.rglob("*")):
        if folder.is_dir():
            folder.chmod(0o755)
