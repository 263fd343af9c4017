#!/usr/bin/env bash
# tensorflow-datasets 4.9.10 serialises the same example to different bytes in each process. A
# record is a protobuf map, which has no fixed order of keys, and PYTHONHASHSEED does not change
# that (protobuf 6.33.2, TensorFlow 2.21). So two builds of a data set differ byte for byte, and a
# hash of the files does not identify the data.
# Remedy: hash decoded features in sorted order, or use protobuf's deterministic serialisation.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tensorflow-datasets==4.9.10 tensorflow==2.21.0 protobuf==6.33.2 setuptools
cat > "$folder/example.py" <<'PYTHON'
import hashlib

import numpy as np
import tensorflow_datasets as tfds

names = ("audio", "caption", "id", "attributes", "notes", "tempo", "key", "metre")
features = tfds.features.FeaturesDict({name: tfds.features.Text() for name in names})
record = features.serialize_example(features.encode_example({name: name.upper() for name in names}))
print(hashlib.sha256(record).hexdigest()[:12])
PYTHON
export TF_CPP_MIN_LOG_LEVEL=3 PYTHONHASHSEED=0
for _ in 1 2 3 4; do "$folder/venv/bin/python" "$folder/example.py" 2> /dev/null; done | tee "$folder/hashes"
different=$(sort -u "$folder/hashes" | wc -l)
echo "$different different records in 4 processes with PYTHONHASHSEED=0"
[ "$different" -gt 1 ]
# Output, with other hashes each time:
#   d912a5254a62
#   f6873ca07e2a
#   ad61fc6fe7b9
#   8342a5a702fe
#   4 different records in 4 processes with PYTHONHASHSEED=0
