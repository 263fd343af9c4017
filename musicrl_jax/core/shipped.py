"""Finds the files that ship with the package: recipes in `gin/`, builders and models in `data/`.

A checkout has both folders beside the package. A wheel has them in the package's folder `shipped`:
at the top level they would shadow gin-config's `gin` and other packages' `data`.
"""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE / "shipped" if (PACKAGE / "shipped").is_dir() else PACKAGE.parent


def located(path: str) -> Path:
    """Returns the shipped file `path` if `path` itself does not exist, else `path`."""
    here = Path(path).expanduser()
    there = ROOT / here
    return there if not here.exists() and there.exists() else here
