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
    loaded = types.SimpleNamespace(studio=studio, policy={}, frozen={}, vocabulary=b"")
    monkeypatch.setattr(generate.rollouts, "load", lambda *_: loaded)
    monkeypatch.setattr(generate.pieces, "encode", lambda _, prompts, length: np.ones((len(prompts), length), np.int32))


def test_samples_beyond_full_scale_are_clipped(monkeypatch, tmp_path):
    samples = np.array([0.0, 0.5, 1.0, 1.7, -1.0, -3.0, -0.25])
    play(monkeypatch, samples)
    (path,) = generate.generate("a reel", "run/rl", str(tmp_path / "a.wav"))
    wav, rate_hz = soundfile.read(path)
    assert rate_hz == 16000
    np.testing.assert_allclose(wav, np.clip(samples, -1, 1), atol=1 / 32000)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_not_written(monkeypatch, tmp_path, value):
    play(monkeypatch, [0.0, value, 0.5])
    with pytest.raises(ValueError, match=r"the clip for 'a reel' has samples that are not finite: the codec of run/rl"):
        generate.generate("a reel", "run/rl", str(tmp_path / "a.wav"))
    assert not list(tmp_path.iterdir())
