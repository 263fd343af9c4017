"""Text as pieces, by a vocabulary's file: a SentencePiece model, or a Hugging Face tokenizer.json of a BERT.

A SentencePiece model that `vocabulary.build` made folds case, unifies compatibility forms (NFKC) and spells in bytes
what no piece covers, so that no text is unknown in any script. A tokenizer.json brings its own rules; what it does not
cover is [UNK], and a text stands between [CLS] and [SEP], also where it is cut. In both, 0 fills up.

Legend: B texts, L text pieces.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers

PADDING = 0
Reader = Callable[[str], list[int]]


def content(vocabulary: str) -> bytes:
    """A vocabulary's file; FileNotFoundError where there is none."""
    if not Path(vocabulary).is_file():
        raise FileNotFoundError(
            f"vocabulary: {vocabulary!r} is no file; `musicrl vocabulary` writes one from the captions, "
            "`musicrl fetch` brings a pretrained model's"
        )
    return Path(vocabulary).read_bytes()


def size(model: bytes) -> int:
    """The number of pieces that a vocabulary's content has, padding and others that stand for no text included."""
    if model.startswith(b"{"):
        return _tokenizer(model).get_vocab_size()
    return _sentencepiece(model).get_piece_size()


def reader(model: bytes, length: int) -> Reader:
    """A function from a text to its pieces, at most `length`; [CLS] and [SEP] are among them where there are such.

    ValueError where `model` is no vocabulary that this knows.
    """
    if not model.startswith(b"{"):
        processor = _sentencepiece(model)
        return lambda text: processor.encode(text)[:length]
    tokenizer = _tokenizer(model)
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    return lambda text: tokenizer.encode(text).ids


def filled(ids: Sequence[int], length: int) -> np.ndarray:
    """Pieces as int32 [length], filled up with 0."""
    return np.pad(np.asarray(ids, np.int32), (0, length - len(ids)))


def encode(model: bytes, prompts: Sequence[str], length: int) -> np.ndarray:
    """Prompts as pieces, i32 [B, L]: filled up with 0, and cut after `length` pieces.

    ValueError where a prompt is not Unicode, has nothing to say, or has nothing that the vocabulary knows.
    """
    read, silent, unknown = _prepared(model, length)
    rows = []
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise ValueError(f"prompt {prompt!r} is not valid Unicode: give it in UTF-8") from None
        ids = read(prompt)
        said = set(ids) - silent
        if not prompt.strip() or not said:
            raise ValueError(f"prompt {prompt!r} is empty: say what the music should be like")
        if said <= unknown:
            raise ValueError(
                f"prompt {_short(prompt)} has nothing that the vocabulary knows: say it in other words"
            )
        rows.append(filled(ids, length))
    return np.stack(rows) if rows else np.zeros((0, length), np.int32)  # [B, L]


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 80 else prompt[:80] + "...")


@functools.lru_cache(
    maxsize=4
)  # a service encodes a prompt at a time, and a tokenizer.json takes a tenth of a second
def _prepared(model: bytes, length: int) -> tuple[Reader, set[int], set[int]]:
    return reader(model, length), *_without_words(model)


def _without_words(model: bytes) -> tuple[set[int], set[int]]:
    """(pieces that stand for no text, pieces that stand for unknown text)."""
    if not model.startswith(b"{"):
        return {PADDING}, {_sentencepiece(model).unk_id()}
    tokenizer = _tokenizer(model)
    return {tokenizer.token_to_id(token) for token in ("[PAD]", "[CLS]", "[SEP]")}, {
        tokenizer.token_to_id("[UNK]")
    }


def _sentencepiece(model: bytes) -> sentencepiece.SentencePieceProcessor:
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError:
        raise ValueError(
            "the vocabulary is neither a SentencePiece model nor a tokenizer.json"
        ) from None
    if processor.pad_id() != PADDING:
        raise ValueError(
            f"the SentencePiece model's padding is {processor.pad_id()}, not 0: train it with pad_id=0"
        )
    return processor


def _tokenizer(model: bytes) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(model.decode())
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"the vocabulary is no tokenizer.json: {error}") from error
    found = [tokenizer.token_to_id(token) for token in ("[PAD]", "[CLS]", "[SEP]")]
    ids = tokenizer.encode("a").ids
    if (
        found[0] != PADDING
        or None in found
        or [ids[0], [i for i in ids if i != PADDING][-1]] != found[1:]
    ):
        raise ValueError(
            "the tokenizer.json is no BERT's: it must have [PAD] = 0 and put a text between [CLS] and [SEP]"
        )
    return tokenizer
