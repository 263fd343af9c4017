"""A SentencePiece model, trained on captions, that can spell anything.

Case is folded and compatibility forms are unified (NFKC) before a text is cut into pieces; what no piece
covers is spelt in bytes, so that there is no unknown text in any script. Piece 0 is padding, 1 the end of a
text (not used), 2 unknown. `pieces.py` reads it.
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
    """Trains a model of at most `size` pieces on the train captions; does nothing where `path` is there.

    Few captions give fewer pieces. The same captions give the same bytes. `path`.json says what a model was
    made from; one without it, brought from elsewhere, is used as it is. ValueError where `path` was made with
    another size or from other captions, or `size` has no room for bytes and letters.
    """
    captions, made_from = data.captions("train"), Path(f"{path}.json")
    wanted = {"size": size, "captions": hashlib.sha256(json.dumps(captions).encode()).hexdigest()}
    if Path(path).exists():
        kind, remedy = {"size": int, "captions": str}, f"delete it to use {path} as it is"
        found = read_json(made_from, kind, remedy) if made_from.exists() else wanted
        told = {"size": f"with size {found['size']}, not {size}", "captions": "from other captions"}
        if changed := [told[name] for name in wanted if found[name] != wanted[name]]:
            raise ValueError(
                f"vocabulary {path} was made {' and '.join(changed)}: give another VOCABULARY, delete it, "
                f"or delete {made_from} to use it as it is"
            )
        return
    model = io.BytesIO()
    hosts.stop_point()  # not again before the end: the trainer takes no signal, and little time
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
            num_threads=1,  # the sums of several threads differ in their last digits
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"size {size} is too small: {BYTE_PIECES} pieces are bytes, besides all letters ({error})"
        ) from None
    write_json(made_from, wanted)  # first: a model without it counts as brought from elsewhere
    partial = Path(f"{path}.partial")
    partial.write_bytes(model.getvalue())
    os.replace(partial, path)
