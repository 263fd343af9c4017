"""Votes on clips of the tiny system: contents, signatures, restarts and refusals."""

import dataclasses
import functools
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
from musicrl_jax.systems.player import Player

SAMPLES = 16_000
cached_player = functools.cache(Player)  # compiles once for all runs of this file


@dataclasses.dataclass(frozen=True)
class FakePrompts:
    """Five training and two validation prompts."""

    def unique(self, split):
        prompts = {"train": [f"tune {i}" for i in range(5)], "validation": ["other 0", "other 1"]}
        return prompts[split]


@dataclasses.dataclass(frozen=True)
class FakeClips:
    """Silent clips whose captions are the prompts."""

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
    """Ears that measure pitch as roughness: listeners like low clips."""

    def __init__(self, wavs, attributes):
        assert len(wavs) == len(attributes) == 5

    def measure(self, wav, attributes):
        assert attributes == {"family": "reeds"} and wav.shape == (SAMPLES,)
        return np.eye(12)[4] * -1000 * np.diff(wav).std(dtype=np.float64)


def collected(folder, **settings):
    """Collects votes and returns their folder."""
    config = CollectConfig(**{"pairs": 40, "clip_seconds": 1.0, "batch_size": 4, **settings})
    if not (folder / "system").exists():
        tiny.write(folder / "system")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ears, "Ears", Pitch)
        patch.setattr(collect, "Player", cached_player)
        audience = Audience(training_panel(), FakeClips())
        collect.collect(f"{folder}/votes", f"{folder}/system", FakePrompts(), audience, config)
    return f"{folder}/votes"


def figures_of(votes):
    return json.loads((Path(votes) / FIGURES).read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return collected(tmp_path_factory.mktemp("collected"))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Interrupts a run after the training split; its batches are still on disk."""
    path, write = tmp_path_factory.mktemp("interrupted"), collect.tokens.write_tokens

    def write_and_interrupt(*arguments):
        write(*arguments)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect.tokens, "write_tokens", write_and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            collected(path)
    return path


def test_every_pair_is_played_and_voted_on(folder):
    cast = read_votes(folder)
    assert len(cast) == 40 and len({(vote.a, vote.b) for vote in cast}) == 40
    prompts = {*FakePrompts().unique("train"), *FakePrompts().unique("validation")}
    assert {vote.prompt for vote in cast} == prompts
    assert all(vote.listener.startswith("simulated listener ") for vote in cast)
    data = Votes(folder)
    assert data.count("train") + data.count("validation") == sum(vote.counts for vote in cast)
    assert data.count("validation") <= 4 < data.count("train")


def test_listeners_choose_by_sound_that_the_tokens_encode(folder):
    """A token is a pitch, and listeners choose the lower clip more often than not."""
    batch = next(Votes(folder).batches("train", Votes(folder).count("train"), seed=0, epochs=1))
    assert batch["tokens"].shape[1:] == (2, 50)
    pitch = batch["tokens"].mean(axis=2)
    lower = pitch[:, 0] - pitch[:, 1] < -0.3
    higher = pitch[:, 0] - pitch[:, 1] > 0.3
    assert batch["vote"][lower].mean() > 0.75 and batch["vote"][higher].mean() < 0.25
    assert (batch["tokens"][:, 0] != batch["tokens"][:, 1]).any(axis=1).all()


def test_figures_say_that_listeners_are_simulated(folder):
    figures = figures_of(folder)
    assert figures["simulated listeners"] is True and figures["panel"] == "training panel"
    assert 0.5 < figures["agreement"]["train"] < figures["ceiling"]["train"] < 1


@pytest.mark.parametrize("devices", [3, 4])
def test_each_device_samples_its_own_rows_and_their_number_changes_nothing(
    folder, devices, tmp_path, monkeypatch
):
    mesh, local_rows = sharding.make_mesh(devices=jax.devices()[:devices]), sharding.local_rows
    shares = set()
    monkeypatch.setattr(sharding, "make_mesh", lambda: mesh)

    def count_rows(array):
        shares.update(shard.data.shape for shard in array.addressable_shards)
        return local_rows(array)

    monkeypatch.setattr(sharding, "local_rows", count_rows)
    other = collected(tmp_path)
    assert shares == {({3: 4, 4: 2}[devices], SAMPLES)}  # of four pairs, or six
    assert read_votes(other) == read_votes(folder)
    texts = [(Path(place) / "manifest.json").read_text() for place in (folder, other)]
    assert texts[0] == texts[1] and set(json.loads(texts[0])["content"]) == set(collect.SPLITS)


def test_batches_change_nothing_and_a_finished_folder_is_left_alone(folder, tmp_path, capsys):
    other = collected(tmp_path, batch_size=7)
    assert read_votes(other) == read_votes(folder)
    capsys.readouterr()
    collected(tmp_path)
    assert capsys.readouterr().out == f"{other}: collected already\n"
    votes = (Path(other) / "votes.jsonl").read_text()
    complaint = "was collected with other settings: name another folder, or leave"
    with pytest.raises(ValueError, match=complaint):
        collected(tmp_path, pairs=41)
    manifest = json.loads((Path(other) / "manifest.json").read_text())
    manifest["models"]["decoder"] = "another"
    (Path(other) / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="was collected with other decoder"):
        collected(tmp_path)
    assert (Path(other) / "votes.jsonl").read_text() == votes and (Path(other) / "train").is_dir()


def test_a_missing_split_is_collected_again_and_the_other_one_stays(folder, tmp_path):
    """A run leaves this if it is interrupted between the votes and the manifest."""
    shutil.copytree(folder, tmp_path / "votes")
    path = tmp_path / "votes/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["counts"].pop("validation")
    path.write_text(json.dumps(manifest))
    other = collected(tmp_path)
    assert sorted(read_votes(other)) == sorted(read_votes(folder))
    assert figures_of(other) == figures_of(folder)


def test_a_resumed_run_keeps_the_figures_of_finished_splits(
    folder, interrupted, tmp_path, monkeypatch
):
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    write, splits = collect.tokens.write_tokens, []

    def write_and_note(*arguments):
        splits.append(arguments[1])
        return write(*arguments)

    monkeypatch.setattr(collect.tokens, "write_tokens", write_and_note)
    other = collected(tmp_path)
    assert splits == ["validation"] and figures_of(other) == figures_of(folder)


def test_batches_of_a_killed_run_are_not_played_again(folder, tmp_path, monkeypatch):
    """Forty pairs are ten batches; the kill comes in the seventh."""
    count, measure = 0, Pitch.measure

    def measure_and_count(ears, *arguments):
        nonlocal count
        count += 1
        if count == 50:
            raise KeyboardInterrupt
        return measure(ears, *arguments)

    monkeypatch.setattr(Pitch, "measure", measure_and_count)
    with pytest.raises(KeyboardInterrupt):
        collected(tmp_path)
    assert not (tmp_path / "votes/votes.jsonl").exists()
    other = collected(tmp_path)
    assert count == 50 + 80 - 6 * 8
    assert read_votes(other) == read_votes(folder)
    assert not (tmp_path / "votes" / collect.PLAYED).exists()


def test_several_listeners_vote_on_a_pair_and_few_pairs_have_no_agreement(folder, tmp_path, capsys):
    """An agreement needs eight pairs; here are seven in each split, and four in the folder's."""
    other = collected(tmp_path, pairs=14, validation_share=0.5, votes_per_pair=3)
    cast = read_votes(other)
    assert len(cast) == 42 and len({(vote.a, vote.listener) for vote in cast}) == 42
    assert len({vote.a for vote in cast}) == 14
    assert figures_of(folder)["agreement"]["validation"] == "n too small (4 < 8)"
    too_few = dict.fromkeys(collect.SPLITS, "n too small (7 < 8)")
    assert figures_of(other)["agreement"] == figures_of(other)["ceiling"] == too_few
    out = capsys.readouterr().out
    assert out.count("on 7 pairs, shares of them: n too small (7 < 8)") == 2
    assert "agree on" not in out


def test_votes_of_people_are_refused_and_simulated_figures_set_aside(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "votes")
    path, figures = tmp_path / "votes/votes.jsonl", (tmp_path / "votes" / FIGURES).read_text()
    assert json.loads(figures)["people"] == 0
    path.write_text(path.read_text().replace("simulated listener 3 of the training panel", "Ada"))
    capsys.readouterr()
    with pytest.raises(ValueError, match="has votes of 'Ada', who is not of the training panel"):
        collected(tmp_path)
    assert not (tmp_path / "votes" / FIGURES).exists()
    assert (tmp_path / "votes/agreement.training_panel.json").read_text() == figures
    message = "is of simulated listeners of the training panel, and 'Ada' voted"
    assert message in capsys.readouterr().out


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
    complaint = r"holds tokens and no votes\.jsonl: it is a folder of `musicrl encode`"
    with pytest.raises(ValueError, match=complaint):
        collected(tmp_path)
    assert (tmp_path / "votes/train").is_dir()


def test_damaged_figures_and_batches_are_set_aside_and_made_again(
    folder, interrupted, tmp_path, capsys
):
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    (tmp_path / "votes" / FIGURES).write_bytes(b'{"agreement": {"train": null}, "ceiling": {}}')
    for path in (tmp_path / "votes" / collect.PLAYED).iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    manifest = tmp_path / "votes/manifest.json"
    counts = '"counts": {\n    "train": 72\n  }'
    manifest.write_text(manifest.read_text().replace(counts, '"counts": {}'))
    other = collected(tmp_path)
    assert read_votes(other) == read_votes(folder) and figures_of(other) == figures_of(folder)
    out = capsys.readouterr().out
    assert f"{other}/{FIGURES} is damaged" in out and out.count("is no whole .npz") == 9


def test_figures_that_are_not_text_are_set_aside(tmp_path, capsys):
    (tmp_path / FIGURES).write_bytes(b"\xff\x00")
    assert collect._read_figures(tmp_path / FIGURES) == {"agreement": {}, "ceiling": {}}
    assert f"{tmp_path}/{FIGURES} is damaged" in capsys.readouterr().out


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
