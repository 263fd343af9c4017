#!/usr/bin/env bash
# soundfile 0.13.1 (libsndfile 1.2.2) reads different samples from an MP3 in blocks than at once.
# After each read it seeks to its current position. This resets the decoder, which then lacks the
# overlap with the last frame. So each block but the first starts with wrong samples, which click.
# Remedy: make the file report that it cannot seek, or read it at once. NumPy 2.3.5, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet soundfile==0.13.1 numpy==2.3.5
"$folder/venv/bin/python" - "$folder/tone.mp3" <<'PYTHON'
import sys

import numpy as np
import soundfile


class Forward(soundfile.SoundFile):
    def seekable(self):
        return False


path, rate, block = sys.argv[1], 16_000, 10_000
soundfile.write(path, 0.5 * np.sin(2 * np.pi * 440 * np.arange(4 * rate) / rate), rate, format="MP3")
whole, _ = soundfile.read(path)
errors = {}
for name, reader in {"by blocks": soundfile.SoundFile, "by blocks, not seekable": Forward}.items():
    with reader(path) as file:
        parts = []
        while len(part := file.read(block)):
            parts.append(part)
    joined = np.concatenate(parts)
    errors[name] = np.abs(joined - whole[: len(joined)]).max()
    print(f"{name}: {len(joined)} of {len(whole)} samples, largest error {errors[name]:.3f} of full scale")
sys.exit(not (errors["by blocks"] > 0.05 and errors["by blocks, not seekable"] < 1e-6))
PYTHON
# Output:
#   by blocks: 64000 of 64000 samples, largest error 0.595 of full scale
#   by blocks, not seekable: 64000 of 64000 samples, largest error 0.000 of full scale
