"""The attributes that a caption mentions, and what an audience requires."""

import pytest

from musicrl_jax.arena.audience import Audience, mentioned_attributes
from musicrl_jax.arena.listeners import training_panel

ATTRIBUTES = {
    "family": "keyboard",
    "key": "A",
    "mode": "major",
    "tempo_bpm": 89,
    "register": "middle",
    "density": "steady",
}


@pytest.mark.parametrize(
    ("caption", "names"),
    [
        (
            "A cembalo plays a reel in a major key, with steadily moving notes, mid-range",
            "register density",
        ),
        ("A reel in A major, in 6/8, with short detached notes", "key"),
        ("A slow air in B flat minor at 89 beats a minute, sparse.", "key tempo_bpm density"),
        ("neither high nor low in pitch, in 12/8 time", "register"),
        ("Tempo 176, with a dense stream of notes, in F sharp minor", "tempo_bpm density key"),
        ("A fast tune in a high register", "register"),
        ("A piece", ""),
    ],
)
def test_only_mentioned_attributes_are_requested(caption, names):
    request = mentioned_attributes(caption, ATTRIBUTES)
    assert set(request) == {"family", "mode", *names.split()}
    assert request.items() <= ATTRIBUTES.items()


def test_listeners_need_one_sample_rate():
    audience = Audience(training_panel(), None)
    audience.check(16_000)
    complaint = "decodes at 24000 Hz, and simulated listeners need 16000"
    with pytest.raises(ValueError, match=complaint):
        audience.check(24_000)


def test_an_audience_without_ears_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="listening needs librosa, sklearn: pip install"):
        Audience(training_panel(), None).check(16_000)
