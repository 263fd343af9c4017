#!/usr/bin/env bash
# pyloudnorm 0.2.0 turns silence into NaN when it normalises the loudness: the loudness of silence
# is -inf, the gain +inf, and infinity times zero is NaN. One silent clip in a batch is enough.
# Remedy: do not change clips whose loudness is not finite. NumPy 2.3.5, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pyloudnorm==0.2.0 numpy==2.3.5
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import numpy as np
import pyloudnorm

rate = 16_000
silence = np.zeros(5 * rate)
loudness = pyloudnorm.Meter(rate).integrated_loudness(silence)
normalised = pyloudnorm.normalize.loudness(silence, loudness, -16.0)
print(f"loudness of silence: {loudness} LUFS; normalised to -16: {np.isnan(normalised).mean():.0%} of samples are NaN")
sys.exit(not (np.isneginf(loudness) and np.isnan(normalised).all()))
PYTHON
# Output:
#   loudness of silence: -inf LUFS; normalised to -16: 100% of samples are NaN
