"""Shared parts of the builders: configs of clips, and record files that are equal in any process.

With Apache Beam the builders are pipelines, and without it generators of one machine. The examples
and their order are the same. N is the number of samples of a clip.
"""

import dataclasses
import functools
import math
import os
import pathlib
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.example_serializer import ExampleSerializer
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


@dataclasses.dataclass(frozen=True)
class Place:
    """A record in a file of this build. Its length is the record's."""

    path: str
    start: int
    size: int

    def __len__(self) -> int:
        return self.size

    def read(self) -> bytes:
        """Returns the record."""
        with open(self.path, "rb") as file:
            file.seek(self.start)
            return file.read(self.size)


class SpillingWriter(tfds.core.writer.BeamWriter):
    """Passes the places of records from one of Beam's processes to another, not the records.

    For runners on one machine: they hold all that they pass on in memory.
    """

    def __init__(self, folder: str, **settings):
        super().__init__(**settings)
        self._original_state["folder"] = folder  # all that BeamWriter sends to a process
        self._path = os.path.join(folder, f"records-{uuid.uuid4().hex}")  # of this process alone

    def _serialize_example(self, key_example: tuple[Any, Any]) -> tuple[Any, Place]:
        key, record = super()._serialize_example(key_example)
        with open(self._path, "ab") as file:
            place = Place(self._path, file.tell(), len(record))
            file.write(record)
        return key, place


class RepeatableWriter(tfds.core.writer.ExampleWriter):
    """Writes a record's features sorted by name. By default their order differs between processes.

    Beam sends it to its processes.
    """

    def write(self, path, examples: Iterable[tuple[int, bytes]]):
        """Writes a shard."""
        return super().write(path, self._sorted(examples))

    def _sorted(self, examples: Iterable[tuple[int, bytes | Place]]) -> Iterator[tuple[int, bytes]]:
        for key, record in examples:
            hosts.stop_point()
            serialized = record.read() if isinstance(record, Place) else record
            example = tf.train.Example.FromString(serialized)
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
    """Builds clip sets with the same examples in any process, and content.json with their hashes.

    Without Beam their files have the same bytes too.
    """

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

    def mapped_by_beam(
        self, function: Callable[[Any], Any], items: Sequence[Any], label: str
    ) -> Iterator[Any]:
        """Yields function(item) for each item, in no order. Items and results are JSON."""
        label = f"{self.name}/{self.builder_config.name} {label}"
        return pipelines.mapped(function, items, self.beam_folder, self._config, label)

    def _example_writer(self) -> RepeatableWriter:
        kind = RepeatableWriter if self.uses_beam else HashingWriter
        self._writer = kind(self.info.file_format)
        return self._writer

    def _generate_splits(self, dl_manager, download_config) -> Sequence[tfds.core.SplitInfo]:
        """Writes the splits as TFDS does, with SpillingWriter where Beam runs on this machine."""
        if not self.uses_beam or not pipelines.is_local(download_config):
            return super()._generate_splits(dl_manager, download_config)
        import apache_beam as beam

        features, infos, writers = self.info.features, [], {}
        serializer = ExampleSerializer(features.get_serialized_info())
        transforms = self._split_generators(dl_manager)
        self.beam_folder.mkdir(parents=True, exist_ok=True)
        label = f"{self.name}/{self.builder_config.name} clips"
        with pipelines.pipeline(download_config, label) as pipeline:
            for split, transform in transforms.items():
                writers[split] = writer = SpillingWriter(
                    str(self.beam_folder),
                    serializer=serializer,
                    filename_template=self._get_filename_template(split_name=split),
                    hash_salt=split,
                    disable_shuffling=False,
                    example_writer=self._example_writer(),
                    shard_config=download_config.get_shard_config(),
                )
                encode = functools.partial(_encoded, features.encode_example)
                encoded = pipeline | split >> transform | f"{split}_encode" >> beam.Map(encode)
                # A composite of its own: the writer's steps have the same names in each split.
                write = beam.ptransform_fn(writer.write_from_pcollection)
                _ = encoded | f"{split}_write" >> write()

        # What was written.
        for split, writer in writers.items():
            lengths, size = writer.finalize()
            template = self._get_filename_template(split_name=split)
            infos.append(
                tfds.core.SplitInfo(
                    name=split, shard_lengths=lengths, num_bytes=size, filename_template=template
                )
            )
        return infos

    def _download_and_prepare(self, dl_manager, download_config) -> None:
        self._config = pipelines.with_options(download_config)
        with pipelines.shared_path():
            super()._download_and_prepare(dl_manager, self._config)
        # TFDS renames its unfinished folder after this: a finished set always has its hashes.
        if self.uses_beam:
            self.beam_folder.rmtree(missing_ok=True)
            hashes = content.of_splits(self)
        else:
            hashes = {split: digest.hexdigest() for split, digest in self._writer.hashes.items()}
        content.write(self.data_path, hashes)


def _encoded(encode: Callable[[Any], Any], key_example: tuple[str, Any]) -> tuple[str, Any]:
    key, example = key_example
    return key, encode(example)
