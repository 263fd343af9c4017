"""SeqIO tasks over random-access records, read in the order that `order.py` defines.

A task is a `RecordSource` and its preprocessors. Training reads tasks through a SeqIO mixture. Its
sources yield only the scheduled examples and its schedule is `order.schedule`, so nothing is
shuffled in a buffer and nothing is skipped.

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
from musicrl_jax.inputs.order import BatchOrder
from musicrl_jax.inputs.records import Records

# Records that one call of the reader fetches.
READ_AHEAD = 16
TEXT_FIELDS = ("id", "caption", "attributes")

Preprocessor = Callable[..., tf.data.Dataset]
# Yields int64 [P]: numbers of the examples of one component, 0 for its first.
Ordinals = Callable[[], Iterator[np.ndarray]]
# Yields (component, ordinal) of the examples of a mixture, int64 [P] each.
Turns = Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]

# --- Tasks ---


class RecordSource(seqio.DataSource):
    """Random-access records as a SeqIO source: in natural order, or shuffled by `order`.

    Every example carries `key`, int64 [2], unique for each (seed, task, example). A preprocessor
    that uses it with `tf.random.stateless_*` gives the same numbers after a resume. Without
    `ordinals` the source yields one epoch.
    """

    def __init__(
        self,
        records: Mapping[str, Records],
        spec: Mapping[str, tf.TensorSpec],
        component: int = 0,
        ordinals: Ordinals | None = None,
    ):
        """Initialises the source.

        Args:
          records: by split.
          spec: the features to read.
          component: number of this source in its mixture.
          ordinals: which examples are read.
        """
        super().__init__(
            splits=tuple(records),
            num_input_examples={split: len(each) for split, each in records.items()},
            caching_permitted=False,
            performs_internal_shuffling=True,
        )
        self._records, self._spec = dict(records), dict(spec)
        self._component, self._ordinals = component, ordinals

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """False: SeqIO does not shard it."""
        return False

    def list_shards(self, split: str) -> Sequence[str]:
        """Returns one shard for a split."""
        return [split]

    def stream(self, component: int, ordinals: Ordinals) -> "RecordSource":
        """Returns the same records as component `component`, limited to the examples `ordinals`."""
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
        """Returns examples as dicts of tensors. Shuffling without a seed uses seed 0."""
        if shard_info is not None and shard_info.num_shards > 1:
            raise ValueError("a RecordSource is not sharded by SeqIO: shard the examples")
        records, seed = self._records[split], seed or 0
        size = len(records)

        def epoch() -> Iterator[np.ndarray]:
            for start in range(0, size, READ_AHEAD):
                yield np.arange(start, min(start + READ_AHEAD, size))

        def examples() -> Iterator[dict[str, Any]]:
            for ordinal in (self._ordinals or epoch)():
                index = ordinal % size
                if shuffle:
                    index = order.shuffled(seed, self._component, ordinal, size)
                keys = order.example_keys(seed, self._component, ordinal)
                for record, key in zip(records.__getitems__(index.tolist()), keys, strict=True):
                    yield {**{name: record[name] for name in self._spec}, "key": key}

        signature = {**self._spec, "key": tf.TensorSpec([2], tf.int64)}
        return tf.data.Dataset.from_generator(examples, output_signature=signature)


def crop_audio(dataset: tf.data.Dataset, sequence_length: Mapping[str, int]) -> tf.data.Dataset:
    """Replaces audio int16 by a window of it, float32 in [-1, 1), with a uniform start.

    The window has `sequence_length['audio']` samples.
    """
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
    dataset: tf.data.Dataset, sequence_length: Mapping[str, int], vocabulary: str
) -> tf.data.Dataset:
    """Adds the pieces of the caption as 'text', int32 [L], cut or padded with 0 to L pieces.

    L is `sequence_length['text']`. The pieces are those of `pieces.encode`, but a text without any
    passes. Raises FileNotFoundError if `vocabulary` is not a file.
    """
    length = sequence_length["text"]
    read = pieces.reader(pieces.content(vocabulary), length)

    def ids(text: bytes) -> np.ndarray:
        return pieces.padded(read(text.decode()), length)

    def add(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        text = tf.numpy_function(ids, [example["caption"]], tf.int32, stateful=False)
        return {**example, "text": tf.ensure_shape(text, [length])}

    return dataset.map(add, num_parallel_calls=tf.data.AUTOTUNE)


def number_feature(dtype: type[np.number], rank: int = 1) -> seqio.Feature:
    """Returns an output feature that is an array of numbers."""
    vocabulary = seqio.PassThroughVocabulary(0)
    return seqio.Feature(vocabulary, add_eos=False, dtype=tf.as_dtype(dtype), rank=rank)


def spec(shape: Sequence[int | None], dtype: type) -> tf.TensorSpec:
    """Returns the spec of a feature of a record, from NumPy's dtype."""
    return tf.TensorSpec(shape, dtype)


def register(
    name: str,
    source: RecordSource,
    preprocessors: Sequence[Preprocessor],
    output_features: Mapping[str, seqio.Feature],
) -> seqio.Task:
    """Adds a task to SeqIO's registry, in place of an older one of this name, and returns it.

    In the name, '/' becomes '.' and '-' becomes '_'.
    """
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


# --- Batches ---


def scheduled(
    datasets: Sequence[tf.data.Dataset], rates: Sequence[float], seed: int, turns: Turns
) -> tf.data.Dataset:
    """Interleaves datasets in the order of `turns`; a SeqIO mixture's `sample_fn`.

    `turns` already depends on rates and seed.
    """
    if len(datasets) == 1:
        return datasets[0]

    def components() -> Iterator[np.int64]:
        for component, _ in turns():
            yield from component

    signature = tf.TensorSpec([], tf.int64)
    choice = tf.data.Dataset.from_generator(components, output_signature=signature)
    return tf.data.Dataset.choose_from_datasets(datasets, choice)


def batches(
    tasks: Sequence[tuple[seqio.Task, float]],
    split: str,
    sequence_length: Mapping[str, int],
    batch_order: BatchOrder,
    passthrough: Sequence[str] = (),
) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches of a mixture, equal to the bit to those of a run from step 0.

    Args:
      tasks: (task, rate). With `epochs`, rates are ignored: each epoch holds every record of each
        task once.
      split: of the records.
      sequence_length: N as 'audio', L as 'text'.
      batch_order: which batches are read.
      passthrough: features that are returned without being output features.

    Returns:
      Arrays [B, ...] by feature, strings as object arrays of str.
    """
    # The components: SeqIO sorts the tasks of a mixture by name.
    chosen = sorted(tasks, key=lambda pair: pair[0].name)
    sizes = [task.num_input_examples(split) for task, _ in chosen]
    seed, epochs, row_count = batch_order.seed, batch_order.epochs, batch_order.row_count
    rates = [rate for _, rate in chosen] if epochs is None else sizes
    # Raises for wrong rates before the first batch.
    order.block_counts(rates)

    # The order: each component's source computes the schedule and keeps its own part.
    end = None if epochs is None else epochs * sum(sizes)
    steps = max(1, READ_AHEAD // row_count)
    places = (batch_order.batch_size, batch_order.start_step, end, batch_order.rows, steps)

    def turns() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for position in order.positions(*places):
            yield order.schedule(seed, position, rates)

    def ordinals(component: int) -> Iterator[np.ndarray]:
        for turn, ordinal in turns():
            yield ordinal[turn == component]

    # The mixture.
    streams = []
    for component, ((task, _), rate) in enumerate(zip(chosen, rates, strict=True)):
        source = task.source.stream(component, functools.partial(ordinals, component))
        streams.append((task.replace(source=source), float(rate)))
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
    return map(_decoded, dataset.as_numpy_iterator())


def record_batches(
    name: str,
    split: str,
    records: Records,
    spec: Mapping[str, tf.TensorSpec],
    batch_order: BatchOrder,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches of the arrays of numbers in `spec`, as the records hold them."""
    features, length = {}, {}
    for field, each in spec.items():
        features[field] = number_feature(each.dtype.as_numpy_dtype, each.shape.rank)
        if each.shape.rank:
            length[field] = each.shape[0]
    task = register(name, RecordSource({split: records}, spec), [], features)
    return batches([(task, 1.0)], split, length, batch_order)


def _decoded(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Decodes the bytes of a batch in place."""
    for name, value in batch.items():
        if value.dtype == object:
            batch[name] = np.array([text.decode() for text in value], object)
    return batch


# --- Prepared data sets ---


def _newest(name: str, data_dir: str) -> Path | None:
    """Returns the folder of the newest version of a prepared data set, or None without one."""
    folder = Path(data_dir).expanduser() / name
    versions = [p.name for p in folder.glob("*") if tfds.core.Version.is_valid(p.name)]
    return folder / str(max(map(tfds.core.Version, versions))) if versions else None


def prepared(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """Returns the newest version of a prepared data set.

    Raises FileNotFoundError, which says how to build it, if there is none.
    """
    folder = _newest(name, data_dir)
    if folder is None:
        raise FileNotFoundError(
            f"datasets: no prepared data set {name!r} at {Path(data_dir).expanduser() / name}: "
            "build it with `musicrl build`, or correct data_dir"
        )
    return _open(str(folder))


def content_hashes(names: Iterable[str], data_dir: str) -> dict[str, Any]:
    """Returns the hash of each split of the prepared data sets, for `checkpoint.describe`.

    The hashes were made when a set was built, so no record is read. Sets from a version without
    hashes are left out; missing sets are ABSENT.
    """
    hashes = {}
    for name in sorted(names):
        folder = _newest(name, data_dir)
        if folder is None:
            hashes[name] = ABSENT
        elif by_split := content.read(folder):
            hashes[name] = by_split
    return hashes


# A data set does not change under its version.
@functools.lru_cache(maxsize=32)
def _open(directory: str) -> tfds.core.DatasetBuilder:
    return open_builder(directory, "remove that folder and build it again with `musicrl build`")


def open_builder(directory: str, remedy: str) -> tfds.core.DatasetBuilder:
    """Opens a data set that TFDS wrote.

    Raises ValueError with the remedy if its descriptions are damaged or missing.
    """
    try:
        return tfds.builder_from_directory(directory)
    except Exception as error:  # KeyError, ParseError, DatasetNotFoundError and more
        reason = (str(error) or type(error).__name__).strip().splitlines()[0][:200]
        raise ValueError(f"{directory} is no whole data set ({reason}): {remedy}") from error


def filled_splits(builder: tfds.core.DatasetBuilder) -> dict[str, Records]:
    """Returns the records of every split that has any."""
    filled = [split for split, info in builder.info.splits.items() if info.num_examples]
    return {split: builder.as_data_source(split) for split in filled}


@functools.lru_cache(maxsize=32)
def _texts(directory: str, split: str) -> tuple[dict[str, str], ...]:
    builder = _open(directory)
    records = filled_splits(builder).get(split, ())
    fields = [field for field in TEXT_FIELDS if field in builder.info.features]
    texts = []
    for record in records:
        texts.append({field: record[field].decode() for field in fields})
    return tuple(texts)


def texts(name: str, data_dir: str, split: str) -> tuple[dict[str, str], ...]:
    """Returns the TEXT_FIELDS of each record of a split, in natural order; () without the split.

    The first call reads all records with their audio, some thousand clips a second. The result is
    cached.
    """
    return _texts(str(prepared(name, data_dir).data_dir), split)


def disk_is_full(error: BaseException | None) -> bool:
    """Returns whether a full disk caused an error.

    TFDS wraps the original error; TensorFlow and ArrayRecord raise types of their own.
    """
    while error is not None:
        if os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
