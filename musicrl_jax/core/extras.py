"""Packages that only some commands need: the extras of setup.py."""

import importlib.util


def check(what: str, extra: str, *modules: str) -> None:
    """Raises ModuleNotFoundError, which says how to install the extra, where one of the modules is
    missing.

    The package is on no registry, so the words name what works: the checkout's folder, or a wheel's
    file.
    """
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise ModuleNotFoundError(
            f"{what} needs {', '.join(missing)}: pip install --editable '.[{extra}]' in a checkout, or "
            f"pip install 'WHEEL[{extra}]' with the path of the wheel that this package was installed from"
        )
