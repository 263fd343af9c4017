"""Tests of launch/setup.sh and launch/test.sh with a fake Python, and of the requirements files."""

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
FILES = sorted((ROOT / "launch").glob("requirements-[0-9]*.txt"))
HERE = ROOT / f"launch/requirements-{sys.version_info.major}.{sys.version_info.minor}.txt"
UNHASHED = "torch"
# A fake python3. It records its arguments and does nothing else.
PYTHON = """#!/usr/bin/env bash
echo "$@" >> "$CALLS"
case "$*" in
  *version_info[[]:2]*) echo 3.11 ;;
  "-m venv --clear "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
  *"$FAILS"*) exit 3 ;;
esac
"""


# --- requirements files ---


def entries(path):
    """Returns {name: (requirement, number of hashes)} of a requirements file."""
    text = re.sub(r" \\\n +", " ", path.read_text())
    requirements = {}
    for line in re.findall(r"(?m)^[^#\n].*", text):
        hashes = re.findall(r"--hash=sha256:[0-9a-f]{64}", line)
        requirement = Requirement(re.sub(r" *--hash=\S+", "", line).strip())
        name = canonicalize_name(requirement.name)
        assert name not in requirements, line
        requirements[name] = requirement, len(hashes)
    return requirements


def setup_arguments():
    """Returns the arguments of setup() in setup.py."""
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    return setup.call_args.kwargs


def applies(requirement, extra):
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def test_each_python_of_ci_has_its_file():
    assert [path.stem.removeprefix("requirements-") for path in FILES] == list(LOCK["PYTHONS"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_requirement_of_every_extra_is_pinned_with_its_hashes(path):
    pinned, arguments = entries(path), setup_arguments()
    assert {name for name, (_, hashes) in pinned.items() if not hashes} <= {UNHASHED}
    assert not re.search(r"https?:|file:|--(extra-)?index|--find-links", path.read_text())
    extras = {"": arguments["install_requires"], **arguments["extras_require"]}
    names = {*LOCK["ALWAYS"], *LOCK["OPTIONAL"], *LOCK["APART"]}
    assert set(arguments["extras_require"]) == names
    for extra, requirements in extras.items():
        if extra in LOCK["APART"]:
            continue
        for text in [*requirements, *LOCK["TOOLS"]]:
            required = Requirement(text)
            name = canonicalize_name(required.name)
            if name == UNHASHED:
                continue
            requirement, _ = pinned[name]
            (version,) = (each.version for each in requirement.specifier)
            assert required.specifier.contains(version), (extra, text, version)
            condition = extra if extra in LOCK["OPTIONAL"] else ""
            assert applies(requirement, condition), f"{extra}: {text} is left out: {requirement}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_environment_of_its_own_fits_its_extra_and_the_package(path):
    arguments = setup_arguments()
    for extra in LOCK["APART"]:
        own = path.with_name(path.name.replace("-", f"-{extra}-", 1))
        assert all(hashes for _, hashes in entries(own).values())
        assert not re.search(r"https?:|file:|--(extra-)?index|--find-links", own.read_text())
        pinned = entries(path) | entries(own)
        texts = arguments["install_requires"] + arguments["extras_require"][extra]
        for required in map(Requirement, texts):
            (version,) = (
                each.version for each in pinned[canonicalize_name(required.name)][0].specifier
            )
            assert required.specifier.contains(version), (required, version)


def test_requirements_of_pinned_packages_are_pinned():
    """Follows the requirements of installed packages, for the package and each extra."""
    pinned, arguments = entries(HERE), setup_arguments()
    for extra in ("", *LOCK["OPTIONAL"]):
        texts = list(arguments["install_requires"])
        for name in (*LOCK["ALWAYS"], *([extra] if extra else ())):
            texts += arguments["extras_require"][name]
        required, visited = [Requirement(text) for text in texts], set()
        while required:
            requirement = required.pop()
            name = canonicalize_name(requirement.name)
            if name == UNHASHED or (name, frozenset(requirement.extras)) in visited:
                continue
            visited.add((name, frozenset(requirement.extras)))
            assert name in pinned and applies(pinned[name][0], extra), f"{extra}: {name}"
            try:
                needs = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:
                continue  # an extra that is not installed here
            for text in needs:
                need = Requirement(text)
                if any(applies(need, condition) for condition in ("", *requirement.extras)):
                    required.append(need)


def test_an_entry_for_an_extra_keeps_its_marker_and_hashes():
    entry = "a==1 ; sys_platform == 'linux' \\\n    --hash=sha256:1\n"
    marker = "(sys_platform == 'linux') and (extra == 'plan' or extra == 'tpu')"
    expected = f"a==1 ; {marker} \\\n    --hash=sha256:1\n"
    assert LOCK["for_extras"](entry, ["plan", "tpu"]) == expected
    entry = LOCK["for_extras"]("a==1 \\\n    --hash=sha256:1\n", ["plan"])
    assert entry.startswith("a==1 ; extra == 'plan' \\\n")


# --- setup.sh and test.sh ---


@pytest.fixture
def checkout(tmp_path, processes):
    """Returns (folder, run) of a checkout with a fake Python.

    run(script, *words, fails=PATTERN) returns the exit status, Python's calls and stderr. Python
    fails if its arguments contain the pattern.
    """
    folder = tmp_path / "checkout"
    (folder / "launch").mkdir(parents=True)
    for name in ("launch/setup.sh", "launch/test.sh", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    # The fake says that it is Python 3.11.
    shutil.copy(HERE, folder / "launch/requirements-3.11.txt")
    beam = HERE.with_name(HERE.name.replace("-", "-beam-", 1))
    shutil.copy(beam, folder / "launch/requirements-beam-3.11.txt")
    for name in ("python3", "apt-get", "chromedriver", "faketime"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(PYTHON if name == "python3" else "#!/bin/sh\n")
        path.chmod(0o755)

    def run(script, *words, fails="nothing"):
        record = tmp_path / "calls"
        record.write_text("")
        environment = {"CALLS": str(record), "FAILS": fails}
        environment["PATH"] = f"{tmp_path / 'bin'}:/usr/bin:/bin"
        done = processes.run(
            [str(folder / script), *words], env=environment, capture_output=True, timeout=60
        )
        calls = [line for line in record.read_text().splitlines() if not line.startswith("-c")]
        return done.returncode, calls, done.stderr

    return folder, run


def test_setup_installs_pinned_packages_first_and_then_the_project_alone(checkout):
    folder, run = checkout

    # The package.
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

    # Its extras.
    assert run("launch/setup.sh", "plan", "parity")[1] == [
        f"{pinned} .venv/requirements-plan.txt",
        f"{pinned} .venv/requirements-parity.txt",
        f"{install} --constraint .venv/versions.txt torch",
    ]
    assert run("launch/setup.sh", "plan", "parity") == (0, [], "")
    plan = entries(folder / ".venv/requirements-plan.txt")
    assert applies(plan["libtpu"][0], "") and not applies(plan["locust"][0], "")
    versions = (folder / ".venv/versions.txt").read_text().splitlines()
    assert len(versions) > 150
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[^ ;]+", line) for line in versions)

    status, calls, error = run("launch/setup.sh", "plans")
    assert (status, calls) == (1, []) and "setup.py has no extra 'plans'" in error


def test_beam_gets_an_environment_of_its_own_with_the_versions_it_needs(checkout):
    folder, run = checkout
    pinned = "-m pip install --quiet --require-hashes --no-build-isolation --requirement"
    status, calls, error = run("launch/setup.sh", "beam")
    assert (status, error) == (0, "") and not (folder / ".venv").exists()
    assert calls[0] == "-m venv --clear .venv-beam"
    assert calls[2:] == [
        f"{pinned} .venv-beam/requirements.txt",
        "-m pip install --quiet --no-deps --no-build-isolation --editable .",
    ]
    assert run("launch/setup.sh", "beam") == (0, [], "")
    merged = entries(
        folder / ".venv-beam/requirements.txt"
    )  # raises for a name that is there twice
    own = entries(folder / "launch/requirements-beam-3.11.txt")
    others = entries(folder / "launch/requirements-3.11.txt")
    assert {str(entry) for entry in merged.values()} == {
        str(entry) for entry in (others | own).values()
    }
    # Another extra in the same environment has its versions.
    (call,) = run("launch/setup.sh", "beam", "plan")[1]
    assert call == f"{pinned} .venv-beam/requirements-plan.txt"
    plan = entries(folder / ".venv-beam/requirements-plan.txt")
    assert str(plan["protobuf"][0]) == str(own["protobuf"][0])


def test_a_failed_setup_starts_again(checkout):
    _, run = checkout
    assert run("launch/setup.sh", fails="--require-hashes")[0] == 3
    assert len(run("launch/setup.sh")[1]) == 4


@pytest.mark.parametrize(("fails", "status"), [("not slow", 3), ("-m slow", 3), ("nothing", 0)])
def test_a_failed_half_of_the_tests_does_not_hide_the_other(fails, status, checkout):
    folder, run = checkout
    assert run("launch/setup.sh")[0] == 0
    (folder / ".venv/bin/ruff").symlink_to("/bin/true")
    actual, calls, error = run("launch/test.sh", "all", fails=fails)
    assert actual == status, error
    halves = [call for call in calls if call.startswith("-m pytest")]
    assert len(halves) == 2 and "-m not slow" in halves[0] and "-m slow" in halves[1]


@pytest.mark.parametrize(("words", "tests"), [((), "-m not slow"), (("unit",), "-m unit")])
def test_the_tests_of_a_change_are_one_part(words, tests, checkout):
    folder, run = checkout
    assert run("launch/setup.sh")[0] == 0
    (folder / ".venv/bin/ruff").symlink_to("/bin/true")
    status, calls, error = run("launch/test.sh", *words)
    (call,) = (call for call in calls if call.startswith("-m pytest"))
    assert status == 0 and tests in call, error


def test_an_unknown_choice_of_tests_is_refused(checkout):
    _, run = checkout
    status, calls, error = run("launch/test.sh", "quick")
    assert (
        status == 2 and not calls and "'quick' is none of unit, change, all and beam" in str(error)
    )


# --- licences ---


def test_notice_lists_the_licences_of_shipped_files():
    notice = (ROOT / "NOTICE").read_text()
    assert setup_arguments()["license_files"] == ["LICENSE", "NOTICE"]
    assert (ROOT / "LICENSE").is_file()
    pretrained = runpy.run_path(str(ROOT / "musicrl_jax/inputs/pretrained.py"))["WHEELS"]
    for wheel in pretrained.values():
        assert wheel.package in notice and wheel.version in notice
        for word in re.findall(r"[A-Z][A-Za-z0-9.-]+", wheel.licence):
            assert word in notice, wheel.licence
    names = ["TimGM6mb.sf2", "GPL", "music21", "midirenderer", "pretty_midi"]
    for name in (*names, "data/pretrained/demo"):
        assert name in notice
    for page in ("README.md", "data/score_clips/README.md", "data/pretrained/demo/README.md"):
        words = " ".join((ROOT / page).read_text().split())
        assert re.search("contain its samples|samples of the soundfont", words), page
