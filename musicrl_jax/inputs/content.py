"""Content hashes of data sets: one for each split, made while a set is built and stored beside it.

Equal examples in the same order have equal hashes on any machine and in any process. The files of
equal sets may differ, since protobuf writes the features of an example in an order that changes
with the process. So the hash covers decoded features, in the order of their names.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from musicrl_jax.core.files import read_json, write_json

if TYPE_CHECKING:
    import tensorflow as tf
    import tensorflow_datasets as tfds

# In the folder of a set's version: {split: hash}.
CONTENT = "content.json"
# Kind of a feature -> dtype of its values.
NUMBERS = {"float_list": "<f4", "int64_list": "<i8"}


class ContentHash:
    """The sha256 of examples in the order in which they are added."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, features: Mapping[str, bytes]) -> None:
        """Adds an example: the bytes of each feature, by name."""
        self._digest.update(_length(features))
        for name in sorted(features):
            for part in (name.encode(), features[name]):
                # Marks where a part ends.
                self._digest.update(_length(part))
                self._digest.update(part)

    def add_example(self, example: "tf.train.Example") -> None:
        """Adds an example as TFDS stores it in a record."""
        self.add({name: _values(feature) for name, feature in example.features.feature.items()})

    def hexdigest(self) -> str:
        """Returns the hash of what was added so far, 64 hexadecimal digits."""
        return self._digest.hexdigest()


def _length(part: bytes | Mapping) -> bytes:
    return len(part).to_bytes(8, "little")


def _values(feature: "tf.train.Feature") -> bytes:
    """Returns the kind of a feature and its values."""
    kind = feature.WhichOneof("kind") or "none"
    # bytes have lengths of their own; numbers all have 4 or 8 bytes.
    content = b""
    if kind == "bytes_list":
        content = b"".join(_length(value) + value for value in feature.bytes_list.value)
    elif kind in NUMBERS:
        content = np.asarray(getattr(feature, kind).value, NUMBERS[kind]).tobytes()
    return kind.encode() + b" " + content


# --- Hashes of data sets ---


def of_arrays(example: Mapping[str, np.ndarray | str]) -> dict[str, bytes]:
    """Returns the bytes of each feature of an example of integer arrays and texts."""
    features = {}
    for name, value in example.items():
        if isinstance(value, str):
            features[name] = value.encode()
        else:
            array = np.asarray(value)
            header = f"{array.dtype.name} {array.shape} ".encode()
            features[name] = header + array.astype("<i8").tobytes()
    return features


def of_splits(builder: "tfds.core.DatasetBuilder") -> dict[str, str]:
    """Reads a whole data set and returns the hash of each split."""
    from musicrl_jax.inputs.libraries import tensorflow as tf
    from musicrl_jax.inputs.libraries import tensorflow_datasets as tfds

    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    hashes = {}
    for split, info in builder.info.splits.items():
        digest = ContentHash()
        if info.num_examples:
            for record in builder.as_data_source(split, deserialize_method=raw):
                digest.add_example(tf.train.Example.FromString(record))
        hashes[split] = digest.hexdigest()
    return hashes


def write(folder: str | Path, hashes: Mapping[str, str]) -> None:
    """Writes the hash of each split into the folder of a set's version."""
    write_json(Path(folder) / CONTENT, dict(sorted(hashes.items())))


def read(folder: str | Path) -> dict[str, str]:
    """Returns the hash of each split; {} for a set from a version without hashes.

    Raises ValueError if the file is damaged.
    """
    path = Path(folder) / CONTENT
    return read_json(path, {str: str}, "build the data set anew") if path.exists() else {}
