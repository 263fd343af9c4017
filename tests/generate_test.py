"""What `generate` writes, with a studio that plays what it is told to."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from musicrl_jax import generate


def play(monkeypatch, samples):
    """Lets every prompt become `samples`."""
    studio = types.SimpleNamespace(
        mulan=types.SimpleNamespace(config=types.SimpleNamespace(text_length=4)),
        frames=lambda seconds: round(seconds * 25),
        rollout=lambda *_: types.SimpleNamespace(wav=jnp.asarray(samples, jnp.float32)[None]),
        sample_rate_hz=16000,
    )
    loaded = types.SimpleNamespace(studio=studio, policy={}, frozen={}, vocabulary=b"", hashes={})
    monkeypatch.setattr(generate.rollouts, "load", lambda *_: loaded)
    monkeypatch.setattr(generate.pieces, "encode", lambda _, prompts, length: np.ones((len(prompts), length), np.int32))


def test_samples_beyond_full_scale_are_clipped(monkeypatch, tmp_path):
    samples = np.array([0.0, 0.5, 1.0, 1.7, -1.0, -3.0, -0.25])
    play(monkeypatch, samples)
    (path,) = generate.generate("run/rl", "a reel", out=str(tmp_path / "a.wav"))
    wav, rate_hz = soundfile.read(path)
    assert rate_hz == 16000
    np.testing.assert_allclose(wav, np.clip(samples, -1, 1), atol=1 / 32000)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_not_written(monkeypatch, tmp_path, value):
    play(monkeypatch, [0.0, value, 0.5])
    with pytest.raises(ValueError, match=r"the clip for 'a reel' has samples that are not finite: the codec of run/rl"):
        generate.generate("run/rl", "a reel", out=str(tmp_path / "a.wav"))
    assert not list(tmp_path.iterdir())


def test_a_file_of_prompts_is_continued_and_not_mixed(monkeypatch, tmp_path):
    """Clips that are there are not made again; a folder of clips with another seed is refused."""
    play(monkeypatch, [0.0, 0.5])
    file, out = tmp_path / "prompts.txt", tmp_path / "clips"
    file.write_text("a reel\n\n a jig \na reel\n", encoding="utf-8")
    paths = generate.generate("run/rl", prompts_file=str(file), out=str(out))
    assert [path.name.split("_")[1] for path in paths] == ["reel", "jig"] and len(list(out.iterdir())) == 3
    before = paths[0].stat().st_mtime_ns
    paths[1].unlink()
    file.write_text("a reel\na jig\na march", encoding="utf-8")
    paths = generate.generate("run/rl", prompts_file=str(file), out=str(out))
    assert all(path.exists() for path in paths) and len(paths) == 3 and paths[0].stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="clips made with seed 0, not 1: give another out"):
        generate.generate("run/rl", prompts_file=str(file), out=str(out), seed=1)


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({}, "give either prompt or prompts_file"),
        ({"prompt": "a", "prompts_file": "b"}, "give either prompt or prompts_file"),
        ({"prompts_file": "empty.txt"}, "has no prompt in it"),
        ({"prompts_file": "some.txt", "out": "a.wav"}, "is one file, but a file of prompts is asked for"),
    ],
)
def test_what_is_asked_for_is_clear(monkeypatch, tmp_path, asked, why):
    play(monkeypatch, [0.0])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "some.txt").write_text("a reel")
    with pytest.raises(ValueError, match=why):
        generate.generate("run/rl", **asked)
