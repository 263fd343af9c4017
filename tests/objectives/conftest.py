"""Fixtures: a folder of tokens that has nothing but its manifest."""

import json

import pytest

from musicrl_jax.inputs.tokens import SCHEMA, Tokens


@pytest.fixture(scope="session")
def token_models():
    """Returns hashes of the models that wrote the tokens."""
    return {"codec": "c0", "semantic": "5e", "mulan": "a1"}


@pytest.fixture(scope="session")
def tokens_of(tmp_path_factory, token_models):
    """Returns a function that writes a manifest with a layout, and returns its Tokens."""

    def make(**layout):
        folder = tmp_path_factory.mktemp("tokens")
        manifest = {"schema": SCHEMA, "models": token_models, "layout": layout}
        manifest |= {"data": {}, "counts": {}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return Tokens(str(folder))

    return make
