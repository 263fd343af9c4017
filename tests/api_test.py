"""Systems from Python: the examples of the package's page, and the same clips as the verb's."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

import musicrl_jax as musicrl
from musicrl_jax.command.names import VERBS
from musicrl_jax.generate import generate
from musicrl_jax.systems import tiny

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "musicrl_jax/README.md").read_text(encoding="utf-8")
NO_NAME = "laod"
PROMPTS = ["a slow waltz on a harp", "a fast Irish reel"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Runs the page's examples in a folder with a tiny system, and yields what they define."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tiny.write("runs/quickstart/ru")
        names = {"__name__": "__main__"}
        for block in re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE):
            exec(block, names)
        yield names


def test_the_examples_of_the_page_generate_score_and_finetune(page):
    system, wav, scores = page["system"], page["wav"], page["scores"]
    samples = round(system.clip_seconds * system.sample_rate_hz)
    assert wav.shape == (2, 1, samples) and wav.dtype == np.float32
    assert set(scores) == {"bright", "reward"} and scores["reward"].shape == (2,)
    np.testing.assert_allclose(scores["bright"], brightness(wav[:, 0]), rtol=1e-5)
    assert page["finetuned"].clip_seconds == 1.0
    assert "quickstart" in repr(system)


@pytest.mark.parametrize(
    "settings",
    [{}, {"clip_seconds": 0.4, "seed": 3}, {"clip_seconds": 7.0, "temperature": 0.5}],
    ids=["default", "short", "two windows"],
)
def test_a_clip_is_the_one_that_the_verb_writes(settings, page, tmp_path):
    system = page["system"]
    (path,) = generate(
        system.folder, PROMPTS[1], out=str(tmp_path / "a.wav"), loudness_lufs=None, **settings
    )
    written, rate = soundfile.read(path, dtype="float32", always_2d=True)
    wav = system.generate(PROMPTS, **settings)
    assert rate == system.sample_rate_hz
    np.testing.assert_allclose(wav[1], written.T, atol=1 / 2**15)
    np.testing.assert_array_equal(wav[1:], system.generate(PROMPTS[1], **settings))


def brightness(wav):
    return np.abs(np.diff(wav)).mean(axis=-1)


def score_brightness(clips):
    return {"total": brightness(np.asarray(clips.wav))}


def test_the_best_of_several_candidates_is_returned(page, monkeypatch):
    player = page["system"]._player
    with monkeypatch.context() as patch:
        patch.setitem(player.manifest, "rewards", {"total": {}})
        patch.setattr(player, "score", score_brightness, raising=False)
        best = page["system"].generate(PROMPTS, seed=1, candidates=4)
        patch.setattr(player, "score", lambda clips: {"total": np.full(len(clips.wav), np.nan)})
        with pytest.raises(ValueError, match="not finite: train its decoder again"):
            page["system"].generate(PROMPTS, candidates=4)
    first = page["system"].generate(PROMPTS, seed=1)  # candidate 0
    assert (brightness(best) >= brightness(first)).all()
    assert (brightness(best) > brightness(first)).any()


def test_a_rollout_scores_as_its_waveforms(page):
    system, rewards = page["system"], page["rewards"]
    rollout = system.rollout(PROMPTS, seed=0)
    np.testing.assert_allclose(rollout.wav, page["wav"], atol=1e-6)
    scores = system.score(PROMPTS, rollout, rewards)
    np.testing.assert_allclose(scores["reward"], page["scores"]["reward"], rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"candidates": 2}, "candidates=2 must be 1, or more for a bundle with rewards"),
        ({"seed": -1}, "seed"),
        ({"temperature": 0.0}, "temperature"),
        ({"clip_seconds": 0.0}, "clip_seconds=0.0 must be from"),
        ({"prompts": [""]}, "is empty"),
    ],
)
def test_a_wrong_setting_is_refused(settings, complaint, page):
    with pytest.raises(ValueError, match=complaint):
        page["system"].generate(**{"prompts": PROMPTS, **settings})


def test_clips_that_a_reward_cannot_score_are_refused(page):
    system, rewards = page["system"], page["rewards"]
    with pytest.raises(ValueError, match=r"clips has shape \(2, 9\) and must be \[2, channels"):
        system.score(PROMPTS, np.zeros((2, 9)), rewards)

    class Tokens(page["Bright"]):
        def score(self, model, variables, rollout, text):
            return rollout.sampled.tokens.mean(axis=1)

    tokens = page["Mixture"](terms=(Tokens(),), weights={"bright": 1.0})
    with pytest.raises(ValueError, match="score what `rollout` returns"):
        system.score(PROMPTS, page["wav"], tokens)
    assert system.score(PROMPTS, system.rollout(PROMPTS), tokens)["reward"].shape == (2,)
    normalised = page["Mixture"](terms=(Tokens(),), weights={"bright": 1.0}, normalise=True)
    with pytest.raises(ValueError, match=r"Mixture\.normalise=True needs clips of a base"):
        system.score(PROMPTS, page["wav"], normalised)


def test_a_missing_system_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no system in"):
        musicrl.load(str(tmp_path))
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        getattr(musicrl, NO_NAME)


def test_an_import_of_the_package_is_light():
    script = (
        "import musicrl_jax, sys; assert 'load' in dir(musicrl_jax); print('jax' in sys.modules)"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "False\n"


def test_the_page_lists_every_verb_and_every_room():
    for name, verb in VERBS.items():
        assert f"| `{name}` | {verb.purpose} |" in PAGE
    rooms = re.findall(r"^\| \[`(\w+)/`\]\(\1\) \|", PAGE, flags=re.MULTILINE)
    package = ROOT / "musicrl_jax"
    assert set(rooms) == {path.parent.name for path in package.glob("*/__init__.py")}
