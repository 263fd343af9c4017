"""Pieces against SentencePiece's own decoder, Unicode's tables and BERT's own rules."""

import dataclasses
import re
import unicodedata

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors

from musicrl_jax.inputs import pieces

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    *["a", "slow", "fast", "jig", "##s", ",", "for", "all", "gro", "##ßer", "音", "ا"],
]


@pytest.fixture(scope="module")
def model(vocabulary_path):
    return pieces.content(vocabulary_path)


@pytest.fixture(scope="module")
def processor(model):
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def bert_json(words=WORDS, single="[CLS] $A [SEP]"):
    """Returns a tokenizer.json with padding and truncation of its own, which must not matter."""
    tokenizer = tokenizers.Tokenizer(
        models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [(token, words.index(token)) for token in single.split() if token != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    return tokenizer.to_str().encode()


@pytest.fixture(scope="module")
def bert():
    return bert_json()


def decode(processor, row):
    return processor.decode(row[row != 0].tolist())


@given(TEXT)
def test_any_text_decodes_to_its_normal_form(model, processor, text):
    normal = processor.normalize(text).replace("\u2581", " ").strip()
    if not text.strip() or not normal:
        with pytest.raises(ValueError, match=r"prompt .* is empty"):
            pieces.encode(model, [text], 256)
        return
    (row,) = pieces.encode(model, [text], 256)
    assert decode(processor, row).strip() == normal
    assert not np.isin(row[row != 0], [processor.unk_id(), processor.eos_id()]).any()


@given(st.text("abcXYZ 0159,.'äÖéñжЯλΩ音楽🎵한ﬁ½", max_size=40).filter(str.strip))
def test_normalisation_is_nfkc_with_case_folded(model, processor, text):
    (row,) = pieces.encode(model, [text], 256)
    expected = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    assert decode(processor, row) == " ".join(expected.split())


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
        # Each Chinese character is a word.
        ("音音 a", "[CLS] 音 音 a [SEP]"),
        ("a 🎵 jig", "[CLS] a [UNK] jig [SEP]"),
        ("ا", "[CLS] ا [SEP]"),
    ],
)
def test_word_pieces_follow_berts_rules(bert, text, expected):
    ids = [WORDS.index(word) for word in expected.split()]
    np.testing.assert_array_equal(pieces.encode(bert, [text], 10), [ids + [0] * (10 - len(ids))])


@given(text=TEXT, length=st.integers(3, 12))
def test_word_pieces_of_any_text_are_between_cls_and_sep_or_it_is_refused(bert, text, length):
    try:
        (row,) = pieces.encode(bert, [text], length)
    except ValueError as error:
        assert re.match(r"prompt .*(is empty|knows)", str(error), re.DOTALL)
        return
    assert row.shape == (length,) and row.dtype == np.int32
    ids = row[row != 0]
    assert (ids[0], ids[-1]) == (2, 3) and not row[len(ids) :].any()
    assert ((ids[1:-1] > 3) | (ids[1:-1] == 1)).all() and (ids > 3).any()


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
    ("content", "message"),
    [
        (b"nonsense", "neither a SentencePiece model nor a tokenizer.json"),
        (b"{}", "no tokenizer.json"),
        (b'{"version": ', "no tokenizer.json"),
        (bert_json([*WORDS[1:4], "[PAD]", *WORDS[4:]]), r"\[PAD\] = 0"),
        (bert_json(single="$A [SEP]"), r"between \[CLS\] and \[SEP\]"),
    ],
)
def test_other_files_are_refused(content, message):
    with pytest.raises(ValueError, match=message):
        pieces.encode(content, ["a"], 8)


def test_the_size_counts_all_pieces(model, bert, processor):
    assert (pieces.size(model), pieces.size(bert)) == (processor.get_piece_size(), len(WORDS))


def test_the_pipeline_gives_the_same_word_pieces_each_time(bert, ten, tmp_path):
    """SeqIO tokenizes captions in several threads."""
    path = tmp_path / "tokenizer.json"
    path.write_bytes(bert)
    fields = {"vocabulary": str(path), "text_length": 7, "with_captions": True}
    clips = dataclasses.replace(ten, **fields)
    first, again = (next(clips.batches("train", 10, seed=3)) for _ in range(2))
    np.testing.assert_array_equal(first["text"], pieces.encode(bert, list(first["caption"]), 7))
    np.testing.assert_array_equal(first["text"], again["text"])
