"""Pieces against SentencePiece's own decoder and Python's Unicode tables."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from musicrl_jax.inputs import vocabulary
from musicrl_jax.inputs.clips import Clips

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture(scope="module")
def processor(vocabulary_path):
    return sentencepiece.SentencePieceProcessor(model_file=vocabulary_path)


def words(processor, row):
    return processor.decode(row[row != 0].tolist())


@given(TEXT)
def test_any_text_comes_back_normalised(vocabulary_path, processor, text):
    normal = processor.normalize(text).replace("\u2581", " ").strip()
    if not text.strip() or not normal:
        with pytest.raises(ValueError, match=r"prompt .* is empty"):
            vocabulary.encode(vocabulary_path, [text], 256)
        return
    (row,) = vocabulary.encode(vocabulary_path, [text], 256)
    assert words(processor, row).strip() == normal
    assert not np.isin(row[row != 0], [processor.unk_id(), processor.eos_id()]).any()


@given(st.text("abcXYZ 0159,.'äÖéñжЯλΩ音楽🎵한ﬁ½", max_size=40).filter(str.strip))
def test_normalisation_is_nfkc_with_case_folded(vocabulary_path, processor, text):
    (row,) = vocabulary.encode(vocabulary_path, [text], 256)
    expected = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    assert words(processor, row) == " ".join(expected.split())


def test_case_and_spacing_make_no_difference(vocabulary_path):
    a, b = vocabulary.encode(vocabulary_path, ["A  Slow JIG", "a slow jig"], 16)
    np.testing.assert_array_equal(a, b)


def test_known_words_are_few_pieces_and_the_rest_is_padding(vocabulary_path, processor):
    (row,) = vocabulary.encode(vocabulary_path, ["a slow jig for all, größer"], 64)
    pieces = np.count_nonzero(row)
    assert 0 < pieces < 20
    assert np.all(row[:pieces] > 2) and not row[pieces:].any()
    assert processor.pad_id() == 0


def test_long_prompts_are_cut(vocabulary_path):
    long = "slow jig " * 10_000
    (cut,) = vocabulary.encode(vocabulary_path, [long], 8)
    (whole,) = vocabulary.encode(vocabulary_path, [long], 40_000)
    np.testing.assert_array_equal(cut, whole[:8])


@pytest.mark.parametrize("prompt", ["", " ", "\t\n", "\u3000", "\u200b"])
def test_empty_prompts_are_refused(vocabulary_path, prompt):
    with pytest.raises(ValueError, match=r"prompt .* is empty: say what the music should be like"):
        vocabulary.encode(vocabulary_path, ["a jig", prompt], 8)


def test_broken_unicode_is_refused(vocabulary_path):
    with pytest.raises(ValueError, match=r"prompt .* is not valid Unicode"):
        vocabulary.encode(vocabulary_path, ["a jig \udcff"], 8)


def test_content_and_path_are_the_same_model(vocabulary_path):
    content = Path(vocabulary_path).read_bytes()
    np.testing.assert_array_equal(
        vocabulary.encode(content, ["lively"], 8), vocabulary.encode(vocabulary_path, ["lively"], 8)
    )


def test_the_same_captions_give_the_same_bytes_and_a_finished_model_is_kept(vocabulary_path, data_dir, tmp_path):
    clips = Clips({"ramp/ten": 1.0}, data_dir, 100)
    again = tmp_path / "vocabulary.model"
    vocabulary.build(clips, str(again), size=400)
    assert again.read_bytes() == Path(vocabulary_path).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["vocabulary.model", "vocabulary.model.json"]
    again.write_bytes(b"kept")
    vocabulary.build(clips, str(again), size=400)
    assert again.read_bytes() == b"kept"


def test_another_size_or_other_captions_are_refused_but_not_for_a_model_of_ones_own(data_dir, tmp_path):
    path = tmp_path / "vocabulary.model"
    vocabulary.build(Clips({"ramp/ten": 1.0}, data_dir, 100), str(path), size=400)
    for name, size, message in (
        ("ten", 401, "with size 400, not 401"),
        ("five", 400, "from other captions"),
        ("five", 401, "with size 400, not 401 and from other captions"),
    ):
        with pytest.raises(
            ValueError, match=rf"was made {message}: give another VOCABULARY, delete it, or .*model\.json"
        ):
            vocabulary.build(Clips({f"ramp/{name}": 1.0}, data_dir, 100), str(path), size)
    (tmp_path / "vocabulary.model.json").unlink()
    path.write_bytes(b"mine")
    vocabulary.build(Clips({"ramp/five": 1.0}, data_dir, 100), str(path), size=401)
    assert path.read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 1


def test_a_size_without_room_is_refused(data_dir, tmp_path):
    with pytest.raises(ValueError, match="size 200 is too small"):
        vocabulary.build(Clips({"ramp/ten": 1.0}, data_dir, 100), str(tmp_path / "v.model"), size=200)
    assert not list(tmp_path.iterdir())
