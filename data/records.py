"""Shared parts of the builders: configs of clips, and record files that are equal in any process.

With Apache Beam the builders are pipelines, and without it generators of one machine. The examples
and their order are the same. N is the number of samples of a clip.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.naming import FilenameInfo

from musicrl_jax.core import hosts
from musicrl_jax.inputs import content, pipelines


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

    Beam sends it to its processes.
    """

    def write(self, path, examples: Iterable[tuple[int, bytes]]):
        """Writes a shard."""
        return super().write(path, self._sorted(examples))

    def _sorted(self, examples: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
        for key, record in examples:
            hosts.stop_point()
            example = tf.train.Example.FromString(record)
            self._add(example)
            yield key, example.SerializeToString(deterministic=True)

    def _add(self, example: tf.train.Example) -> None:
        """Takes note of an example, in the order in which they are written."""


class HashingWriter(RepeatableWriter):
    """Hashes a data set while this process alone writes it.

    Attributes:
        hashes: content hash of each split, over its shards in order.
    """

    def __init__(self, file_format: str | None):
        super().__init__(file_format)
        self.hashes: dict[str, content.ContentHash] = {}

    def write(self, path, examples: Iterable[tuple[int, bytes]]):
        """Writes a shard. TFDS calls it for the shards of a split in order."""
        split = FilenameInfo.from_str(pathlib.Path(path).name).split
        self._digest = self.hashes.setdefault(split, content.ContentHash())
        return super().write(path, examples)

    def _add(self, example: tf.train.Example) -> None:
        self._digest.add_example(example)


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

    # --- the engine: Beam where it is installed ---

    @property
    def uses_beam(self) -> bool:
        """Whether this build is a pipeline."""
        return self._config.beam_options is not None or self._config.beam_runner is not None

    @property
    def beam_folder(self) -> epath.Path:
        """Folder that all processes of this build share. It is gone from the finished data set."""
        return self.data_path / "beam"

    def mapped_by_beam(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """Yields function(item) for each item, in no order. Items and results are JSON."""
        return pipelines.mapped(function, items, self.beam_folder, self._config)

    def _example_writer(self) -> RepeatableWriter:
        kind = RepeatableWriter if self.uses_beam else HashingWriter
        self._writer = kind(self.info.file_format)
        return self._writer

    def _download_and_prepare(self, dl_manager, download_config) -> None:
        self._config = pipelines.with_options(download_config)
        super()._download_and_prepare(dl_manager, self._config)
        # TFDS renames its unfinished folder after this: a finished set always has its hashes.
        if self.uses_beam:
            self.beam_folder.rmtree(missing_ok=True)
            hashes = content.of_splits(self)
        else:
            hashes = {split: digest.hexdigest() for split, digest in self._writer.hashes.items()}
        content.write(self.data_path, hashes)
