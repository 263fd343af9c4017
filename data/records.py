"""Shared parts of the builders: configs of clips, and record files that are equal in any process.

N is the number of samples of a clip.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from tensorflow_datasets.core.naming import FilenameInfo

from musicrl_jax.core import hosts
from musicrl_jax.inputs import content


@dataclasses.dataclass(eq=False, kw_only=True)
class ClipConfig(tfds.core.BuilderConfig):
    """Length and sample rate of a data set's clips."""

    clip_seconds: float
    sample_rate_hz: int = 16000

    @property
    def samples(self) -> int:
        """Samples of a clip, N."""
        return round(self.clip_seconds * self.sample_rate_hz)

    def check_positive(self, builder: str, *fields: str) -> None:
        """Raises ValueError for a field that is not a finite number above 0."""
        for field in fields:
            if not 0 < getattr(self, field) < math.inf:
                raise ValueError(
                    f"{builder}/{self.name}: {field} is {getattr(self, field)}: give more than 0"
                )


class RepeatableWriter(tfds.core.writer.ExampleWriter):
    """Writes a record's features sorted by name. By default their order differs between processes.

    Attributes:
        hashes: content hash of each split, over its shards in order.
    """

    def __init__(self, file_format: str | None):
        super().__init__(file_format)
        self.hashes: dict[str, content.ContentHash] = {}

    def write(self, path, examples: Iterable[tuple[int, bytes]]):
        """Writes a shard. TFDS calls it for the shards of a split in order."""
        split = FilenameInfo.from_str(pathlib.Path(path).name).split
        digest = self.hashes.setdefault(split, content.ContentHash())

        def sorted_records() -> Iterator[tuple[int, bytes]]:
            for key, record in examples:
                hosts.stop_point()
                example = tf.train.Example.FromString(record)
                digest.add_example(example)
                yield key, example.SerializeToString(deterministic=True)

        return super().write(path, sorted_records())


class RepeatableBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Builds clip sets with the same bytes in any process, and content.json with their hashes."""

    def clip_info(
        self, *texts: str, metadata: dict[str, object], license: str | None = None
    ) -> tfds.core.DatasetInfo:
        """Returns the description of a set of `audio` (int16 [N]) with the given text features."""
        audio = tfds.features.Tensor(
            shape=(self.builder_config.samples,),
            dtype=np.int16,
            encoding=tfds.features.Encoding.BYTES,
        )
        features = {"audio": audio, **{name: tfds.features.Text() for name in texts}}
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features),
            supervised_keys=None,
            metadata=tfds.core.MetadataDict(metadata),
            license=license,
        )

    def _example_writer(self) -> RepeatableWriter:
        self._writer = RepeatableWriter(self.info.file_format)
        return self._writer

    def _download_and_prepare(self, dl_manager, download_config) -> None:
        super()._download_and_prepare(dl_manager, download_config)
        # TFDS renames its unfinished folder after this: a finished set always has its hashes.
        hashes = {split: digest.hexdigest() for split, digest in self._writer.hashes.items()}
        content.write(self.data_path, hashes)
