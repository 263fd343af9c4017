"""A missing package is named with a command that installs it."""

import re
from pathlib import Path

import pytest

from musicrl_jax.core import extras

ROOT = Path(__file__).parents[2]


def test_a_missing_package_is_named_with_commands_that_work(monkeypatch):
    # Nothing is missing.
    extras.check("this", "plan", "json", "ast")
    with pytest.raises(ModuleNotFoundError) as error:
        extras.check("plan", "plan", "json", "no_such_module")
    words = str(error.value)
    command = "pip install --editable '.[plan]' in a checkout"
    assert words.startswith(f"plan needs no_such_module: {command}")
    assert "pip install 'WHEEL[plan]'" in words


def test_no_text_says_to_install_this_package_from_an_index():
    """No index has it. Each extra in a message is one of setup.py."""
    setup = (ROOT / "setup.py").read_text()
    for path in [*ROOT.glob("musicrl_jax/**/*.py"), *ROOT.glob("*.md"), *ROOT.glob("data/**/*.md")]:
        text = path.read_text(encoding="utf-8")
        assert "pip install 'musicrl" not in text and "pip install musicrl" not in text, path
        for extra in re.findall(r'extras\.check\("[^"]*", "(\w+)"', text):
            assert f'"{extra}": [' in setup, f"{path}: {extra}"
