#!/usr/bin/env python3
"""Writes launch/requirements-PYTHON.txt anew: what launch/setup.sh installs, each version with the hashes of its files.

    launch/lock.py                     keeps the versions that are there, as far as setup.py allows
    launch/lock.py --upgrade           takes the newest ones
    launch/lock.py --only=3.12         one Python's file

Needs `uv` on PATH (`pip install uv`). A line without `extra ==` is always installed; one with it only for that extra,
and pip leaves it out otherwise.
"""

import argparse
import re
import runpy
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12")
ALWAYS = ("data", "listeners", "report", "serve", "test")
OPTIONAL = ("benchmark", "cuda", "parity", "plan", "tpu")
TOOLS = ("pip", "setuptools")  # what installs the rest and builds the project
# PyTorch's wheel is another one on each platform and brings CUDA, 3 GB, where none is on the machine. It is pinned
# without a hash, for the Python whose tests need it; what it needs besides is pinned with the others.
TORCH_PYTHONS = ("3.11",)
TORCH = "torch"
TORCH_NEEDS = ("filelock", "fsspec", "jinja2", "networkx", "sympy", "typing-extensions")


def main() -> None:
    """Writes the file of each Python."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions")
    parser.add_argument("--only", choices=PYTHONS, help="one Python")
    flags = parser.parse_args()
    for python in [flags.only] if flags.only else PYTHONS:
        path = ROOT / "launch" / f"requirements-{python}.txt"
        before = "" if flags.upgrade or not path.exists() else path.read_text()
        path.write_text(locked(python, before))
        print(f"{path.relative_to(ROOT)}: {len(pins(path.read_text()))} packages")


def pins(text: str) -> dict[str, str]:
    """Returns the version of each package of a requirements file."""
    return dict(re.findall(r"(?m)^([A-Za-z0-9._-]+)==([^ ;\\\n]+)", text))


def locked(python: str, before: str) -> str:
    """Returns the requirements file of a Python, with the versions of `before` where they still do."""
    torch = python in TORCH_PYTHONS
    old = {name: version for name, version in pins(before).items() if name != TORCH}
    whole = compiled(python, [*ALWAYS, *OPTIONAL], old, hashes=True)
    new = pins(whole)
    of_extra = {extra: set(pins(compiled(python, [*ALWAYS, extra], new))) for extra in OPTIONAL}
    always = set(pins(compiled(python, ALWAYS, new)))

    # Each package is an entry of several lines, its hashes behind its version and marker.
    entries = re.split(r"(?m)^(?=[A-Za-z0-9])", whole)
    lines = [
        f"# Written by launch/lock.py, for Python {python}. `pip install --require-hashes -r` takes what the package\n"
        f"# and the extras {', '.join(ALWAYS)} need; `launch/setup.sh EXTRA` takes lines with `extra ==` too.\n"
    ]
    for entry in filter(str.strip, entries):
        (name,) = pins(entry)
        extras = sorted(extra for extra, names in of_extra.items() if name in names)
        lines.append(entry if name in always else for_extras(entry, extras))
    if torch:
        version = pins(before).get(TORCH) or latest_torch(python)
        lines.append(f"{TORCH}=={version} ; extra == 'parity-without-hash'\n")
    return "".join(lines)


def for_extras(entry: str, extras: list[str]) -> str:
    """Returns an entry that only the given extras install."""
    asked = " or ".join(f"extra == '{extra}'" for extra in extras)
    head, hashes = entry.split(" \\\n", 1)
    pin, _, marker = head.partition(" ; ")
    marker = f"({marker}) and ({asked})" if marker else asked
    return f"{pin} ; {marker} \\\n{hashes}"


def compiled(
    python: str, extras: list[str] | tuple[str, ...], versions: dict[str, str], hashes: bool = False
) -> str:
    """Returns what `uv pip compile` says of setup.py with some extras, for all platforms; `versions` are preferred."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, output = Path(folder) / "wanted.in", Path(folder) / "locked.txt"
        wanted.write_text("\n".join([*TOOLS, *requirements(extras)]) + "\n")
        output.write_text(
            "".join(f"{name}=={version}\n" for name, version in versions.items())
        )  # uv keeps these
        command = [
            "uv",
            "pip",
            "compile",
            str(wanted),
            f"--output-file={output}",
            f"--python-version={python}",
        ]
        command += [
            "--universal",
            "--fork-strategy=fewest",
            "--no-header",
            "--no-annotate",
            "--quiet",
        ]
        command += ["--generate-hashes"] if hashes else []
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return output.read_text()


def requirements(extras: list[str] | tuple[str, ...]) -> list[str]:
    """Returns the requirements of setup.py with some extras; what PyTorch needs in its place."""
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    told = setup.call_args.kwargs
    asked = [
        *told["install_requires"],
        *(each for extra in extras for each in told["extras_require"][extra]),
    ]
    without = [each for each in asked if not each.startswith(TORCH)]
    return without + list(TORCH_NEEDS if without != asked else ())


def latest_torch(python: str) -> str:
    """Returns the newest version of PyTorch for a Python."""
    command = [
        "uv",
        "pip",
        "compile",
        "-",
        f"--python-version={python}",
        "--no-deps",
        "--no-header",
        "--quiet",
    ]
    return pins(
        subprocess.run(command, input=TORCH, check=True, stdout=subprocess.PIPE, text=True).stdout
    )[TORCH]


if __name__ == "__main__":
    main()
