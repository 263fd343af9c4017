"""Pieces of both kinds of vocabulary: against SentencePiece's own decoder, Unicode's tables and BERT's own rules."""

import json
import unicodedata

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from musicrl_jax.inputs import pieces
from musicrl_jax.inputs.clips import Clips

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "a",
    "slow",
    "fast",
    "jig",
    "##s",
    ",",
    "for",
    "all",
    "gro",
    "##ßer",
    "音",
    "ا",
]


@pytest.fixture(scope="module")
def model(vocabulary_path):
    return pieces.content(vocabulary_path)


@pytest.fixture(scope="module")
def processor(model):
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def bert_json(words=WORDS, single=("[CLS]", "A", "[SEP]")):
    """A tokenizer.json as the published ones are, with settings for cutting and filling that must not matter."""
    template = [
        {"SpecialToken" if name != "A" else "Sequence": {"id": name, "type_id": 0}}
        for name in single
    ]
    special = {
        name: {"id": name, "ids": [words.index(name)], "tokens": [name]}
        for name in single
        if name != "A"
    }
    content = {
        "version": "1.0",
        "truncation": {"max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": 9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "[PAD]",
        },
        "added_tokens": [],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": template,
            "pair": [],
            "special_tokens": special,
        },
        "decoder": None,
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {word: number for number, word in enumerate(words)},
        },
    }
    return json.dumps(content).encode()


@pytest.fixture(scope="module")
def bert():
    return bert_json()


def words(processor, row):
    return processor.decode(row[row != 0].tolist())


@given(TEXT)
def test_any_text_comes_back_normalised(model, processor, text):
    normal = processor.normalize(text).replace("\u2581", " ").strip()
    if not text.strip() or not normal:
        with pytest.raises(ValueError, match=r"prompt .* is empty"):
            pieces.encode(model, [text], 256)
        return
    (row,) = pieces.encode(model, [text], 256)
    assert words(processor, row).strip() == normal
    assert not np.isin(row[row != 0], [processor.unk_id(), processor.eos_id()]).any()


@given(st.text("abcXYZ 0159,.'äÖéñжЯλΩ音楽🎵한ﬁ½", max_size=40).filter(str.strip))
def test_normalisation_is_nfkc_with_case_folded(model, processor, text):
    (row,) = pieces.encode(model, [text], 256)
    expected = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    assert words(processor, row) == " ".join(expected.split())


def test_known_words_are_few_pieces_and_the_rest_is_padding(model, processor):
    (row,) = pieces.encode(model, ["a slow jig for all, größer"], 64)
    count = np.count_nonzero(row)
    assert 0 < count < 20
    assert np.all(row[:count] > 2) and not row[count:].any()
    assert processor.pad_id() == 0


def test_long_prompts_are_cut(model):
    long = "slow jig " * 10_000
    (cut,) = pieces.encode(model, [long], 8)
    (whole,) = pieces.encode(model, [long], 40_000)
    np.testing.assert_array_equal(cut, whole[:8])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A slow JIG", "[CLS] a slow jig [SEP]"),
        ("fast jigs, größer", "[CLS] fast jig ##s , gro ##ßer [SEP]"),
        ("音音 a", "[CLS] 音 音 a [SEP]"),  # each Chinese character is a word
        ("a 🎵 jig", "[CLS] a [UNK] jig [SEP]"),
        ("ا", "[CLS] ا [SEP]"),
    ],
)
def test_word_pieces_follow_berts_rules(bert, text, expected):
    ids = [WORDS.index(word) for word in expected.split()]
    np.testing.assert_array_equal(pieces.encode(bert, [text], 10), [ids + [0] * (10 - len(ids))])


@given(text=TEXT, length=st.integers(3, 12))
def test_word_pieces_of_any_text_stand_between_cls_and_sep_or_it_is_named(text, length):
    try:
        (row,) = pieces.encode(bert_json(), [text], length)
    except ValueError as error:
        assert str(error).startswith("prompt ") and (
            "is empty" in str(error) or "knows" in str(error)
        )
        return
    assert row.shape == (length,) and row.dtype == np.int32
    said = row[row != 0]
    assert (said[0], said[-1]) == (2, 3) and not row[len(said) :].any()
    assert ((said[1:-1] > 3) | (said[1:-1] == 1)).all() and (said > 3).any()


def test_long_word_pieces_are_cut_before_sep(bert):
    (row,) = pieces.encode(bert, ["slow jig " * 1200], 7)
    assert [WORDS[i] for i in row] == ["[CLS]", "slow", "jig", "slow", "jig", "slow", "[SEP]"]


@pytest.mark.parametrize("kind", ["model", "bert"])
@pytest.mark.parametrize("prompt", ["", " ", "\t\n", "\u3000", "\u200b"])
def test_empty_prompts_are_refused(request, kind, prompt):
    with pytest.raises(ValueError, match=r"prompt .* is empty: say what the music should be like"):
        pieces.encode(request.getfixturevalue(kind), ["a jig", prompt], 8)


@pytest.mark.parametrize("prompt", ["🎵🎵", "x" * 10_000, "q w"])
def test_prompts_of_unknown_words_alone_are_refused(bert, prompt):
    with pytest.raises(ValueError, match=r"prompt '.{1,85} has nothing that the vocabulary knows"):
        pieces.encode(bert, [prompt], 8)


@pytest.mark.parametrize("kind", ["model", "bert"])
def test_broken_unicode_is_refused(request, kind):
    with pytest.raises(ValueError, match=r"prompt .* is not valid Unicode"):
        pieces.encode(request.getfixturevalue(kind), ["a jig \udcff"], 8)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"nonsense", "neither a SentencePiece model nor a tokenizer.json"),
        (b"{}", "no tokenizer.json"),
        (b'{"version": ', "no tokenizer.json"),
        (bert_json([*WORDS[1:4], "[PAD]", *WORDS[4:]]), r"\[PAD\] = 0"),
        (bert_json(single=("A", "[SEP]")), r"between \[CLS\] and \[SEP\]"),
    ],
)
def test_what_is_no_vocabulary_is_named(content, complaint):
    with pytest.raises(ValueError, match=complaint):
        pieces.encode(content, ["a"], 8)


def test_sizes(model, bert, processor):
    assert (pieces.size(model), pieces.size(bert)) == (processor.get_piece_size(), len(WORDS))


def test_the_pipeline_gives_the_same_word_pieces_to_the_bit_and_again(bert, data_dir, tmp_path):
    """Captions of clips, read by SeqIO, in any order of threads."""
    path = tmp_path / "tokenizer.json"
    path.write_bytes(bert)
    clips = Clips(
        {"ramp/ten": 1.0}, data_dir, 100, vocabulary=str(path), text_length=7, with_captions=True
    )
    first, again = (next(clips.batches("train", 10, seed=3)) for _ in range(2))
    np.testing.assert_array_equal(first["text"], pieces.encode(bert, list(first["caption"]), 7))
    np.testing.assert_array_equal(first["text"], again["text"])
