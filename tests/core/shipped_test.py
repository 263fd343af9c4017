"""What ships is found from any folder."""

from pathlib import Path

from musicrl_jax.core import shipped


def test_what_ships_is_found_from_any_folder(monkeypatch, tmp_path):
    """What the working folder has comes first; what is nowhere stays as it was named."""
    monkeypatch.chdir(tmp_path)
    assert (
        shipped.located("data/pretrained/demo")
        == Path(__file__).parents[2] / "data/pretrained/demo"
    )
    assert shipped.located("data/nothing") == Path("data/nothing")
    (tmp_path / "data/pretrained/demo").mkdir(parents=True)
    assert shipped.located("data/pretrained/demo") == Path("data/pretrained/demo")
