"""Renders the notes of a clip by MIDI and the General MIDI soundfont TimGM6mb, in mono.

N is the number of samples.
"""

import functools
import importlib.resources
import io

import midirenderer
import numpy as np
import pretty_midi
import soundfile
import soxr

from .clips import Clip
from .instruments import INSTRUMENTS

LEVELS = {"quiet": -34.0, "medium": -27.0, "loud": -20.0}
"""Root mean square of a clip's loudest 400 ms, in dB relative to full scale."""

_MOMENT = 0.4  # seconds, the "momentary" window of EBU R 128

_VELOCITIES = {"quiet": 55, "medium": 80, "loud": 110}
_DRUM_VELOCITY = 0.7  # times the velocity of the other notes


def render(clip: Clip, seconds: float, sample_rate_hz: int) -> np.ndarray:
    """Returns the clip as int16 [N], N = round(seconds * sample_rate_hz), at its dynamics' level.

    If peaks would exceed full scale there (one clip in thousands), they are scaled to full scale.
    """
    sound = midirenderer.render_wave_from(_soundfont(), _midi(clip, seconds))
    stereo, rendered_rate_hz = soundfile.read(io.BytesIO(sound), dtype="float32", always_2d=True)
    mono = soxr.resample(stereo.mean(axis=1), rendered_rate_hz, sample_rate_hz)
    # The synthesiser's length differs a little: pad or cut.
    samples = np.zeros(round(seconds * sample_rate_hz), np.float64)  # [N]
    samples[: len(mono)] = mono[: len(samples)]
    level = 10 ** (LEVELS[clip.attributes["dynamics"]] / 20)
    gain = level / loudest_moment(samples, sample_rate_hz)
    return np.round(samples * min(gain, 1 / np.abs(samples).max()) * 32767).astype(np.int16)


def loudest_moment(samples: np.ndarray, sample_rate_hz: int) -> float:
    """Returns the root mean square of the loudest 400 ms of float [N]."""
    window = min(round(_MOMENT * sample_rate_hz), len(samples))
    energy = np.concatenate([[0.0], np.cumsum(samples**2)])  # [N + 1]
    return float(np.sqrt(np.max(energy[window:] - energy[:-window]) / window))


def _midi(clip: Clip, seconds: float) -> bytes:
    """Returns the clip as a MIDI file, one track for each part and one for the drums."""
    # Parts.
    programs = INSTRUMENTS[clip.attributes["instrument"]].programs
    velocity = _VELOCITIES[clip.attributes["dynamics"]]
    score = pretty_midi.PrettyMIDI(resolution=960)
    for part in range(clip.attributes["parts"]):
        player = pretty_midi.Instrument(programs[part % len(programs)])
        for onset, duration, pitch, note_part in clip.notes:
            if note_part == part:
                # Rounded to 0.1 ms as onsets are: a note ends where the next one starts.
                end = round(onset + duration, 4)
                player.notes.append(pretty_midi.Note(velocity, pitch, onset, end))
        score.instruments.append(player)

    # Drums.
    if clip.drums:
        kit = pretty_midi.Instrument(0, is_drum=True)
        kit.notes = [
            pretty_midi.Note(round(velocity * _DRUM_VELOCITY), drum, onset, onset + 0.1)
            for onset, drum in clip.drums
        ]
        score.instruments.append(kit)
    # The renderer stops at the last event. This event lets the last note ring to the clip's end.
    score.instruments[0].control_changes.append(pretty_midi.ControlChange(64, 0, seconds + 0.05))
    file = io.BytesIO()
    score.write(file)
    return file.getvalue()


@functools.cache
def _soundfont() -> bytes:
    return importlib.resources.files(pretty_midi).joinpath("TimGM6mb.sf2").read_bytes()
