"""What an audience takes a caption to ask for, and what it needs."""

import pytest

from musicrl_jax.arena.audience import Audience, asked_for
from musicrl_jax.arena.listeners import training_panel

KNOWN = {
    "family": "keyboard",
    "key": "A",
    "mode": "major",
    "tempo_bpm": 89,
    "register": "middle",
    "density": "steady",
}


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        (
            "A cembalo plays a moderately paced reel in a major key, with steadily moving notes, mid-range",
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
def test_only_what_is_said_is_asked_for(caption, said):
    assert set(asked_for(caption, KNOWN)) == {"family", "mode", *said.split()}
    assert all(KNOWN[name] == value for name, value in asked_for(caption, KNOWN).items())


def test_ears_hear_at_one_rate():
    audience = Audience(training_panel(), None)
    audience.check(16_000)
    with pytest.raises(
        ValueError, match="decodes at 24000 Hz, and simulated listeners hear at 16000"
    ):
        audience.check(24_000)


def test_an_audience_without_ears_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="listening needs librosa, sklearn: pip install"):
        Audience(training_panel(), None).check(16_000)
