"""Trains a SentencePiece model on captions. It can spell any text.

Before a text is cut into pieces, case is folded and compatibility forms are unified (NFKC).
Characters that no piece covers are spelt in bytes, so no text of any script is unknown. Piece 0 is
padding, 1 the end of a text (not used), 2 unknown. `pieces.py` reads the model.
"""

import hashlib
import io
import json
import os
from pathlib import Path

import sentencepiece

from musicrl_jax.core import hosts, lock
from musicrl_jax.core.files import read_json, write_json
from musicrl_jax.inputs.clips import Clips

BYTE_PIECES = 256


@lock.holds("path", beside=True)
def build(data: Clips, path: str, size: int) -> None:
    """Trains a model of at most `size` pieces on the train captions, unless `path` exists.

    Few captions give fewer pieces. The same captions give the same bytes. `path`.json records size
    and captions. A model without that file comes from elsewhere and is used as it is.

    Raises ValueError if `path` was made with another size or from other captions, or if `size`
    leaves no room for bytes and letters.
    """
    # An existing model: check what it was made from.
    captions, record = data.captions("train"), Path(f"{path}.json")
    source = {"size": size, "captions": hashlib.sha256(json.dumps(captions).encode()).hexdigest()}
    if Path(path).exists():
        changes = []
        if record.exists():
            kind, remedy = {"size": int, "captions": str}, f"delete it to use {path} as it is"
            old = read_json(record, kind, remedy)
            if old["size"] != size:
                changes.append(f"with size {old['size']}, not {size}")
            if old["captions"] != source["captions"]:
                changes.append("from other captions")
        if changes:
            raise ValueError(
                f"vocabulary {path} was made {' and '.join(changes)}: give another VOCABULARY, "
                f"delete it, or delete {record} to use it as it is"
            )
        return

    # A new model.
    model = io.BytesIO()
    # The trainer takes little time and no signal.
    hosts.stop_point()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(captions),
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
            # The sums of several threads differ in their last digits.
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"size {size} is too small: {BYTE_PIECES} pieces are bytes, and letters need more "
            f"({error})"
        ) from None
    # First: a model without it counts as one from elsewhere.
    write_json(record, source)
    partial = Path(f"{path}.partial")
    partial.write_bytes(model.getvalue())
    os.replace(partial, path)
