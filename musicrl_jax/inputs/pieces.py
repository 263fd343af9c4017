"""Text as pieces, by a SentencePiece model or a BERT's tokenizer.json of Hugging Face.

A SentencePiece model from `vocabulary.build` folds case, unifies compatibility forms (NFKC) and
spells in bytes what no piece covers, so no text of any script is unknown. A tokenizer.json has
rules of its own. What it does not cover is [UNK], and a text is put between [CLS] and [SEP], also
if it is cut. Both kinds pad with 0.

Legend: B texts, L text pieces.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers

PADDING = 0
# Pieces of a BERT's vocabulary that stand for no text.
WORDLESS = ("[PAD]", "[CLS]", "[SEP]")
# Characters of a prompt that a message shows.
LONGEST_SHOWN = 80
Reader = Callable[[str], list[int]]


def content(vocabulary: str) -> bytes:
    """Returns the bytes of a vocabulary's file. Raises FileNotFoundError without one."""
    if not Path(vocabulary).is_file():
        raise FileNotFoundError(
            f"vocabulary: {vocabulary!r} is no file; `musicrl vocabulary` writes one from the "
            "captions, `musicrl fetch` brings a pretrained model's"
        )
    return Path(vocabulary).read_bytes()


def size(model: bytes) -> int:
    """Returns the number of pieces of a vocabulary, including padding and other special pieces."""
    if _is_bert(model):
        return _tokenizer(model).get_vocab_size()
    return _sentencepiece(model).get_piece_size()


def reader(model: bytes, length: int) -> Reader:
    """Returns a function from a text to its pieces, at most `length`, including [CLS] and [SEP].

    Raises ValueError if `model` is not a supported vocabulary.
    """
    if not _is_bert(model):
        processor = _sentencepiece(model)
        return lambda text: processor.encode(text)[:length]
    tokenizer = _tokenizer(model)
    tokenizer.enable_truncation(length)
    return lambda text: tokenizer.encode(text).ids


def padded(ids: Sequence[int], length: int) -> np.ndarray:
    """Returns pieces as int32 [length], padded with 0."""
    return np.pad(np.asarray(ids, np.int32), (0, length - len(ids)))


def encode(model: bytes, prompts: Sequence[str], length: int) -> np.ndarray:
    """Returns the pieces of prompts, i32 [B, L], cut or padded with 0 to L = `length` pieces.

    Raises ValueError if a prompt is not Unicode, is empty, or has only unknown words.
    """
    read, wordless, unknown = _prepared(model, length)
    rows = np.zeros((len(prompts), length), np.int32)  # [B, L]
    for row, prompt in zip(rows, prompts, strict=True):
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise ValueError(f"prompt {prompt!r} is not valid Unicode: give it in UTF-8") from None
        ids = read(prompt)
        words = set(ids) - wordless
        if not prompt.strip() or not words:
            raise ValueError(f"prompt {prompt!r} is empty: say what the music should be like")
        if words <= unknown:
            shown = prompt if len(prompt) <= LONGEST_SHOWN else f"{prompt[:LONGEST_SHOWN]}..."
            raise ValueError(
                f"prompt {shown!r} has nothing that the vocabulary knows: use other words"
            )
        row[: len(ids)] = ids
    return rows


# A service encodes one prompt at a time, and a tokenizer.json takes 0.1 s to load.
@functools.lru_cache(maxsize=4)
def _prepared(model: bytes, length: int) -> tuple[Reader, set[int], set[int]]:
    """Returns the reader, the pieces that stand for no text, and those for unknown text."""
    if not _is_bert(model):
        return reader(model, length), {PADDING}, {_sentencepiece(model).unk_id()}
    number = _tokenizer(model).token_to_id
    return reader(model, length), set(map(number, WORDLESS)), {number("[UNK]")}


# --- Vocabularies ---


def _is_bert(model: bytes) -> bool:
    return model.startswith(b"{")


def _sentencepiece(model: bytes) -> sentencepiece.SentencePieceProcessor:
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError:
        raise ValueError(
            "the vocabulary is neither a SentencePiece model nor a tokenizer.json"
        ) from None
    if processor.pad_id() != PADDING:
        raise ValueError(
            f"the SentencePiece model's padding is {processor.pad_id()}, not 0: "
            "train it with pad_id=0"
        )
    return processor


def _tokenizer(model: bytes) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(model.decode())
    except Exception as error:  # the library raises no narrower type
        raise ValueError(f"the vocabulary is no tokenizer.json: {error}") from error
    # Settings of the file for padding do not count: padding is done here.
    tokenizer.no_padding()
    padding, cls, sep = map(tokenizer.token_to_id, WORDLESS)
    ids = tokenizer.encode("a").ids
    if padding != PADDING or None in (cls, sep) or (ids[0], ids[-1]) != (cls, sep):
        raise ValueError(
            "the tokenizer.json is no BERT's: it must have [PAD] = 0 and put a text between [CLS] "
            "and [SEP]"
        )
    return tokenizer
