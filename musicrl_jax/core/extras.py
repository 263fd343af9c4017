"""Checks for optional packages, which setup.py lists as extras."""

import importlib.util


def check(what: str, extra: str, *modules: str) -> None:
    """Raises ModuleNotFoundError with the command that installs an extra, if a module is missing.

    This package is on no registry, so the message names the checkout's folder or a wheel's path.
    """
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise ModuleNotFoundError(
            f"{what} needs {', '.join(missing)}: pip install --editable '.[{extra}]' in a checkout,"
            f" or pip install 'WHEEL[{extra}]' with the path of the wheel that this package was "
            "installed from"
        )
