"""Systems that `assemble` writes, and parts that it refuses."""

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


def test_a_system_refers_to_its_parts_and_an_equal_file_stays(models, tmp_path, capsys):
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
    ("kind", "names", "complaint"),
    [
        ("tiny", "policy codec=decoder", "tiny has no part 'codec', only policy, decoder"),
        ("tiny", "policy", "has policy, and a system .* needs: to play, policy, decoder; to enc"),
        ("tiny", "", "assemble.parts has none, and a system of kind tiny needs"),
        ("tiny", "policy decoder=nowhere", "decoder is '.*nowhere', which holds no model: train"),
        ("organ", "policy", "is a system of kind 'organ', which is none of"),
    ],
)
def test_parts_that_make_no_system_are_refused(models, kind, names, complaint, tmp_path):
    parts = {}
    for name in names.split():
        part, _, folder_name = name.partition("=")
        parts[part] = str(models / (folder_name or part))
    with pytest.raises((ValueError, FileNotFoundError), match=complaint):
        assemble(str(tmp_path / "base"), parts, kind)
    assert not (tmp_path / "base").exists()
