#!/usr/bin/env bash
# libsndfile 1.2.2 (in soundfile 0.13.1) writes the texts of a WAV (title, artist, comment) into one
# chunk of limited size. It drops a text of more than 2045 bytes, and each text set after it,
# without an error. FLAC and Ogg have no such limit. A prompt or JSON settings in the title can be
# that long.
# Remedy: cut each text before setting it. NumPy 2.3.5, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet soundfile==0.13.1 numpy==2.3.5
"$folder/venv/bin/python" - <<'PYTHON'
import io
import sys

import numpy as np
import soundfile


def texts_read_back(file_format, title_bytes):
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 16_000, 1, format=file_format) as sound:
        sound.title, sound.artist = "a" * title_bytes, "someone"
        sound.write(np.zeros(16))
    file.seek(0)
    with soundfile.SoundFile(file) as sound:
        return len(sound.title), sound.artist


outcomes = []
for file_format, title_bytes in (("WAV", 2045), ("WAV", 2046), ("FLAC", 2046), ("OGG", 2046)):
    outcomes.append(texts_read_back(file_format, title_bytes))
    print(f"{file_format}, title of {title_bytes} bytes: read {outcomes[-1][0]} bytes and artist {outcomes[-1][1]!r}")
sys.exit(outcomes != [(2045, "someone"), (0, ""), (2046, "someone"), (2046, "someone")])
PYTHON
# Output:
#   WAV, title of 2045 bytes: read 2045 bytes and artist 'someone'
#   WAV, title of 2046 bytes: read 0 bytes and artist ''
#   FLAC, title of 2046 bytes: read 2046 bytes and artist 'someone'
#   OGG, title of 2046 bytes: read 2046 bytes and artist 'someone'
