"""Collecting votes with a system that plays tones: what is written, by whom it is signed, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from musicrl_jax import collect
from musicrl_jax.arena import ears
from musicrl_jax.arena.audience import Audience
from musicrl_jax.arena.listeners import training_panel
from musicrl_jax.collect import CollectConfig
from musicrl_jax.core import sharding
from musicrl_jax.inputs.votes import FIGURES, Vote, Votes, read_votes, write_votes
from musicrl_jax.systems import tiny

SAMPLES = 16_000


@dataclasses.dataclass(frozen=True)
class FakePrompts:
    """Five training and two validation prompts."""

    def unique(self, split):
        return {"train": [f"tune {i}" for i in range(5)], "validation": ["other 0", "other 1"]}[
            split
        ]


@dataclasses.dataclass(frozen=True)
class FakeClips:
    """What is known of the prompts."""

    with_captions: bool = False

    def splits(self):
        return ["train", "validation"]

    def captions(self, split):
        return FakePrompts().unique(split)

    def attributes(self, split):
        return {f"{split}-{i}": {"family": "reeds"} for i, _ in enumerate(self.captions(split))}

    def count(self, split):
        return 5

    def batches(self, split, batch_size, seed, epochs):
        assert self.with_captions
        yield {
            "audio": np.zeros((5, 16_000), np.float32),
            "id": np.array([f"train-{i}" for i in range(5)]),
        }


class Pitch:
    """Ears that hear how high a clip sounds, as roughness; the lower the better."""

    def __init__(self, wavs, asked):
        assert len(wavs) == len(asked) == 5

    def measure(self, wav, asked):
        assert asked == {"family": "reeds"} and wav.shape == (SAMPLES,)
        return np.eye(12)[4] * -1000 * np.diff(wav).std(dtype=np.float64)


def collected(folder, **settings):
    config = CollectConfig(**{"pairs": 40, "clip_seconds": 1.0, "batch_size": 4, **settings})
    if not (folder / "system").exists():
        tiny.write(folder / "system")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ears, "Ears", Pitch)
        audience = Audience(training_panel(), FakeClips())
        collect.collect(f"{folder}/votes", f"{folder}/system", FakePrompts(), audience, config)
    return f"{folder}/votes"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return collected(tmp_path_factory.mktemp("collected"))


def test_every_pair_is_played_and_voted_on(folder):
    cast = read_votes(folder)
    assert len(cast) == 40 and len({(vote.a, vote.b) for vote in cast}) == 40
    assert {vote.prompt for vote in cast} == {
        *FakePrompts().unique("train"),
        *FakePrompts().unique("validation"),
    }
    assert all(vote.listener.startswith("simulated listener ") for vote in cast)
    data = Votes(folder)
    assert data.count("train") + data.count("validation") == sum(vote.counts for vote in cast)
    assert data.count("validation") <= 4 < data.count("train")


def test_what_is_liked_is_in_the_tokens(folder):
    """A token is a pitch: the lower clip is chosen more often than not."""
    batch = next(Votes(folder).batches("train", Votes(folder).count("train"), seed=0, epochs=1))
    assert batch["tokens"].shape[1:] == (2, 50)
    pitch = batch["tokens"].mean(axis=2)
    lower = pitch[:, 0] - pitch[:, 1] < -0.3
    higher = pitch[:, 0] - pitch[:, 1] > 0.3
    assert batch["vote"][lower].mean() > 0.75 and batch["vote"][higher].mean() < 0.25
    assert (batch["tokens"][:, 0] != batch["tokens"][:, 1]).any(axis=1).all()


def test_agreement_is_written_and_called_what_it_is(folder):
    with open(f"{folder}/{FIGURES}") as file:
        figures = json.load(file)
    assert figures["simulated listeners"] is True and figures["panel"] == "training panel"
    assert 0.5 < figures["agreement"]["train"] < figures["ceiling"]["train"] < 1


@pytest.mark.parametrize("devices", [3, 4])
def test_each_device_draws_its_own_rows_and_their_number_changes_nothing(
    folder, devices, tmp_path, monkeypatch
):
    mesh, local_rows, shares = (
        sharding.make_mesh(devices=jax.devices()[:devices]),
        sharding.local_rows,
        set(),
    )
    monkeypatch.setattr(sharding, "make_mesh", lambda: mesh)

    def watched(array):
        shares.update(shard.data.shape for shard in array.addressable_shards)
        return local_rows(array)

    monkeypatch.setattr(sharding, "local_rows", watched)
    other = collected(tmp_path)
    assert shares == {({3: 4, 4: 2}[devices], SAMPLES)}  # of four pairs, or six
    assert read_votes(other) == read_votes(folder)
    manifests = [
        json.loads((Path(place) / "manifest.json").read_text()) for place in (folder, other)
    ]
    assert manifests[0] == manifests[1] and set(manifests[0]["content"]) == set(collect.SPLITS)


def test_batches_change_nothing_and_a_finished_folder_is_left_alone(folder, tmp_path, capsys):
    other = collected(tmp_path, batch_size=7)
    assert read_votes(other) == read_votes(folder)
    capsys.readouterr()
    collected(tmp_path)
    assert capsys.readouterr().out == f"{other}: collected already\n"
    votes = (Path(other) / "votes.jsonl").read_text()
    with pytest.raises(
        ValueError, match="was collected with other settings: name another folder, or leave"
    ):
        collected(tmp_path, pairs=41)
    manifest = json.loads((Path(other) / "manifest.json").read_text())
    manifest["models"]["decoder"] = "another"
    (Path(other) / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="was collected with other decoder"):
        collected(tmp_path)
    assert (Path(other) / "votes.jsonl").read_text() == votes and (Path(other) / "train").is_dir()


def test_a_split_that_is_missing_is_made_again_and_the_other_kept(folder, tmp_path):
    """As after a run that was cut off between the votes and the manifest."""
    other = collected(tmp_path)
    path = tmp_path / "votes/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["counts"].pop("validation")
    path.write_text(json.dumps(manifest))
    collected(tmp_path)
    assert sorted(read_votes(other)) == sorted(read_votes(folder))
    assert (tmp_path / "votes" / FIGURES).read_text() == (Path(folder) / FIGURES).read_text()


def test_a_run_that_is_cut_off_between_votes_and_tokens_keeps_its_figures(
    folder, tmp_path, monkeypatch
):
    write, done = collect.tokens.write_tokens, []

    def cut_off(*arguments):
        write(*arguments)
        done.append(arguments[1])
        if len(done) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(collect.tokens, "write_tokens", cut_off)
    with pytest.raises(KeyboardInterrupt):
        collected(tmp_path)
    collected(tmp_path)
    assert done == ["train", "validation"]
    assert (tmp_path / "votes" / FIGURES).read_text() == (Path(folder) / FIGURES).read_text()


def test_what_was_played_before_a_kill_is_not_played_again(folder, tmp_path, monkeypatch):
    """Forty pairs are ten batches; the kill comes in the seventh."""
    heard, measure = [], Pitch.measure

    def counted(ears, wav, asked):
        heard.append(wav)
        if len(heard) == 50:
            raise KeyboardInterrupt
        return measure(ears, wav, asked)

    monkeypatch.setattr(Pitch, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        collected(tmp_path)
    assert not (tmp_path / "votes/votes.jsonl").exists()
    other = collected(tmp_path)
    assert len(heard) == 50 + 80 - 6 * 8
    assert read_votes(other) == read_votes(folder)
    assert not (tmp_path / "votes" / collect.PLAYED).exists()


def test_several_listeners_hear_a_pair(tmp_path):
    cast = read_votes(collected(tmp_path, pairs=12, validation_share=0.5, votes_per_pair=3))
    assert len(cast) == 36 and len({(vote.a, vote.listener) for vote in cast}) == 36
    assert len({vote.a for vote in cast}) == 12


def test_votes_of_people_are_refused_and_simulated_figures_do_not_stay_beside_them(
    folder, tmp_path, capsys
):
    shutil.copytree(folder, tmp_path / "votes")
    path, figures = tmp_path / "votes/votes.jsonl", (tmp_path / "votes" / FIGURES).read_text()
    assert json.loads(figures)["people"] == 0
    path.write_text(path.read_text().replace("simulated listener 3 of the training panel", "Ada"))
    capsys.readouterr()
    with pytest.raises(ValueError, match="has votes of 'Ada', who is not of the training panel"):
        collected(tmp_path)
    assert not (tmp_path / "votes" / FIGURES).exists()
    assert (tmp_path / "votes/agreement.training_panel.json").read_text() == figures
    assert (
        "is of simulated listeners of the training panel, and 'Ada' voted"
        in capsys.readouterr().out
    )


def test_votes_of_people_without_tokens_are_not_replaced(tmp_path):
    (tmp_path / "votes").mkdir()
    vote = Vote(0, "a tune", "train-000000-a", "train-000000-b", "a", "Ada", [True, True])
    write_votes(f"{tmp_path}/votes", [vote])
    with pytest.raises(ValueError, match="has votes of 'Ada', who is not of the training panel"):
        collected(tmp_path)
    assert [each.listener for each in read_votes(f"{tmp_path}/votes")] == ["Ada"]


def test_tokens_without_votes_are_not_replaced(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "votes")
    (tmp_path / "votes/votes.jsonl").unlink()
    with pytest.raises(
        ValueError, match=r"holds tokens and no votes\.jsonl: it is a folder of `musicrl encode`"
    ):
        collected(tmp_path)
    assert (tmp_path / "votes/train").is_dir()


def test_agreement_on_too_few_pairs_is_no_figure(folder, tmp_path, capsys):
    """Of the folder's four validation pairs, and of seven of each."""
    assert (
        json.loads((Path(folder) / FIGURES).read_text())["agreement"]["validation"]
        == "n too small (4 < 8)"
    )
    other = collected(tmp_path, pairs=14, validation_share=0.5)
    figures = json.loads((Path(other) / FIGURES).read_text())
    assert (
        figures["agreement"]
        == figures["ceiling"]
        == dict.fromkeys(collect.SPLITS, "n too small (7 < 8)")
    )
    out = capsys.readouterr().out
    assert (
        out.count("on 7 pairs, shares of them: n too small (7 < 8)") == 2 and "agree on" not in out
    )


@pytest.mark.parametrize("damage", [b'{"agreement": {"train": null}, "ceiling": {}}', b"\xff\x00"])
def test_damaged_figures_and_damaged_clips_are_set_aside_and_made_again(
    folder, tmp_path, damage, capsys, monkeypatch
):
    """Killed after the training split; then its figures and a batch that was kept are damaged."""
    write = collect.tokens.write_tokens

    def cut_off(*arguments):
        write(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(collect.tokens, "write_tokens", cut_off)
        with pytest.raises(KeyboardInterrupt):
            collected(tmp_path)
    (tmp_path / "votes" / FIGURES).write_bytes(damage)
    for path in (tmp_path / "votes" / collect.PLAYED).iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    manifest = tmp_path / "votes/manifest.json"
    manifest.write_text(
        manifest.read_text().replace('"counts": {\n    "train": 72\n  }', '"counts": {}')
    )
    assert read_votes(collected(tmp_path)) == read_votes(folder)
    assert json.loads((tmp_path / "votes" / FIGURES).read_text()) == json.loads(
        (Path(folder) / FIGURES).read_text()
    )
    out = capsys.readouterr().out
    assert f"{tmp_path}/votes/{FIGURES} is damaged" in out and out.count("is no whole .npz") == 9


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"validation_share": 0.01},
            "validation_share=0.01 of pairs=40 leaves a split without any",
        ),
        ({"validation_share": 1.0}, "validation_share=1.0 of pairs=40 leaves a split"),
        ({"votes_per_pair": 41}, "votes_per_pair=41 must be from 1 to the panel's size, 40"),
        ({"votes_per_pair": 0}, "CollectConfig.votes_per_pair=0 must be 1 or more"),
        ({"batch_size": 0}, "CollectConfig.batch_size=0 must be 1 or more"),
        ({"clip_seconds": 0.99}, "clip_seconds=0.99 must be a multiple of 0.04 s"),
    ],
)
def test_bad_settings_are_named(tmp_path, changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        collected(tmp_path, **changes)
    assert not (tmp_path / "votes").exists()
