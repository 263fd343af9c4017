"""Text as pieces: a SentencePiece model, trained on captions, that can spell anything.

Case is folded and compatibility forms are unified (NFKC) before a text is cut into pieces; what no piece
covers is spelt in bytes, so that there is no unknown text in any script. Piece 0 is padding, 1 the end of a
text (not used), 2 unknown.

Legend: B prompts, L text pieces.
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from musicrl_jax.inputs.clips import Clips

BYTE_PIECES = 256


def build(data: Clips, path: str, size: int) -> None:
    """Trains a model of at most `size` pieces on the train captions; does nothing where `path` is there.

    Few captions give fewer pieces. The same captions give the same bytes. ValueError where `size` has no
    room for bytes and letters.
    """
    if Path(path).exists():
        return
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(data.captions("train")),
            model_writer=model,
            model_type="unigram",
            vocab_size=size,
            hard_vocab_limit=False,
            byte_fallback=True,
            normalization_rule_name="nmt_nfkc_cf",
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,  # the sums of several threads differ in their last digits
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"size {size} is too small: {BYTE_PIECES} pieces are bytes, besides all letters ({error})"
        ) from None
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    partial = Path(f"{path}.partial")
    partial.write_bytes(model.getvalue())
    os.replace(partial, path)


def encode(model: bytes | str, prompts: Sequence[str], length: int) -> np.ndarray:
    """Prompts as pieces, i32 [B, L]: filled up with 0, and cut after `length` pieces.

    `model` is the content of a SentencePiece model, or its path. ValueError where a prompt has nothing to
    say or is not text.
    """
    content = model if isinstance(model, bytes) else Path(model).read_bytes()
    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    text = np.zeros((len(prompts), length), np.int32)  # [B, L]
    for row, prompt in zip(text, prompts, strict=True):
        try:
            pieces = processor.encode(prompt.encode())[:length]
        except UnicodeEncodeError:
            raise ValueError(f"prompt {prompt!r} is not valid Unicode: give it in UTF-8") from None
        if not prompt.strip() or not pieces:
            raise ValueError(f"prompt {prompt!r} is empty: say what the music should be like")
        row[: len(pieces)] = pieces
    return text
