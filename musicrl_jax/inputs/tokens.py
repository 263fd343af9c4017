"""Token data: clips that the frozen models have read once, on disk for the models that are trained on tokens.

A token folder holds a TFDS data set a split (`train/`, in ArrayRecord shards) and `manifest.json`: the
hashes of the models that wrote the tokens, their layout, the data that was read, and the number and the hash of
the examples of every split that is complete. A split that the manifest does not count is not there.

An example is a clip's `id` and `caption` and the system's arrays of tokens, each of one shape in a split: of a
MusicLM `semantic` i32 [F], `acoustic` i32 [T, Q] and `mulan` i32 [M].

Legend: B clips, F policy frames, T codec frames, Q codec levels, M MuLan levels.
"""

import dataclasses
import errno
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import numpy as np

from musicrl_jax.core.checkpoint import PATH
from musicrl_jax.core.files import read_json
from musicrl_jax.core.identity import CONTENT, changed_content
from musicrl_jax.inputs import content
from musicrl_jax.inputs.records import Records

if TYPE_CHECKING:
    import tensorflow as tf

SCHEMA = "1.1.0"  # of the examples and the manifest; a change of either needs a new one
MANIFEST = "manifest.json"
VOTES = "votes.jsonl"  # lies beside the manifest where the tokens are of clips that were voted on
MANIFEST_KIND = {
    "schema": str,
    "models": {str: str},
    "layout": dict,
    "data": dict,
    "counts": {str: int},
    "content?": {str: str},
}
TEXTS = ("id", "caption")  # of an example, beside its tokens
Shapes = dict[str, jax.ShapeDtypeStruct]
ClipShapes = Callable[[str], Mapping[str, tuple[int, ...]]]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens that `musicrl encode` wrote.

    Attributes:
      directory: the token folder.
      models: the hash of each model that this run uses, by name ('mulan', 'semantic', 'codec'); tokens of
        other models are refused. None takes what is there.
    """

    directory: str = dataclasses.field(metadata=PATH)
    models: Mapping[str, str] | None = None
    verb: ClassVar[str] = "encode"  # writes such a folder

    def batches(
        self,
        split: str,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        epochs: int | None = None,
        rows: np.ndarray | None = None,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields the arrays of tokens, i32 [B, ...] by name, in a fixed order.

        A batch is a pure function of (seed, step). Endless, every batch full, where `epochs` is None; else
        that many passes, the last batch perhaps smaller. Raises FileNotFoundError or ValueError, before the
        first batch, where tokens are missing or other models wrote them.
        """
        from musicrl_jax.inputs import tasks

        count = self.count(split)  # also a check of the models
        if epochs is None and batch_size > count:
            raise ValueError(
                f"batch_size {batch_size} is more than the {count} examples of split {split!r} in "
                f"{self.directory}: lower it, or encode more clips"
            )
        records, spec = read(self.directory, split)
        spec = token_spec(spec)
        source = tasks.RecordSource({split: records}, spec)
        features = {
            name: tasks.number_feature(np.int32, each.shape.rank) for name, each in spec.items()
        }
        task = tasks.register("tokens", source, [], features)
        length = {name: each.shape[0] for name, each in spec.items()}
        return tasks.batches(
            [(task, 1.0)], split, length, batch_size, seed, start_step, epochs, rows
        )

    def layout(self) -> dict[str, int]:
        """Levels and codes of the models that wrote them: 'acoustic_levels', 'acoustic_codes', 'semantic_codes', ..."""
        return read_manifest(self.directory, self.verb)["layout"]

    def shapes(self, batch_size: int, clip_seconds: float, tokens: ClipShapes) -> Shapes:
        """Returns the shapes of a batch; see `objectives.objective.Data`."""
        return {
            name: jax.ShapeDtypeStruct((batch_size, *shape), np.int32)
            for name, shape in tokens(self.directory).items()
        }

    def splits(self) -> list[str]:
        """The splits that `musicrl encode` finished."""
        return list(read_manifest(self.directory, self.verb)["counts"])

    def content_hashes(self) -> dict[str, Any]:
        """Returns {'tokens': {split: hash}}; {} where there are no tokens, or older ones, which have no hashes."""
        if not (Path(self.directory) / MANIFEST).is_file():
            return {}
        hashes = read_manifest(self.directory).get("content")
        return {"tokens": hashes} if hashes else {}

    def count(self, split: str) -> int:
        """The number of examples in a split."""
        manifest = read_manifest(self.directory, self.verb)
        for name, expected in (self.models or {}).items():
            if (found := manifest["models"].get(name)) != expected:
                raise ValueError(
                    f"tokens in {self.directory} were written by {name} {found}, and this run uses {name} {expected}: "
                    f"run `musicrl {self.verb}` again with the models of this run"
                )
        if split not in manifest["counts"]:
            raise ValueError(
                f"split {split!r} is not among {sorted(manifest['counts'])} in {self.directory}: "
                f"`musicrl {self.verb}` did not finish it"
            )
        return manifest["counts"][split]


def read_manifest(directory: str, verb: str = "encode") -> dict[str, Any]:
    """Reads {'schema', 'models': {name: hash}, 'layout': {}, 'data': {}, 'counts': {split: n}} of a token folder.

    With 'content': {split: hash}, but for splits that were written before there were hashes.

    Raises FileNotFoundError or ValueError, which name the verb that writes such a folder: `verb`, or 'collect' where
    votes are there.
    """
    path = Path(directory) / MANIFEST
    verb = "collect" if (Path(directory) / VOTES).exists() else verb
    if not path.exists() and verb == "collect":
        raise FileNotFoundError(
            f"directory: no tokens at {directory} for the votes on them; `musicrl collect` writes both, and votes of "
            f"people need the {MANIFEST} and the splits of the folder whose clips they heard"
        )
    if not path.exists():
        raise FileNotFoundError(
            f"directory: no tokens at {directory}; write them with `musicrl encode`"
        )
    remedy = f"restore a copy, or run `musicrl {verb}` again"
    if (schema := read_json(path, {"schema": str}, remedy)["schema"]) != SCHEMA:
        raise ValueError(
            f"tokens in {directory} have schema {schema}, not {SCHEMA}: run `musicrl {verb}` again"
        )
    return read_json(path, MANIFEST_KIND, remedy)


def read(directory: str, split: str) -> tuple[Records, dict[str, "tf.TensorSpec"]]:
    """The examples of a split, with `id` and `caption`, in the order they were written; and each feature's spec."""
    from musicrl_jax.inputs import tasks

    builder = tasks.open_builder(str(Path(directory) / split), "run the verb that wrote it again")
    return builder.as_data_source(split), builder.info.features.get_tensor_spec()


def token_spec(spec: Mapping[str, "tf.TensorSpec"]) -> dict[str, "tf.TensorSpec"]:
    """Returns the specs of the arrays of tokens among those of `read`."""
    return {
        name: each for name, each in spec.items() if name not in TEXTS and each.dtype.is_integer
    }


def clip_shapes(directory: str) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each array of a clip in a token folder; errors as of `read_manifest`."""
    manifest = read_manifest(directory)
    if not manifest["counts"]:
        raise ValueError(f"tokens in {directory} have no complete split: finish writing them")
    spec = token_spec(read(directory, next(iter(manifest["counts"])))[1])
    return {name: tuple(each.shape) for name, each in spec.items()}


def complete(
    directory: str,
    split: str,
    models: Mapping[str, str],
    layout: Mapping[str, Any],
    data: Mapping[str, Any],
) -> bool:
    """Whether a split was written to its end, by these models and in this layout; ValueError if from other data."""
    return split in _manifest(directory, models, layout, data)["counts"]


def write_tokens(
    directory: str,
    split: str,
    examples: Iterable[Mapping[str, np.ndarray | str]],
    models: Mapping[str, str],
    layout: Mapping[str, Any],
    data: Mapping[str, Any],
    examples_per_shard: int = 256,
) -> int:
    """Writes a split's examples, and then counts it in the manifest; the number of examples.

    `data` says, as JSON, what the examples were read from. What stood there for the split is replaced; splits
    that other models or another layout wrote no longer count. A write that is cut off leaves no split. Raises
    OSError where the disk is full, and ValueError where there are no examples, one is no array of codes of the
    shape of the first, or the folder holds splits that the same models wrote from other data.
    """
    from musicrl_jax.inputs import tasks

    folder = Path(directory) / split
    if folder.exists() and not (Path(directory) / MANIFEST).is_file():
        raise ValueError(
            f"directory: {directory} is no token folder, and has a {split!r} of its own: choose another"
        )
    examples = iter(examples)
    if (first := next(examples, None)) is None:
        raise ValueError(f"split {split!r}: there are no examples to write")
    manifest = _manifest(directory, models, layout, data)
    manifest["counts"].pop(split, None)
    manifest.get("content", {}).pop(split, None)
    _write_manifest(directory, manifest)

    partial = folder.with_name(f"{split}.partial")
    for old in (folder, partial):
        shutil.rmtree(old, ignore_errors=True)
    try:
        count, content_hash = _write_shards(partial, split, first, examples, examples_per_shard)
    except Exception as error:
        if tasks.disk_is_full(error):
            shutil.rmtree(partial)
            message = "directory: no space left: free some, or choose another disk"
            raise OSError(errno.ENOSPC, message, directory) from error
        raise
    os.replace(partial, folder)
    manifest["counts"][split] = count
    manifest.setdefault("content", {})[split] = content_hash
    _write_manifest(directory, manifest)
    return count


def _write_shards(
    folder: Path, split: str, first: Mapping, rest: Iterator[Mapping], examples_per_shard: int
) -> tuple[int, str]:
    """Writes a TFDS data set with one split into a new folder; the number of examples and their hash."""
    from musicrl_jax.inputs.libraries import tensorflow_datasets as tfds

    folder.mkdir()
    shapes = {name: np.shape(value) for name, value in first.items() if name not in TEXTS}
    features = {name: tfds.features.Text() for name in TEXTS}
    for name, shape in shapes.items():
        features[name] = tfds.features.Tensor(shape=shape, dtype=np.int32, encoding="bytes")
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(
            "tokens", tfds.core.Version(SCHEMA), str(folder), module_name=__name__
        ),
        features=tfds.features.FeaturesDict(features),
    )
    writer = tfds.core.SequentialWriter(info, examples_per_shard, file_format="array_record")
    writer.initialize_splits([split])
    examples = itertools.chain([first], rest)
    checked, count, digest = _checked(examples, shapes), 0, content.ContentHash()
    # Each call writes the metadata anew, so examples are handed over by the shard.
    while shard := list(itertools.islice(checked, examples_per_shard)):
        writer.add_examples({split: shard})
        count += len(shard)
        for example in shard:
            digest.add(content.of_arrays(example))
    writer.close_all()
    return count, digest.hexdigest()


def _checked(
    examples: Iterable[Mapping[str, Any]], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[dict[str, Any]]:
    """Yields the examples with int32 tokens; ValueError for arrays that are no codes of these shapes."""
    for example in examples:
        codes = {name: np.asarray(example[name]) for name in shapes}
        for name, array in codes.items():
            if (
                not np.issubdtype(array.dtype, np.integer)
                or array.min() < 0
                or array.shape != shapes[name]
            ):
                raise ValueError(
                    f"{name} of clip {example['id']!r} must be codes of shape {shapes[name]}, from 0 up; "
                    f"it is {array.dtype} {array.shape}"
                )
        texts = {name: example[name] for name in TEXTS}
        yield {name: array.astype(np.int32) for name, array in codes.items()} | texts


def _manifest(
    directory: str, models: Mapping[str, str], layout: Mapping[str, Any], data: Mapping[str, Any]
) -> dict[str, Any]:
    """The folder's manifest if these models and this layout wrote it, or a new one; ValueError if from other data."""
    new = {
        "schema": SCHEMA,
        "models": dict(models),
        "layout": dict(layout),
        "data": dict(data),
        "counts": {},
    }
    new = json.loads(json.dumps(new))
    path = Path(directory) / MANIFEST
    if not path.exists():
        return new
    old = read_json(path, remedy="restore a copy, or remove the folder to encode again")
    if any(old.get(name) != new[name] for name in ("schema", "models", "layout")) or not old.get(
        "counts"
    ):
        return new
    old = read_json(path, MANIFEST_KIND, "restore a copy, or remove the folder to encode again")
    was, now = old["data"], new["data"]
    if changed := [name for name in was | now if was.get(name) != now.get(name)]:
        difference = "; ".join(
            changed_content(was.get(name), now.get(name))
            if name == CONTENT
            else f"{name} {was.get(name)}, not {now.get(name)}"
            for name in changed
        )
        raise ValueError(
            f"tokens in {directory} were encoded from {difference}: give another TOKENS folder"
        )
    return old


def _write_manifest(directory: str, manifest: Mapping[str, Any]) -> None:
    Path(directory).mkdir(parents=True, exist_ok=True)
    partial = Path(directory) / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(manifest, indent=2) + "\n")
    os.replace(partial, Path(directory) / MANIFEST)
