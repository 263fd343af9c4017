"""What a data set holds, as a hash for each split, made while it is built and kept beside it.

Equal examples in the same order have equal hashes on any machine and in any process. Files of equal sets may differ:
protobuf writes the features of an example in another order in each process. So decoded features are hashed, in the
order of their names.
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

CONTENT = "content.json"  # in the folder of a set's version: {split: hash}


class ContentHash:
    """The sha256 of examples in the order in which they are added."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, features: Mapping[str, bytes]) -> None:
        """Adds an example: the bytes of each feature, by name."""
        self._digest.update(len(features).to_bytes(8, "little"))
        for name in sorted(features):
            for part in (name.encode(), features[name]):
                self._digest.update(
                    len(part).to_bytes(8, "little")
                )  # where one part ends and the next one starts
                self._digest.update(part)

    def add_example(self, example: "tf.train.Example") -> None:
        """Adds an example as TFDS keeps it in a record."""
        self.add({name: _values(feature) for name, feature in example.features.feature.items()})

    def hexdigest(self) -> str:
        """Returns the hash of what was added so far, 64 hexadecimal digits."""
        return self._digest.hexdigest()


def _values(feature: "tf.train.Feature") -> bytes:
    """The values of a feature, with their kind and their number."""
    kind = feature.WhichOneof("kind") or "none"
    if kind == "bytes_list":
        parts = [
            part
            for value in feature.bytes_list.value
            for part in (len(value).to_bytes(8, "little"), value)
        ]
    elif kind == "none":
        parts = []
    else:
        numbers, dtype = (
            (feature.float_list, "<f4") if kind == "float_list" else (feature.int64_list, "<i8")
        )
        parts = [np.asarray(numbers.value, dtype).tobytes()]
    return b"".join([kind.encode(), b" ", *parts])


def of_arrays(example: Mapping[str, np.ndarray | str]) -> dict[str, bytes]:
    """Returns the bytes of each feature of an example of integer arrays and texts, as `ContentHash.add` takes them."""
    features = {}
    for name, value in example.items():
        if isinstance(value, str):
            features[name] = value.encode()
        else:
            array = np.asarray(value)
            features[name] = (
                f"{array.dtype.name} {array.shape} ".encode() + array.astype("<i8").tobytes()
            )
    return features


def of_splits(builder: "tfds.core.DatasetBuilder") -> dict[str, str]:
    """Reads a whole data set that was built just now, and returns the hash of each split."""
    from musicrl_jax.inputs.libraries import tensorflow as tf
    from musicrl_jax.inputs.libraries import tensorflow_datasets as tfds

    hashes = {}
    for split, info in builder.info.splits.items():
        digest = ContentHash()
        if info.num_examples:
            raw = tfds.decode.DeserializeMethod.RAW_BYTES
            for record in builder.as_data_source(split, deserialize_method=raw):
                digest.add_example(tf.train.Example.FromString(record))
        hashes[split] = digest.hexdigest()
    return hashes


def write(folder: str | Path, hashes: Mapping[str, str]) -> None:
    """Keeps the hash of each split in the folder of a set's version."""
    write_json(Path(folder) / CONTENT, {split: hashes[split] for split in sorted(hashes)})


def read(folder: str | Path) -> dict[str, str]:
    """Returns the hash of each split; {} for a set that was built before there were hashes.

    Raises ValueError where the file is damaged.
    """
    path = Path(folder) / CONTENT
    if not path.exists():
        return {}
    return read_json(path, {str: str}, "build the data set anew")
