"""A system's folder: what it refers to, and what is refused."""

import json

import pytest

from musicrl_jax.assemble import assemble
from musicrl_jax.core import checkpoint
from musicrl_jax.systems import folder, tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    tiny.write(directory)
    return directory


def test_parts_are_named_by_path_and_hash_and_an_equal_file_is_left_alone(models, tmp_path, capsys):
    parts = {name: str(models / name) for name in ("policy", "decoder")}
    out = tmp_path / "base"
    assemble(str(out), parts, "tiny")
    written = json.loads((out / folder.FILE).read_text())
    assert written["kind"] == "tiny"
    assert written["parts"]["policy"]["hash"] == checkpoint.model_hash(models / "policy")
    assert (out / written["parts"]["decoder"]["folder"]).resolve() == models / "decoder"
    assert set(folder.load(str(out)).frozen) == {"decoder"}
    before = (out / folder.FILE).stat().st_mtime_ns

    assemble(str(out), parts, "tiny")
    assert (out / folder.FILE).stat().st_mtime_ns == before
    assemble(str(out), {"decoder": parts["decoder"]}, "tiny")
    assert set(json.loads((out / folder.FILE).read_text())["parts"]) == {"decoder"}
    assert capsys.readouterr().out.splitlines() == [
        f"{out}: assembled of decoder, policy (to play and encode)",
        f"{out}: assembled already (to play and encode)",
        f"{out}: assembled of decoder (to encode)",
    ]


@pytest.mark.parametrize(
    ("parts", "kind", "complaint"),
    [
        (
            {"policy": "policy", "codec": "decoder"},
            "tiny",
            "tiny has no part 'codec', only policy, decoder",
        ),
        (
            {"policy": "policy"},
            "tiny",
            "has policy, and a system of kind tiny needs: to play, policy, decoder; to enc",
        ),
        ({}, "tiny", "assemble.parts has none, and a system of kind tiny needs"),
        (
            {"policy": "policy", "decoder": "nowhere"},
            "tiny",
            "decoder is '.*nowhere', which holds no model: train it",
        ),
        ({"policy": "policy"}, "organ", "is a system of kind 'organ', which is none of"),
    ],
)
def test_what_is_no_system_is_refused(models, parts, kind, complaint, tmp_path):
    parts = {name: str(models / part) for name, part in parts.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=complaint):
        assemble(str(tmp_path / "base"), parts, kind)
    assert not (tmp_path / "base").exists()
