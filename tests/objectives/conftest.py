"""A token folder that holds nothing but its manifest."""

import json

import pytest

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
        manifest = {
            "schema": SCHEMA,
            "models": token_models,
            "layout": layout,
            "data": {},
            "counts": {},
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return Tokens(str(folder))

    return make
