"""What `generate` writes, with a studio that plays what it is told to."""

import hashlib
import importlib.util
import json
import types

import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from musicrl_jax import generate
from musicrl_jax.rl.rollout import Rollout

RATE, FRAMES = 16000, 50
TONE = 0.02 * np.sin(2 * np.pi * 440 * np.arange(2 * RATE) / RATE)


def play(monkeypatch, samples=TONE, clip_seconds=2.0):
    """Lets every clip become `samples`, cut or filled up to two seconds, and counts the programs that are made."""
    wav = np.resize(np.asarray(samples, np.float32), 2 * RATE)
    made = []

    def numbered(policy, frozen, text, seeds, candidates, temperatures, given, top_k):
        made.append(len(text))
        zeros = jnp.zeros((len(text), FRAMES, 2), jnp.int32)
        return Rollout(text, None, zeros[:, 0], zeros, None, None, zeros, jnp.repeat(jnp.asarray(wav)[None], 1, 0))

    studio = types.SimpleNamespace(
        mulan=types.SimpleNamespace(config=types.SimpleNamespace(text_length=4)),
        musiclm=types.SimpleNamespace(config=types.SimpleNamespace(layout=types.SimpleNamespace(depth=2))),
        frames=lambda seconds: round(seconds * 25),
        numbered=numbered,
        sample_rate_hz=RATE,
    )
    loaded = types.SimpleNamespace(
        studio=studio, policy={}, frozen={}, vocabulary=b"", hashes={}, clip_seconds=clip_seconds
    )
    monkeypatch.setattr(generate.rollouts, "load", lambda *_: loaded)
    monkeypatch.setattr(generate.pieces, "encode", lambda _, prompts, length: np.ones((len(prompts), length), np.int32))
    return made


def made(path):
    """(what a file says of how it was made, its title)."""
    with soundfile.SoundFile(path) as file:
        return json.loads(file.comment), file.title


def test_samples_beyond_full_scale_are_clipped(monkeypatch, tmp_path):
    samples = np.array([0.0, 0.5, 1.0, 1.7, -1.0, -3.0, -0.25, 0.1])
    play(monkeypatch, samples)
    (path,) = generate.generate("run/rl", "a reel", out=str(tmp_path / "a.wav"), loudness_lufs=None)
    wav, rate_hz = soundfile.read(path)
    assert rate_hz == RATE and len(wav) == 2 * RATE
    np.testing.assert_allclose(wav[:8], np.clip(samples, -1, 1), atol=1 / 32000)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_not_written(monkeypatch, tmp_path, value):
    play(monkeypatch, [0.0, value, 0.5, 0.1])
    with pytest.raises(ValueError, match=r"the clip for 'a reel' has samples, or a reward, that are not finite: the c"):
        generate.generate("run/rl", "a reel", out=str(tmp_path / "a.wav"))
    assert not list(tmp_path.iterdir())


def test_the_length_is_the_one_that_was_trained_on(monkeypatch, tmp_path, capsys):
    """Where none is recorded a stated one is assumed, and said."""
    programs = play(monkeypatch)
    (path,) = generate.generate("run/rl", "a reel", out=str(tmp_path))
    assert made(path)[0]["seconds"] == 2.0 and "assumed" not in capsys.readouterr().out
    (path,) = generate.generate("run/rl", "a reel", out=str(tmp_path / "long"), clip_seconds=500)
    assert soundfile.info(path).frames == 500 * RATE and set(programs) == {1}
    assert "clip_seconds=500 is more than the 2 s of the model's clips: drawn in 499 windows" in capsys.readouterr().out
    play(monkeypatch, clip_seconds=None)
    monkeypatch.setattr(generate, "UNRECORDED_SECONDS", 2.0)
    generate.generate("run/old", "a reel", out=str(tmp_path / "old"))
    said = "run/old does not record the length of the clips that it was trained on: 2 s is assumed"
    assert said in capsys.readouterr().out


def test_what_does_not_fit_into_memory_says_what_would(monkeypatch, tmp_path):
    play(monkeypatch)
    monkeypatch.setattr(generate.memory, "free_bytes", lambda: 60_000)
    with pytest.raises(ValueError, match=r"clip_seconds=2 needs 0.0 GB of memory, and .*: about 0\.\d s would fit"):
        generate.generate("run/rl", "a reel", out=str(tmp_path / "a.wav"))


@pytest.mark.parametrize("form", ["wav", "flac", "ogg"])
@pytest.mark.parametrize("prompt", ["a reel", "быстрая джига на скрипке 🎻\nслово", "a jig " * 3000], ids=len)
def test_a_file_says_how_it_was_made(monkeypatch, tmp_path, form, prompt):
    play(monkeypatch)
    (path,) = generate.generate("run/rl", prompt, out=str(tmp_path), seed=3, format=form, temperature=1.1)
    told, title = made(path)
    assert title == (prompt.encode()[:2000].decode() if form == "wav" else prompt)
    assert soundfile.info(path).format == form.upper()
    assert told == {
        "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(),
        "seed": 3,
        "candidate": 0,
        "model": generate.checkpoints.content_hash({}),
        "seconds": 2.0,
        "temperature": 1.1,
        "top_k": None,
        "candidates": 1,
        "loudness_lufs": -16.0,
    }


def test_a_name_holds_prompt_seed_and_number(monkeypatch, tmp_path):
    """So that neither another seed, nor a prompt of the same words, overwrites a clip; and it is no longer than 255."""
    play(monkeypatch)
    paths = []
    for seed in (0, 1, 2**32 - 1):
        paths += generate.generate("run/rl", ["A reel!", "a reel", "𐌰𐌱" * 400, "🎻"], out=str(tmp_path), seed=seed)
    assert len(set(paths)) == 12 == len(list(tmp_path.iterdir()))
    assert paths[0].name.startswith("a_reel_") and paths[4].name.endswith("_seed1_0.wav")
    assert all(len(f".{path.name}.partial".encode()) <= 255 for path in paths)


def test_files_are_brought_to_one_loudness(monkeypatch, tmp_path, capsys):
    import pyloudnorm

    def loudness(path):
        wav, rate = soundfile.read(path)
        return pyloudnorm.Meter(rate).integrated_loudness(wav)

    play(monkeypatch)
    ways = {"flags": {}, "louder": {"loudness_lufs": -12}, "as it is": {"loudness_lufs": None}}
    found = {name: loudness(*generate.generate("r", "a", out=f"{tmp_path}/{name}.wav", **ways[name])) for name in ways}
    assert found["flags"] == pytest.approx(-16, abs=0.1) and found["louder"] == pytest.approx(-12, abs=0.1)
    assert found["as it is"] == pytest.approx(-37.7, abs=0.5) and "not -16" not in capsys.readouterr().out

    click = 0.01 * TONE
    click[RATE] = 0.5
    play(monkeypatch, click)
    (path,) = generate.generate("r", "a", out=str(tmp_path / "click.wav"))
    assert np.abs(soundfile.read(path)[0]).max() <= 10 ** (-1 / 20)
    assert "LUFS, not -16: louder, its peaks would clip" in capsys.readouterr().out

    play(monkeypatch, np.zeros(8))
    (path,) = generate.generate("r", "a", out=str(tmp_path / "silence.ogg"))
    assert not soundfile.read(path)[0].any() and "silence.ogg is silent" in capsys.readouterr().out


def test_what_measures_loudness_is_named_where_it_is_missing(monkeypatch, tmp_path):
    play(monkeypatch)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyloudnorm" else found(name))
    with pytest.raises(ModuleNotFoundError, match=r"pip install pyloudnorm, or give --loudness_lufs=None"):
        generate.generate("run/rl", "a reel", out=str(tmp_path / "a.wav"))
    assert generate.generate("run/rl", "a reel", out=str(tmp_path / "a.wav"), loudness_lufs=None)


def test_a_folder_of_clips_is_continued_and_not_mixed(monkeypatch, tmp_path):
    """Clips that are there are not made again; another seed adds its own; other settings are refused."""
    play(monkeypatch)
    file, out = tmp_path / "prompts.txt", tmp_path / "clips"
    file.write_text("a reel\n\n a jig \na reel\n", encoding="utf-8")
    paths = generate.generate("run/rl", prompts_file=str(file), out=str(out))
    assert [path.name.split("_")[1] for path in paths] == ["reel", "jig"] and len(list(out.iterdir())) == 2
    before = paths[0].stat().st_mtime_ns
    paths[1].unlink()
    file.write_text("a reel\na march\na jig", encoding="utf-8")
    paths = generate.generate("run/rl", prompts_file=str(file), out=str(out))
    assert [path.name.split("_")[1] for path in paths] == ["reel", "march", "jig"]
    assert all(path.exists() for path in paths) and paths[0].stat().st_mtime_ns == before
    assert not set(generate.generate("run/rl", "a reel", out=str(out), seed=1)) & set(paths)
    with pytest.raises(ValueError, match=r"was made with temperature 0\.99, not 1\.2: give another out"):
        generate.generate("run/rl", prompts_file=str(file), out=str(out), temperature=1.2)
    soundfile.write(paths[0], np.zeros(9), RATE)
    with pytest.raises(ValueError, match=r"seed0_0\.wav is there and does not say how it was made: give another out"):
        generate.generate("run/rl", "a reel", out=str(out))


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({}, "give either prompt or prompts_file"),
        ({"prompt": "a", "prompts_file": "b"}, "give either prompt or prompts_file"),
        ({"prompt": ["a", 3]}, "generate.prompt: 3 is no text"),
        ({"prompts_file": "empty.txt"}, "has no prompt in it"),
        ({"prompts_file": "some.txt", "out": "a.wav"}, "is one file, but there are several prompts"),
        ({"prompt": ["a", "b"], "out": "a.ogg"}, "is one file, but there are several prompts"),
        ({"prompt": "a", "out": "a.mp3"}, r"'a\.mp3' does not end in \.wav or \.flac or \.ogg: choose one of them"),
        ({"prompt": "a", "out": "clips.v2"}, "or for a new folder a name that ends in /"),
        ({"prompt": "a", "out": "a.wav", "format": "ogg"}, "is no ogg file"),
        ({"prompt": "a", "format": "mp3"}, "format='mp3' is none of wav, flac, ogg"),
        ({"prompt": "a", "out": "file"}, "out='file' is a file: give a folder"),
        ({"prompt": "a", "loudness_lufs": 3}, "loudness_lufs=3 must be above -70 and at most 0, or None"),
        ({"prompt": "a", "loudness_lufs": "loud"}, "loudness_lufs='loud' must be"),
    ],
)
def test_what_is_asked_for_is_clear(monkeypatch, tmp_path, asked, why):
    play(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "some.txt").write_text("a reel\na jig")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=why):
        generate.generate("run/rl", **asked)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("out", ["clips.v2", "new.v3/", ".", "plain", "deep/a.FLAC"])
def test_a_folder_may_have_a_dot(monkeypatch, tmp_path, out):
    play(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips.v2").mkdir()
    (path,) = generate.generate("run/rl", "a reel", out=out)
    assert path.exists() and (path == generate.Path(out) if "FLAC" in out else path.parent == generate.Path(out))


def test_a_disk_that_is_full_leaves_nothing(monkeypatch, tmp_path):
    play(monkeypatch)

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(generate.Path, "replace", full)
    with pytest.raises(OSError, match=r"cannot write .*: No space left on device; free some space or choose another"):
        generate.generate("run/rl", "a reel", out=str(tmp_path))
    assert not list(tmp_path.iterdir())
