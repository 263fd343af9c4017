"""launch/setup.sh and launch/test.sh over stand-ins for Python, and the requirements files against setup.py."""

import importlib.metadata
import re
import runpy
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCK = runpy.run_path(str(ROOT / "launch/lock.py"))
FILES = sorted((ROOT / "launch").glob("requirements-*.txt"))
HERE = ROOT / f"launch/requirements-{sys.version_info.major}.{sys.version_info.minor}.txt"
UNHASHED = "torch"
# What setup.sh and test.sh start: both write down what they are asked, and do nothing else.
PYTHON = """#!/usr/bin/env bash
echo "$@" >> "$CALLS"
case "$*" in
  *version_info[[]:2]*) echo 3.11 ;;
  "-m venv --clear .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  *"$FAILS"*) exit 3 ;;
esac
"""


def entries(path):
    """{name: (requirement, number of hashes)} of a requirements file."""
    text = re.sub(r" \\\n +", " ", path.read_text())
    found = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            hashes = re.findall(r"--hash=sha256:[0-9a-f]{64}", line)
            requirement = Requirement(re.sub(r" *--hash=\S+", "", line).strip())
            assert canonicalize_name(requirement.name) not in found, line
            found[canonicalize_name(requirement.name)] = requirement, len(hashes)
    return found


def setup_arguments():
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    return setup.call_args.kwargs


def applies(requirement, extra):
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def test_each_python_of_ci_has_its_file():
    assert [path.stem.removeprefix("requirements-") for path in FILES] == list(LOCK["PYTHONS"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_requirement_of_every_extra_is_pinned_with_its_hashes(path):
    pinned, told = entries(path), setup_arguments()
    assert {name for name, (_, hashes) in pinned.items() if not hashes} <= {UNHASHED}
    assert not re.search(r"https?:|file:|--(extra-)?index|--find-links", path.read_text())
    extras = {"": told["install_requires"], **told["extras_require"]}
    assert set(told["extras_require"]) == {*LOCK["ALWAYS"], *LOCK["OPTIONAL"]}
    for extra, requirements in extras.items():
        for text in [*requirements, *LOCK["TOOLS"]]:
            wanted = Requirement(text)
            name = canonicalize_name(wanted.name)
            if name == UNHASHED:
                continue
            requirement, _ = pinned[name]
            (version,) = (each.version for each in requirement.specifier)
            assert wanted.specifier.contains(version), (extra, text, version)
            asked = extra if extra in LOCK["OPTIONAL"] else ""
            assert applies(requirement, asked), (
                f"{text} of {extra or 'the package'} is left out: {requirement}"
            )


def test_what_is_pinned_needs_nothing_that_is_not():
    """Over what is installed here: of all that the package and its extras need, each is pinned, at this version."""
    pinned, told = entries(HERE), setup_arguments()
    for extra in ("", *LOCK["OPTIONAL"]):
        wanted = [Requirement(text) for text in told["install_requires"]]
        for name in (*LOCK["ALWAYS"], *([extra] if extra else ())):
            wanted += [Requirement(text) for text in told["extras_require"][name]]
        seen = set()
        while wanted:
            requirement = wanted.pop()
            name = canonicalize_name(requirement.name)
            if name == UNHASHED or (name, frozenset(requirement.extras)) in seen:
                continue
            seen.add((name, frozenset(requirement.extras)))
            assert name in pinned and applies(pinned[name][0], extra), (
                f"{name}, for {extra or 'the package'}"
            )
            try:
                needs = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:
                continue  # an extra that is not installed here
            for text in needs:
                need = Requirement(text)
                if any(applies(need, asked) for asked in ("", *requirement.extras)):
                    wanted.append(need)


def test_an_entry_for_an_extra_keeps_its_marker_and_hashes():
    entry = "a==1 ; sys_platform == 'linux' \\\n    --hash=sha256:1\n"
    assert LOCK["for_extras"](entry, ["plan", "tpu"]) == (
        "a==1 ; (sys_platform == 'linux') and (extra == 'plan' or extra == 'tpu') \\\n    --hash=sha256:1\n"
    )
    assert LOCK["for_extras"]("a==1 \\\n    --hash=sha256:1\n", ["plan"]).startswith(
        "a==1 ; extra == 'plan' \\\n"
    )


@pytest.fixture
def checkout(tmp_path, processes):
    """(folder, run): a checkout with a stand-in for Python; run(script, *words, fails=...) gives status and calls."""
    folder = tmp_path / "checkout"
    (folder / "launch").mkdir(parents=True)
    for name in (
        "launch/setup.sh",
        "launch/test.sh",
        HERE.relative_to(ROOT),
        "setup.py",
        "pyproject.toml",
    ):
        shutil.copy(ROOT / name, folder / name)
    shutil.copy(HERE, folder / "launch/requirements-3.11.txt")
    for name in ("python3", "apt-get", "chromedriver", "faketime"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(PYTHON if name == "python3" else "#!/bin/sh\n")
        path.chmod(0o755)

    def run(script, *words, fails="nothing"):
        calls = tmp_path / "calls"
        calls.write_text("")
        environment = {
            "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
            "CALLS": str(calls),
            "FAILS": fails,
        }
        done = processes.run(
            [str(folder / script), *words], env=environment, capture_output=True, timeout=60
        )
        asked = [line for line in calls.read_text().splitlines() if not line.startswith("-c")]
        return done.returncode, asked, done.stderr

    return folder, run


def test_setup_installs_what_is_hashed_first_and_then_the_project_alone(checkout):
    folder, run = checkout
    install = "-m pip install --quiet"
    pinned = f"{install} --require-hashes --no-build-isolation --requirement"
    assert run("launch/setup.sh") == (
        0,
        [
            "-m venv --clear .venv",
            f"{install} --require-hashes --requirement .venv/requirements-tools.txt",
            f"{pinned} launch/requirements-3.11.txt",
            f"{install} --no-deps --no-build-isolation --editable .",
        ],
        "",
    )
    assert run("launch/setup.sh") == (0, [], "")
    tools = entries(folder / ".venv/requirements-tools.txt")
    assert set(tools) == set(LOCK["TOOLS"]) and all(hashes for _, hashes in tools.values())

    assert run("launch/setup.sh", "plan", "parity")[1] == [
        f"{pinned} .venv/requirements-plan.txt",
        f"{pinned} .venv/requirements-parity.txt",
        f"{install} --constraint .venv/versions.txt torch",
    ]
    assert run("launch/setup.sh", "plan", "parity") == (0, [], "")
    plan = entries(folder / ".venv/requirements-plan.txt")
    assert applies(plan["libtpu"][0], "") and not applies(plan["locust"][0], "")
    versions = (folder / ".venv/versions.txt").read_text().splitlines()
    assert (
        all(re.fullmatch(r"[A-Za-z0-9._-]+==[^ ;]+", line) for line in versions)
        and len(versions) > 150
    )

    status, calls, said = run("launch/setup.sh", "plans")
    assert (status, calls) == (1, []) and "setup.py has no extra 'plans'" in said


def test_setup_that_fails_is_done_again(checkout):
    _, run = checkout
    assert run("launch/setup.sh", fails="--require-hashes")[0] == 3
    assert len(run("launch/setup.sh")[1]) == 4


@pytest.mark.parametrize(("fails", "status"), [("not slow", 3), ("-m slow", 3), ("nothing", 0)])
def test_a_failed_half_of_the_tests_does_not_hide_the_other(fails, status, checkout):
    folder, run = checkout
    assert run("launch/setup.sh")[0] == 0
    (folder / ".venv/bin/ruff").symlink_to("/bin/true")
    ended, calls, said = run("launch/test.sh", fails=fails)
    assert ended == status, said
    halves = [call for call in calls if call.startswith("-m pytest")]
    assert len(halves) == 2 and "not slow" in halves[0] and halves[1] == "-m pytest -m slow"
    assert (
        len([call for call in run("launch/test.sh", "fast")[1] if call.startswith("-m pytest")])
        == 1
    )


def test_licences_of_what_ships_are_listed_and_go_into_a_wheel():
    notice = (ROOT / "NOTICE").read_text()
    assert setup_arguments()["license_files"] == ["LICENSE", "NOTICE"]
    assert (ROOT / "LICENSE").is_file()
    pretrained = runpy.run_path(str(ROOT / "musicrl_jax/inputs/pretrained.py"))["WHEELS"]
    for wheel in pretrained.values():
        assert wheel.package in notice and wheel.version in notice
        assert all(word in notice for word in re.findall(r"[A-Z][A-Za-z0-9.-]+", wheel.licence)), (
            wheel.licence
        )
    for name in (
        "TimGM6mb.sf2",
        "GPL",
        "music21",
        "midirenderer",
        "pretty_midi",
        "data/pretrained/demo",
    ):
        assert name in notice
    for page in ("README.md", "data/score_clips/README.md", "data/pretrained/demo/README.md"):
        words = " ".join((ROOT / page).read_text().split())
        assert re.search("contain its samples|samples of the soundfont", words), page
