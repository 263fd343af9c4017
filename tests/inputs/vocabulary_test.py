"""A trained vocabulary: equal bytes from equal captions, and refusals."""

import dataclasses
from pathlib import Path

import pytest

from musicrl_jax.inputs import vocabulary


@pytest.fixture
def path(vocabulary_path, tmp_path):
    """Copies a trained vocabulary and returns its path."""
    copy = tmp_path / "vocabulary.model"
    for ending in ("", ".json"):
        Path(f"{copy}{ending}").write_bytes(Path(f"{vocabulary_path}{ending}").read_bytes())
    return copy


def test_the_same_captions_give_the_same_bytes(ten, path, tmp_path):
    again = tmp_path / "again" / "vocabulary.model"
    vocabulary.build(ten, str(again), size=400)
    assert again.read_bytes() == path.read_bytes()
    names = sorted(each.name for each in again.parent.iterdir())
    assert names == ["vocabulary.model", "vocabulary.model.json"]


def test_a_finished_model_is_not_trained_again(ten, path):
    path.write_bytes(b"finished")
    vocabulary.build(ten, str(path), size=400)
    assert path.read_bytes() == b"finished"


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("ramp/ten", 401, "with size 400, not 401"),
        ("ramp/five", 400, "from other captions"),
        ("ramp/five", 401, "with size 400, not 401 and from other captions"),
    ],
)
def test_another_size_or_other_captions_are_refused(ten, path, name, size, message):
    message = rf"was made {message}: give another VOCABULARY, delete it, or .*model\.json"
    with pytest.raises(ValueError, match=message):
        vocabulary.build(dataclasses.replace(ten, datasets={name: 1.0}), str(path), size)


def test_a_model_from_elsewhere_is_used_as_it_is(ten, path):
    Path(f"{path}.json").unlink()
    path.write_bytes(b"mine")
    vocabulary.build(dataclasses.replace(ten, datasets={"ramp/five": 1.0}), str(path), size=401)
    assert path.read_bytes() == b"mine" and len(list(path.parent.iterdir())) == 1


def test_a_size_without_room_is_refused(ten, tmp_path):
    with pytest.raises(ValueError, match="size 200 is too small"):
        vocabulary.build(ten, str(tmp_path / "v.model"), size=200)
    assert not list(tmp_path.iterdir())
