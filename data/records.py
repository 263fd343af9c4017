"""Record files that are the same, byte for byte, whichever process writes them."""

from collections.abc import Iterable

import tensorflow as tf
import tensorflow_datasets as tfds


class RepeatableWriter(tfds.core.writer.ExampleWriter):
    """Writes a record's features in the order of their names; protobuf alone takes another order in each process."""

    def write(self, path, examples: Iterable[tuple[int, bytes]]):
        return super().write(path, ((key, _in_order(record)) for key, record in examples))


def _in_order(record: bytes) -> bytes:
    return tf.train.Example.FromString(record).SerializeToString(deterministic=True)
