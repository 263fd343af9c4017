"""A token folder that holds nothing but its manifest, and a vocabulary."""

import io
import json

import pytest
import sentencepiece

from musicrl_jax.inputs.tokens import SCHEMA, Tokens


@pytest.fixture(scope="session")
def token_models():
    """Hashes of the models that wrote the tokens."""
    return {"codec": "c0", "semantic": "5e", "mulan": "a1"}


@pytest.fixture(scope="session")
def tokens_of(tmp_path_factory, token_models):
    """(layout) -> Tokens that the models wrote in it."""

    def make(**layout):
        folder = tmp_path_factory.mktemp("tokens")
        manifest = {"schema": SCHEMA, "models": token_models, "layout": layout, "counts": {}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return Tokens(str(folder))

    return make


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory):
    """Path of a SentencePiece model of 275 pieces, made from four captions: "a low tone" and so on."""
    captions = [f"a {word} tone" for word in ("low", "middling", "high", "shrill")]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions * 20),
        model_writer=model,
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("vocabulary") / "v.model"
    path.write_bytes(model.getvalue())
    return str(path)
