"""The whole quickstart at tiny size: every stage, also interrupted and repeated, and generation."""

import base64
import html
import io
import json
import re
import shutil
from pathlib import Path

import events
import jax
import numpy as np
import pytest
import soundfile

import gin
from musicrl_jax import cli, train_rl
from musicrl_jax.core import checkpoint
from musicrl_jax.core.metrics import MetricWriter
from musicrl_jax.generate import generate
from musicrl_jax.inputs.clips import Clips
from musicrl_jax.inputs.prompts import Prompts
from musicrl_jax.inputs.tokens import Tokens, read
from musicrl_jax.models.mulan import MuLan, MuLanConfig
from musicrl_jax.models.semantic import SemanticConfig, SemanticEncoder
from musicrl_jax.models.soundstream import SoundStream, SoundStreamConfig
from musicrl_jax.systems import folder as systems

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


def musicrl(verb, folder, *flags):
    """Runs a command, as from a shell, on the run in `folder`."""
    gin.clear_config()
    shared = (
        f"--gin_file={ROOT}/gin/runs/tiny.gin",
        f"--gin.DATA_DIR='{folder}/data'",
        f"--gin.MODEL_DIR='{folder}/run'",
    )
    return cli.main([verb, *shared, *flags])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a finished run whose RL stage was interrupted after its second step and resumed."""
    folder = tmp_path_factory.mktemp("tiny")
    patch = pytest.MonkeyPatch()

    class Interrupted(MetricWriter):
        def write(self, step, metrics, prefix=""):
            if step == 2:
                raise KeyboardInterrupt
            super().write(step, metrics, prefix)

    patch.setattr(train_rl, "MetricWriter", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        musicrl("run", folder)
    patch.undo()
    assert not checkpoint.has_model(folder / "run/r")
    assert musicrl("run", folder) == 0
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_summary_has_all_figures_of_the_evaluation(folder):
    summary = json.loads((folder / "run/summary.json").read_text())
    assert summary["policies"] == ["MusicLM", "R", "RU", "best of 2"]
    terms = ["text_adherence", "acoustic_quality", "user_preference"]
    assert list(summary["rewards"]) == ["reward", *terms]
    for term in summary["rewards"]:
        for name, figure in summary["rewards"][term].items():
            assert figure["low"] <= figure["mean"] <= figure["high"]
            gain = figure["mean"] - summary["rewards"][term]["MusicLM"]["mean"]
            assert name == "MusicLM" or summary["gains"][term][name]["mean"] == pytest.approx(
                gain, abs=1e-6
            )
    # The total is the sum of its terms, each in units of its spread over the base's clips.
    assert summary["rewards"]["reward"]["MusicLM"]["mean"] == pytest.approx(0, abs=1e-4)
    assert summary["gains"]["reward"]["best of 2"]["mean"] > 0
    assert summary["kl"]["RU"]["mean"] > 0 and list(summary["kl"]) == ["R", "RU"]
    for name, kl in summary["kl"].items():
        assert sum(summary["kl_by_level"][name]) == pytest.approx(kl["mean"], rel=1e-4)
        assert sum(summary["kl_by_second"][name]) == pytest.approx(kl["mean"], rel=1e-4)
    assert [(pair["first"], pair["second"]) for pair in summary["pairs"][:2]] == [
        ("best of 2", "RU"),
        ("best of 2", "R"),
    ]
    assert len(summary["pairs"]) == 6
    for pair in summary["pairs"]:
        assert pair["win"] + pair["tie"] + pair["loss"] == pytest.approx(1)
    assert all(1 <= opinion["mean"] <= 5 for opinion in summary["mos"].values())
    models = ["codec", "semantic", "mulan", "quality", "tokenizer", "encode", "policy", "fine"]
    after = ["base", "r", "votes", "preference", "ru", "evaluate"]
    assert list(summary["seconds"]) == ["pretrained", "data", "vocabulary", *models, *after]
    assert all(second > 0 for second in summary["seconds"].values())
    assert checkpoint.has_model(summary["checkpoint"])


def test_scores_of_every_clip_are_stored(folder):
    summary = json.loads((folder / "run/summary.json").read_text())
    with np.load(folder / "run/evaluation/scores.npz") as scores:
        prompts = Prompts(("score_clips/tiny",), data_dir=f"{folder}/data").unique("test")
        assert list(scores["prompts"]) == prompts[:8]
        for name in summary["policies"]:
            assert scores[f"{name}/ratings"].shape == (len(prompts[:8]), 2, 3)
            assert scores[f"{name}/ratings"].mean() == pytest.approx(summary["mos"][name]["mean"])
            assert scores[f"{name}/reward"].mean() == pytest.approx(
                summary["rewards"]["reward"][name]["mean"], abs=1e-5
            )
        gap = scores["RU/ratings"] - scores["R/ratings"]
    pair = next(pair for pair in summary["pairs"] if (pair["first"], pair["second"]) == ("RU", "R"))
    assert pair["win"] == pytest.approx((gap > 0).mean())


@pytest.mark.exactness(16)
def test_ru_starts_from_r_and_is_anchored_to_it(folder):
    anchors = {}
    for name in ("r", "ru"):
        anchors[name] = json.loads((folder / f"run/{name}/model/anchor.json").read_text())
    assert anchors["r"]["anchor"] == checkpoint.model_hash(folder / "run/policy")
    assert anchors["ru"]["anchor"] == checkpoint.model_hash(folder / "run/r")
    preference = anchors["ru"]["rewards"]["user_preference"]
    assert preference["hash"] == checkpoint.model_hash(folder / "run/preference")


def test_the_page_has_clips_scores_and_notes(folder):
    """It has the clips for the first two prompts and for one that lost, if any, and all terms."""
    page = (folder / "run/evaluation/page.html").read_text()
    assert "Real clips are of score_clips/tiny: Clips contain samples of the soundfont" in page
    prompts = Prompts(("score_clips/tiny",), data_dir=f"{folder}/data").unique("test")
    players = re.findall(r'<audio [^>]*aria-label="([^,"]+), 1\.0 seconds: ([^"]*)"', page)
    players = [(side, html.unescape(prompt)) for side, prompt in players]
    for number, prompt in enumerate(prompts[:2]):
        sides = [(side, prompt) for side in ("MusicLM", "R", "RU", "best of 2")]
        assert players[4 * number : 4 * number + 4] == sides
    assert len(players) in (8, 12)
    sounds = re.findall(r'src="data:audio/flac;base64,([^"]+)"', page)
    assert len(sounds) == len(players)
    for sound in sounds:
        wav, rate = soundfile.read(io.BytesIO(base64.b64decode(sound)))
        assert (len(wav), rate) == (16000, 16000) and np.abs(wav).max() > 0
    for term in ("reward", "text_adherence", "acoustic_quality", "user_preference"):
        assert term in page
    assert "simulated listeners" in page
    assert "a pseudo-MOS unless it learned people&#39;s ratings" in page
    assert "<p>This is a test of the code. Nothing here is music.</p>" in page


def test_stages_show_curves_and_clips(folder):
    """The codec plays clips beside its decoded ones, R beside the base's."""
    for stage, sides in (("codec", ("original", "decoded")), ("r", ("base", "policy"))):
        page = (folder / f"run/{stage}/page.html").read_text()
        assert page.count("<audio ") == 8 and all(f'aria-label="{side},' in page for side in sides)
        charts = events.read(folder / f"run/{stage}/tensorboard")
        clips = {f"clip_{number}/{side}" for number in range(1, 5) for side in sides}
        assert clips | {"clips_per_second"} <= charts.keys()
    assert "histogram/text_adherence" in charts
    assert "<audio " not in (folder / "run/policy/page.html").read_text()


def test_kl_starts_at_zero_to_the_bit_and_the_sampler_agrees_with_the_learner(folder):
    metrics = lines(folder / "run/r/metrics.jsonl")
    assert [line["step"] for line in metrics] == [0, 1, 2]
    assert metrics[0]["kl"] == 0.0 and metrics[-1]["kl"] > 0
    assert max(line["sampler_drift"] for line in metrics) < 2e-5
    assert all(line["skipped"] == 0 for line in metrics)


@pytest.mark.exactness(17)
def test_an_interrupted_run_equals_an_uninterrupted_one(folder):
    """So does its held-out judge, which measures the base again and reads its earlier looks."""
    assert musicrl("run", folder, "--only=r", f"--gin.R='{folder}/again'") == 0
    looks = ["judge_gain" in line for line in lines(folder / "again/metrics.jsonl")]
    assert looks == [False, True, True]
    assert lines(folder / "again/metrics.jsonl") == lines(folder / "run/r/metrics.jsonl")
    assert checkpoint.model_hash(folder / "again") == checkpoint.model_hash(folder / "run/r")


def test_verbs_work_from_the_gin_file_alone(folder, capsys):
    assert musicrl("encode", folder, f"--gin.TOKENS='{folder}/tokens_again'") == 0
    names = "run/tokens", "tokens_again"
    first, second = (json.loads((folder / name / "manifest.json").read_text()) for name in names)
    assert first == second
    assert musicrl("run", folder, "--only=evaluate") == 0
    assert musicrl("run", folder, "--only=sing") == 1
    assert "'sing' is none of the stages" in capsys.readouterr().err


def test_a_repeated_run_reuses_everything(folder, capsys):
    def times():
        paths = (folder / "run").rglob("manifest.json")
        return {path: path.stat().st_mtime_ns for path in paths}

    before, page = times(), (folder / "run/evaluation/page.html").read_bytes()
    assert musicrl("run", folder) == 0
    assert "evaluated already" in capsys.readouterr().out
    assert times() == before
    assert (folder / "run/evaluation/page.html").read_bytes() == page


def test_another_size_in_the_same_folder_is_refused(folder, capsys):
    assert musicrl("run", folder, "--gin.SoundStreamConfig.channels=5") == 1
    assert "model.channels is 4 there and 5 here" in capsys.readouterr().err


def test_encoded_tokens_are_those_of_the_models(folder):
    """Each clip's tokens, which its id finds, are what the three models compute from its audio."""
    # The clips, in another order than `encode` writes them.
    clips = Clips({"score_clips/tiny": 1.0}, f"{folder}/data", 16000, with_captions=True)
    batches = list(clips.batches("test", 8, seed=1, epochs=1))
    names = "audio", "id", "caption"
    wav, ids, captions = (np.concatenate([batch[name] for batch in batches]) for name in names)
    written = {row["id"].decode(): row for row in read(f"{folder}/run/tokens", "test")[0]}
    assert sorted(written) == sorted(ids) and len(ids) >= 2
    assert [written[name]["caption"].decode() for name in ids] == list(captions)

    # Their tokens by the models.
    semantic = checkpoint.load_model(folder / "run/semantic", SemanticConfig)
    codec = checkpoint.load_model(folder / "run/codec", SoundStreamConfig)
    mulan = checkpoint.load_model(folder / "run/mulan", MuLanConfig)
    embedding = MuLan(mulan.config).apply(mulan.variables, wav, method="embed_audio")
    semantic_tokens = SemanticEncoder(semantic.config).apply(
        semantic.variables, wav, method="tokens"
    )
    expected = {
        "semantic": semantic_tokens,
        "acoustic": SoundStream(codec.config).apply(codec.variables, wav, method="encode"),
        "mulan": MuLan(mulan.config).apply(mulan.variables, embedding, method="quantize"),
    }
    count = len(ids)
    for name, codes in expected.items():
        tokens = np.stack([written[clip][name] for clip in ids])
        assert tokens.shape == codes.shape
        distinct = np.unique(tokens.reshape(count, -1), axis=0)
        assert len(distinct) >= 2, f"{name}: all clips have the same tokens"
        same = tokens[:, None] == np.asarray(codes)[None]
        same = same.reshape(count, count, -1).mean(axis=2)
        # Compiled alone, a distance can round to another code.
        assert np.diagonal(same).min() > 0.8, name
        others = [np.diagonal(np.roll(same, shift, axis=1)).mean() for shift in range(1, count)]
        assert np.diagonal(same).mean() > max(others), f"{name}: another clip's tokens fit as well"

    # Training reads these rows, each whole.
    rows = []
    for batch in Tokens(f"{folder}/run/tokens").batches("test", 16, seed=0, epochs=1):
        for i in range(len(batch["mulan"])):
            rows.append(b"".join(batch[name][i].tobytes() for name in expected))
    stored = [b"".join(row[name].tobytes() for name in expected) for row in written.values()]
    assert sorted(rows) == sorted(stored)


def test_prompts_become_clips(folder, tmp_path):
    out = tmp_path / "reel.wav"
    flags = (f"--system={folder}/run/ru", f"--out={out}")  # of the length that it was trained on
    assert cli.main(["generate", "--prompt=a fast Irish reel on a harp", *flags]) == 0
    wav, rate = soundfile.read(out)
    assert (len(wav), rate) == (16000, 16000) and np.abs(wav).max() > 0


def test_a_prompt_gives_the_same_clip_alone_and_among_others(folder, tmp_path):
    prompts = ["a slow air", "быстрая джига на скрипке 🎻", "a jig " * 500]
    paths = generate(f"{folder}/run/ru", prompts, out=str(tmp_path / "all"), clip_seconds=0.4)
    alone = generate(
        f"{folder}/run/ru", prompts[1], out=str(tmp_path / "one.wav"), clip_seconds=0.4
    )
    clips = [soundfile.read(path)[0] for path in paths]
    np.testing.assert_array_equal(clips[1], soundfile.read(alone[0])[0])
    assert [len(clip) for clip in clips] == [6400, 6400, 6400]
    other = generate(
        f"{folder}/run/ru", prompts[1], out=str(tmp_path / "two.wav"), clip_seconds=0.4, seed=1
    )
    assert np.abs(soundfile.read(other[0])[0] - clips[1]).max() > 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": "   "}, "prompt '   ' is empty"),
        ({"clip_seconds": 0.01}, "clip_seconds=0.01 must be from 0.04, one frame"),
        ({"out": "x.wav", "prompt": ["a", "b"]}, "one file, but there are several prompts"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
    ],
)
def test_a_wrong_request_is_refused(folder, tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        generate(
            **{"prompt": "a reel", "system": f"{folder}/run/ru", "clip_seconds": 0.4, **changes}
        )
    assert not list(tmp_path.rglob("*.wav"))


def test_models_that_do_not_belong_together_are_refused(folder, tmp_path):
    """Sizes are equal and weights are not, which only the lineage shows."""
    codec = tmp_path / "codec"
    shutil.copytree(folder / "run/codec", codec)
    model = checkpoint.load_model(codec, SoundStreamConfig)
    louder = jax.tree.map(lambda w: w * 1.5, model.variables["params"])
    checkpoint.save_model(codec, model.config, {**model.variables, "params": louder})
    parts = {**systems.load(f"{folder}/run/ru").folders, "soundstream": str(codec)}
    systems.write(tmp_path / "mixed", "musiclm", parts)
    with pytest.raises(ValueError, match="was trained on tokens of codec"):
        generate(f"{tmp_path}/mixed", "a reel", out=str(tmp_path / "x.wav"), clip_seconds=0.4)
    with pytest.raises(ValueError, match="holds a SoundStreamConfig, not a MusicLMConfig"):
        generate(f"{folder}/run/codec", "a reel", out=str(tmp_path / "x.wav"), clip_seconds=0.4)
    with pytest.raises(FileNotFoundError, match="no system in"):
        generate(f"{folder}/run/nowhere", "a reel", out=str(tmp_path / "x.wav"), clip_seconds=0.4)
