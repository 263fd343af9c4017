"""SeqIO tasks over random-access records, read in the order that `order.py` lays down.

A task is a `RecordSource` and its preprocessors. Training reads tasks through a SeqIO mixture whose sources
hold the wanted positions alone and whose schedule is `order.schedule`; nothing is shuffled in a buffer, and
nothing is skipped over.

Legend: B examples in a batch, C tasks in a mixture, N samples, L text pieces, P examples at a time.
"""

import errno
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from musicrl_jax.core.identity import ABSENT
from musicrl_jax.inputs import content, order, pieces
from musicrl_jax.inputs.libraries import seqio
from musicrl_jax.inputs.libraries import tensorflow as tf
from musicrl_jax.inputs.libraries import tensorflow_datasets as tfds
from musicrl_jax.inputs.records import Records

READ_AHEAD = 16  # records that one call of the reader fetches
TEXT_FIELDS = ("id", "caption", "attributes")

Preprocessor = Callable[..., tf.data.Dataset]
Ordinals = Callable[
    [], Iterator[np.ndarray]
]  # int64 [P] at a time: which examples of a component, 0, 1, ... its first
Turns = Callable[
    [], Iterator[tuple[np.ndarray, np.ndarray]]
]  # (component, ordinal) of a mixture's examples, [P] each


class RecordSource(seqio.DataSource):
    """Random-access records as a SeqIO source: in natural order, or shuffled by `order`.

    Every example carries `key`, int64 [2], its own for each (seed, task, example), so that a preprocessor
    that draws at random with `tf.random.stateless_*` draws the same after a resume. As SeqIO makes it, a
    source gives one epoch; `stream` makes one that gives any examples.
    """

    def __init__(
        self,
        records: Mapping[str, Records],
        spec: Mapping[str, tf.TensorSpec],
        component: int = 0,
        ordinals: Ordinals | None = None,
    ):
        """Records by split; the features to read, with their specs; the place in the mixture; which examples."""
        super().__init__(
            splits=tuple(records),
            num_input_examples={split: len(r) for split, r in records.items()},
            caching_permitted=False,
            performs_internal_shuffling=True,
        )
        self._records, self._spec = dict(records), dict(spec)
        self._component, self._ordinals = component, ordinals

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def list_shards(self, split: str) -> Sequence[str]:
        return [split]

    def stream(self, component: int, ordinals: Ordinals) -> "RecordSource":
        """The same records as component `component` of a mixture: those of its examples that `ordinals` names."""
        return RecordSource(self._records, self._spec, component, ordinals)

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        *,
        sequence_length: Mapping[str, int] | None = None,
        use_cached: bool = False,
        num_epochs: int | None = 1,
    ) -> tf.data.Dataset:
        """Examples as dicts of tensors. Shuffling without a seed is shuffling with seed 0."""
        if shard_info is not None and shard_info.num_shards > 1:
            raise ValueError("a RecordSource is not sharded by SeqIO: shard the examples")
        records, seed = self._records[split], seed or 0

        def examples() -> Iterator[dict[str, Any]]:
            size = len(records)
            epoch = (
                np.arange(start, min(start + READ_AHEAD, size))
                for start in range(0, size, READ_AHEAD)
            )
            for ordinal in epoch if self._ordinals is None else self._ordinals():
                index = (
                    order.shuffled(seed, self._component, ordinal, size)
                    if shuffle
                    else ordinal % size
                )
                keys = order.example_keys(seed, self._component, ordinal)
                for record, key in zip(records.__getitems__(index.tolist()), keys, strict=True):
                    yield {**{name: record[name] for name in self._spec}, "key": key}

        signature = {**self._spec, "key": tf.TensorSpec([2], tf.int64)}
        return tf.data.Dataset.from_generator(examples, output_signature=signature)


def crop_audio(dataset: tf.data.Dataset, sequence_length: Mapping[str, int]) -> tf.data.Dataset:
    """Audio int16 -> float32 in [-1, 1): a window of `sequence_length['audio']` samples, its start uniform."""
    samples = sequence_length["audio"]

    def crop(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        starts = tf.shape(example["audio"])[0] - samples + 1
        start = tf.random.stateless_uniform(
            [], example["key"], minval=0, maxval=starts, dtype=tf.int32, alg="philox"
        )
        window = tf.ensure_shape(example["audio"][start : start + samples], [samples])  # [N]
        return {**example, "audio": tf.cast(window, tf.float32) / 32768.0}

    return dataset.map(crop, num_parallel_calls=tf.data.AUTOTUNE)


def tokenize(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int],
    vocabulary: str,
    field: str = "caption",
) -> tf.data.Dataset:
    """`field` as int32 [L] pieces under 'text', cut at `sequence_length['text']` or filled with 0.

    The same pieces as `pieces.encode` gives, but a text without any is let through. FileNotFoundError where
    `vocabulary` is no file.
    """
    length = sequence_length["text"]
    read = pieces.reader(pieces.content(vocabulary), length)

    def ids(text: bytes) -> np.ndarray:
        return pieces.filled(read(text.decode()), length)

    def add(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        text = tf.numpy_function(ids, [example[field]], tf.int32, stateful=False)
        return {**example, "text": tf.ensure_shape(text, [length])}

    return dataset.map(add, num_parallel_calls=tf.data.AUTOTUNE)


def text_feature() -> seqio.Feature:
    """The output feature 'text' that `tokenize` makes."""
    return seqio.Feature(seqio.PassThroughVocabulary(0), add_eos=False, dtype=tf.int32)


def number_feature(dtype: type[np.number], rank: int) -> seqio.Feature:
    """Returns an output feature that is an array of numbers."""
    return seqio.Feature(
        seqio.PassThroughVocabulary(0), add_eos=False, dtype=tf.as_dtype(dtype), rank=rank
    )


def spec(shape: Sequence[int | None], dtype: type) -> tf.TensorSpec:
    """Returns the spec of a feature of a record; dtype is NumPy's, or bytes for a text."""
    return tf.TensorSpec(shape, tf.string if dtype is bytes else dtype)


def register(
    name: str,
    source: RecordSource,
    preprocessors: Sequence[Preprocessor],
    output_features: Mapping[str, seqio.Feature],
) -> seqio.Task:
    """The task, put in SeqIO's registry under `name` in place of what was there: '/' and '-' become '.' and '_'."""
    name = name.replace("/", ".").replace("-", "_")
    if name in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove(name)
    return seqio.TaskRegistry.add(
        name,
        source,
        output_features=output_features,
        preprocessors=preprocessors,
        shuffle_buffer_size=None,  # the source shuffles
    )


def scheduled(
    datasets: Sequence[tf.data.Dataset], rates: Sequence[float], seed: int, turns: Turns
) -> tf.data.Dataset:
    """A SeqIO mixture's `sample_fn`: datasets take turns as `turns` says, whatever the rates and the seed."""
    if len(datasets) == 1:
        return datasets[0]

    def components() -> Iterator[np.int64]:
        for component, _ in turns():
            yield from component

    choice = tf.data.Dataset.from_generator(
        components, output_signature=tf.TensorSpec([], tf.int64)
    )
    return tf.data.Dataset.choose_from_datasets(datasets, choice)


def batches(
    tasks: Sequence[tuple[seqio.Task, float]],
    split: str,
    sequence_length: Mapping[str, int],
    batch_size: int,
    seed: int,
    start_step: int = 0,
    epochs: int | None = None,
    rows: np.ndarray | None = None,
    passthrough: Sequence[str] = (),
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of a mixture of (task, rate), from step `start_step` on; to the bit what a run from 0 gives there.

    Endless where `epochs` is None. With `epochs`, rates are put aside: every epoch holds each record of
    each task once, and the last batch may be smaller. `rows` are those of each batch that are read, all by
    default: a host of several reads its own alone. `passthrough` names features that are handed on
    without being output features. Strings come as object arrays of str.
    """
    if batch_size < 1 or start_step < 0 or seed < 0:
        raise ValueError(
            f"batch_size {batch_size} must be at least 1, start_step {start_step} and seed {seed} at least 0"
        )
    chosen = sorted(tasks, key=lambda pair: pair[0].name)  # SeqIO sorts them so
    sizes = [task.num_input_examples(split) for task, _ in chosen]
    rates = [rate for _, rate in chosen] if epochs is None else sizes
    order.block_counts(rates)  # refuses what is wrong with them before the first batch
    end = None if epochs is None else epochs * sum(sizes)
    row_count = batch_size if rows is None else len(rows)
    at_once = max(1, READ_AHEAD // row_count)  # steps

    def turns() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for position in order.positions(batch_size, start_step, end, rows, at_once):
            yield order.schedule(seed, position, rates)

    def own(component: int) -> Iterator[np.ndarray]:
        return (ordinal[turn == component] for turn, ordinal in turns())

    streams = [
        (
            task.replace(source=task.source.stream(component, functools.partial(own, component))),
            float(rate),
        )
        for component, ((task, _), rate) in enumerate(zip(chosen, rates, strict=True))
    ]
    mixture = seqio.Mixture("stream", streams, sample_fn=functools.partial(scheduled, turns=turns))
    dataset = mixture.get_dataset(
        sequence_length,
        split,
        seed=seed,
        num_epochs=1,
        passthrough_features=passthrough,
        try_in_mem_cache=False,
    )
    dataset = dataset.batch(row_count, drop_remainder=epochs is None).prefetch(tf.data.AUTOTUNE)
    return map(_numpy, dataset.as_numpy_iterator())


def _numpy(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch with its bytes decoded."""
    return {
        name: np.array([text.decode() for text in value], object)
        if value.dtype == object
        else value
        for name, value in batch.items()
    }


def _newest(name: str, data_dir: str) -> Path | None:
    """The folder of a prepared data set's newest version; None where there is none."""
    folder = Path(data_dir).expanduser() / name
    versions = [p.name for p in folder.glob("*") if tfds.core.Version.is_valid(p.name)]
    return folder / str(max(map(tfds.core.Version, versions))) if versions else None


def prepared(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """The newest version of a prepared data set; FileNotFoundError that says how to build it where there is none."""
    folder = _newest(name, data_dir)
    if folder is None:
        raise FileNotFoundError(
            f"datasets: no prepared data set {name!r} at {Path(data_dir).expanduser() / name}; build it with "
            "`musicrl build`, or correct data_dir"
        )
    return _open(str(folder))


def content_hashes(names: Iterable[str], data_dir: str) -> dict[str, Any]:
    """Returns the hash of each split of the prepared data sets, for `checkpoint.describe`.

    Hashes were made when a set was built, so that no record is read. A set that was built before there were hashes is
    left out; one that is not there is ABSENT.
    """
    hashes = {}
    for name in sorted(names):
        folder = _newest(name, data_dir)
        if folder is None:
            hashes[name] = ABSENT
        elif by_split := content.read(folder):
            hashes[name] = by_split
    return hashes


@functools.lru_cache(maxsize=32)
def _open(directory: str) -> tfds.core.DatasetBuilder:
    # Kept, as data sets do not change under their version.
    return open_builder(directory, "remove that folder and build it again with `musicrl build`")


def open_builder(directory: str, remedy: str) -> tfds.core.DatasetBuilder:
    """Opens a data set that TFDS wrote; ValueError with the remedy where its descriptions are damaged or missing."""
    try:
        return tfds.builder_from_directory(directory)
    except (
        Exception
    ) as error:  # TFDS and protobuf raise KeyError, ParseError, DatasetNotFoundError and more
        reason = (str(error) or type(error).__name__).strip().splitlines()[0][:200]
        raise ValueError(f"{directory} is no whole data set ({reason}): {remedy}") from error


def filled_splits(builder: tfds.core.DatasetBuilder) -> dict[str, Records]:
    """The records of every split that has any."""
    return {
        split: builder.as_data_source(split)
        for split, info in builder.info.splits.items()
        if info.num_examples > 0
    }


@functools.lru_cache(maxsize=32)
def _texts(directory: str, split: str) -> tuple[dict[str, str], ...]:
    builder = _open(directory)
    records = filled_splits(builder).get(split, ())
    fields = [field for field in TEXT_FIELDS if field in builder.info.features]
    return tuple({field: record[field].decode() for field in fields} for record in records)


def texts(name: str, data_dir: str, split: str) -> tuple[dict[str, str], ...]:
    """What TEXT_FIELDS each record of a split has, in natural order; nothing where there is no such split.

    All records are read, audio and all, at some thousand clips a second; the texts are kept.
    """
    return _texts(str(prepared(name, data_dir).data_dir), split)


def disk_is_full(error: BaseException | None) -> bool:
    """Whether a full disk is at the bottom of an error: TFDS wraps it, TensorFlow and ArrayRecord raise their own."""
    while error is not None:
        if os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
