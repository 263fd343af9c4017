#!/usr/bin/env bash
# libsndfile 1.2.2 (in soundfile 0.13.1) writes different bytes for the same samples in each second:
# a float WAV has a PEAK chunk with the time of writing, and an Ogg Vorbis stream a new serial
# number. A 16-bit WAV and a FLAC are stable. So a hash of a float WAV or Ogg file does not identify
# its audio.
# Remedy: hash the samples, not the file.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet soundfile==0.13.1 numpy==2.3.5
"$folder/venv/bin/python" - <<'PYTHON'
import io
import sys
import time

import numpy as np
import soundfile

rate = 16_000
tone = (0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)).astype(np.float32)


def written(file_format, subtype):
    file = io.BytesIO()
    soundfile.write(file, tone, rate, format=file_format, subtype=subtype)
    return file.getvalue()


kinds = [("WAV", "FLOAT"), ("OGG", "VORBIS"), ("WAV", "PCM_16"), ("FLAC", "PCM_16")]
first = [written(*kind) for kind in kinds]
time.sleep(2.1)
same = [written(*kind) == before for kind, before in zip(kinds, first)]
for (file_format, subtype), equal in zip(kinds, same):
    print(f"{file_format} {subtype}: {'same' if equal else 'other'} bytes two seconds later")
print(soundfile.__libsndfile_version__)
sys.exit(same != [False, False, True, True])
PYTHON
# Output:
#   WAV FLOAT: other bytes two seconds later
#   OGG VORBIS: other bytes two seconds later
#   WAV PCM_16: same bytes two seconds later
#   FLAC PCM_16: same bytes two seconds later
#   1.2.2
