#!/usr/bin/env bash
# libsndfile 1.2.2 (in soundfile 0.13.1) reads only the first stream of a chained Ogg file, without
# a warning: the stated length and the samples end there. A chain is several streams in one file. It
# is part of the Ogg format: internet radio and `cat` join recordings so. Most of such a recording
# is lost.
# Remedy: split the file at pages that start a stream and read each part. NumPy 2.3.5, Python 3.11.
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

rate = 16_000
time = np.arange(2 * rate) / rate
streams = []
for pitch_hz in (440, 660):
    file = io.BytesIO()
    soundfile.write(file, 0.5 * np.sin(2 * np.pi * pitch_hz * time), rate, format="OGG", subtype="VORBIS")
    streams.append(file.getvalue())
chained, _ = soundfile.read(io.BytesIO(b"".join(streams)))
seconds = len(chained) / rate
print(f"two streams of 2 s in one file: {seconds:g} s are read")
sys.exit(seconds != 2)
PYTHON
# Output:
#   two streams of 2 s in one file: 2 s are read
