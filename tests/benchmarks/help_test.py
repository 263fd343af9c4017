"""Every benchmark can be imported, and says how it is called."""

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.endswith("_test"))
EXTRA = "benchmark"  # of pyproject.toml, whose packages a benchmark may need


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_prints_its_help(name, monkeypatch, capsys):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("musicrl_jax"):
            raise
        pytest.skip(f"{error}: pip install -e '.[{EXTRA}]'")
    assert Path(module.__file__).parent == FOLDER
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as exit_:
        module.main()
    assert exit_.value.code == 0
    assert f"usage: {name}.py" in capsys.readouterr().out
