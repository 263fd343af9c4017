"""Record files that are the same, byte for byte, whichever process writes them, and a hash of what they hold."""

import pathlib
from collections.abc import Iterable, Iterator

import tensorflow as tf
import tensorflow_datasets as tfds
from tensorflow_datasets.core.naming import FilenameInfo

from musicrl_jax.core import hosts
from musicrl_jax.inputs import content


class RepeatableWriter(tfds.core.writer.ExampleWriter):
    """Writes a record's features in the order of their names; protobuf alone takes another order in each process.

    Attributes:
        hashes: what each split holds, over its shards in their order.
    """

    def __init__(self, file_format: str | None):
        super().__init__(file_format)
        self.hashes: dict[str, content.ContentHash] = {}

    def write(self, path, examples: Iterable[tuple[int, bytes]]):
        """Writes a shard; TFDS calls it for one shard of a split after the other."""
        digest = self.hashes.setdefault(
            FilenameInfo.from_str(pathlib.Path(path).name).split, content.ContentHash()
        )

        def in_order() -> Iterator[tuple[int, bytes]]:
            for key, record in examples:
                hosts.stop_point()
                example = tf.train.Example.FromString(record)
                digest.add_example(example)
                yield key, example.SerializeToString(deterministic=True)

        return super().write(path, in_order())


class RepeatableBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A builder whose sets have the same bytes in any process, and a content.json with a hash for each split."""

    def _example_writer(self) -> RepeatableWriter:
        self._writer = RepeatableWriter(self.info.file_format)
        return self._writer

    def _download_and_prepare(self, dl_manager, download_config) -> None:
        super()._download_and_prepare(dl_manager, download_config)
        # Still in TFDS's unfinished folder: a set has its hash, or is not there.
        content.write(
            self.data_path,
            {split: digest.hexdigest() for split, digest in self._writer.hashes.items()},
        )
