"""Shipped files are located from any folder."""

from pathlib import Path

from musicrl_jax.core import shipped


def test_shipped_files_are_located_from_any_folder(monkeypatch, tmp_path):
    """The working folder comes first. A missing path stays as it is."""
    demo = "data/pretrained/demo"
    monkeypatch.chdir(tmp_path)
    assert shipped.located(demo) == Path(__file__).parents[2] / demo
    assert shipped.located("data/nothing") == Path("data/nothing")
    (tmp_path / demo).mkdir(parents=True)
    assert shipped.located(demo) == Path(demo)
