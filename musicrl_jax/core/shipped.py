"""What ships with the package: `gin/`, the recipes, and `data/`, the builders and small models.

In a checkout both stand beside the package. A wheel has them in the package's folder `shipped`: at
the top level they would hide gin-config's `gin` and anybody's `data`.
"""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE / "shipped" if (PACKAGE / "shipped").is_dir() else PACKAGE.parent


def located(path: str) -> Path:
    """Returns a path as it is; if nothing is there, that of what ships under this name, if any."""
    here = Path(path).expanduser()
    there = ROOT / here
    return there if not here.exists() and there.exists() else here
