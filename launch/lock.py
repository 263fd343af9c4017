#!/usr/bin/env python3
"""Writes launch/requirements-PYTHON.txt: the versions that launch/setup.sh installs, with hashes.

    launch/lock.py                     keeps the pinned versions that setup.py still allows
    launch/lock.py --upgrade           pins the newest versions
    launch/lock.py --only=3.12         writes the file of one Python

Needs `uv` on PATH (`pip install uv`). A line without `extra ==` is always installed. A line with it
is installed only for that extra: pip skips it otherwise.

Also writes launch/requirements-beam-PYTHON.txt: what the extra `beam` adds or needs in another
version.
"""

import argparse
import re
import runpy
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12")
ALWAYS = ("data", "listeners", "report", "serve", "test")
OPTIONAL = ("benchmark", "cuda", "parity", "plan", "tpu", "wandb")
APART = ("beam",)  # each needs other versions of packages, so an environment of its own
TOOLS = ("pip", "setuptools")  # they install the rest and build the project
# PyTorch has another wheel on each platform, and one of them brings 3 GB of CUDA. It is therefore
# pinned without a hash, only for the Python whose tests need it. Its own requirements are pinned
# with hashes, like all others.
TORCH_PYTHONS = ("3.11",)
TORCH = "torch"
TORCH_NEEDS = ("filelock", "fsspec", "jinja2", "networkx", "sympy", "typing-extensions")


def main() -> None:
    """Writes the file of each Python."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--upgrade", action="store_true", help="pin the newest versions")
    parser.add_argument("--only", choices=PYTHONS, help="write the file of this Python only")
    flags = parser.parse_args()
    for python in [flags.only] if flags.only else PYTHONS:
        path = ROOT / "launch" / f"requirements-{python}.txt"
        before = "" if flags.upgrade or not path.exists() else path.read_text()
        path.write_text(locked(python, before))
        print(f"{path.relative_to(ROOT)}: {len(pins(path.read_text()))} packages")
        for extra in APART:
            other = path.with_name(f"requirements-{extra}-{python}.txt")
            before = "" if flags.upgrade or not other.exists() else other.read_text()
            other.write_text(differing(python, extra, path.read_text(), before))
            print(f"{other.relative_to(ROOT)}: {len(pins(other.read_text()))} packages")


def pins(text: str) -> dict[str, str]:
    """Returns the version of each package of a requirements file."""
    return dict(re.findall(r"(?m)^([A-Za-z0-9._-]+)==([^ ;\\\n]+)", text))


def locked(python: str, before: str) -> str:
    """Returns the requirements file of a Python.

    Keeps the versions of `before`, an earlier file or "", where setup.py still allows them.
    """
    # All packages in one resolution, so that every extra gets the same versions.
    old = {name: version for name, version in pins(before).items() if name != TORCH}
    everything = resolved(python, [*ALWAYS, *OPTIONAL], old, "--generate-hashes")
    new = pins(everything)
    always = pins(resolved(python, ALWAYS, new))
    by_extra = {extra: pins(resolved(python, [*ALWAYS, extra], new)) for extra in OPTIONAL}

    lines = [
        f"# Written by launch/lock.py for Python {python}.\n"
        "# `pip install --require-hashes -r` takes the lines without `extra ==`: the package and\n"
        f"# the extras {', '.join(ALWAYS)}.\n"
        "# `launch/setup.sh EXTRA` also takes the lines of that extra.\n"
    ]
    for entry in entries(everything):
        (name,) = pins(entry)
        extras = sorted(extra for extra, names in by_extra.items() if name in names)
        lines.append(entry if name in always else for_extras(entry, extras))
    if python in TORCH_PYTHONS:
        version = pins(before).get(TORCH) or latest_torch(python)
        lines.append(f"{TORCH}=={version} ; extra == 'parity-without-hash'\n")
    return "".join(lines)


def differing(python: str, extra: str, base: str, before: str) -> str:
    """Returns the entries of an extra that replace entries of a Python's file, or add to them.

    Args:
      python: a version, as "3.11".
      extra: one of APART.
      base: the Python's file.
      before: an earlier result, or "".
    """
    old = {name: version for name, version in pins(base).items() if name != TORCH} | pins(before)
    everything = resolved(python, [*ALWAYS, extra], old, "--generate-hashes")
    lines = [
        f"# Written by launch/lock.py for Python {python}: what the extra {extra} adds to\n"
        f"# requirements-{python}.txt or needs in another version. `launch/setup.sh {extra}`\n"
        "# merges both.\n"
    ]
    pinned = set(entries(base))
    return "".join([*lines, *(entry for entry in entries(everything) if entry not in pinned)])


def entries(text: str) -> list[str]:
    """Returns the entries of a requirements file: several lines each, with version and hashes."""
    return [entry for entry in re.split(r"(?m)^(?=[A-Za-z0-9])", text) if pins(entry)]


def for_extras(entry: str, extras: list[str]) -> str:
    """Returns an entry that is installed only for the given extras."""
    condition = " or ".join(f"extra == '{extra}'" for extra in extras)
    head, hashes = entry.split(" \\\n", 1)
    pin, _, marker = head.partition(" ; ")
    marker = f"({marker}) and ({condition})" if marker else condition
    return f"{pin} ; {marker} \\\n{hashes}"


def resolved(python: str, extras: Sequence[str], versions: dict[str, str], *flags: str) -> str:
    """Returns the pins that uv chooses for setup.py with some extras, on all platforms.

    Prefers `versions`: uv keeps the pins that it reads in its output file.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "requirements.in", Path(folder) / "locked.txt"
        source.write_text("\n".join([*TOOLS, *requirements(extras)]) + "\n")
        output.write_text("".join(f"{name}=={version}\n" for name, version in versions.items()))
        options = ["--universal", "--fork-strategy=fewest", "--no-annotate"]
        uv_compile(python, str(source), f"--output-file={output}", *options, *flags)
        return output.read_text()


def requirements(extras: Sequence[str]) -> list[str]:
    """Returns the requirements of setup.py with some extras, PyTorch's in place of PyTorch."""
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    lines = list(setup.call_args.kwargs["install_requires"])
    for extra in extras:
        lines += setup.call_args.kwargs["extras_require"][extra]
    without_torch = [line for line in lines if not line.startswith(TORCH)]
    return without_torch + list(TORCH_NEEDS if without_torch != lines else ())


def latest_torch(python: str) -> str:
    """Returns the newest version of PyTorch for a Python."""
    return pins(uv_compile(python, "-", "--no-deps", stdin=TORCH))[TORCH]


def uv_compile(python: str, *arguments: str, stdin: str = "") -> str:
    """Runs `uv pip compile` and returns its standard output."""
    command = ["uv", "pip", "compile", f"--python-version={python}", "--no-header", "--quiet"]
    done = subprocess.run(
        [*command, *arguments], input=stdin, check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


if __name__ == "__main__":
    main()
