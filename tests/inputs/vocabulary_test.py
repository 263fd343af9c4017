"""A trained vocabulary: equal bytes from equal captions, and refusals."""

from pathlib import Path

import pytest

from musicrl_jax.inputs import vocabulary
from musicrl_jax.inputs.clips import Clips


def test_the_same_captions_give_the_same_bytes_and_a_finished_model_is_kept(
    vocabulary_path, data_dir, tmp_path
):
    clips = Clips({"ramp/ten": 1.0}, data_dir, 100)
    again = tmp_path / "vocabulary.model"
    vocabulary.build(clips, str(again), size=400)
    assert again.read_bytes() == Path(vocabulary_path).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "vocabulary.model",
        "vocabulary.model.json",
    ]
    again.write_bytes(b"kept")
    vocabulary.build(clips, str(again), size=400)
    assert again.read_bytes() == b"kept"


def test_another_size_or_other_captions_are_refused_but_not_for_a_model_of_ones_own(
    data_dir, tmp_path
):
    path = tmp_path / "vocabulary.model"
    vocabulary.build(Clips({"ramp/ten": 1.0}, data_dir, 100), str(path), size=400)
    for name, size, message in (
        ("ten", 401, "with size 400, not 401"),
        ("five", 400, "from other captions"),
        ("five", 401, "with size 400, not 401 and from other captions"),
    ):
        with pytest.raises(
            ValueError,
            match=rf"was made {message}: give another VOCABULARY, delete it, or .*model\.json",
        ):
            vocabulary.build(Clips({f"ramp/{name}": 1.0}, data_dir, 100), str(path), size)
    (tmp_path / "vocabulary.model.json").unlink()
    path.write_bytes(b"mine")
    vocabulary.build(Clips({"ramp/five": 1.0}, data_dir, 100), str(path), size=401)
    assert path.read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 1


def test_a_size_without_room_is_refused(data_dir, tmp_path):
    with pytest.raises(ValueError, match="size 200 is too small"):
        vocabulary.build(
            Clips({"ramp/ten": 1.0}, data_dir, 100), str(tmp_path / "v.model"), size=200
        )
    assert not list(tmp_path.iterdir())
