"""Token data: clips that the frozen models encoded once, on disk for the models that train on them.

A token folder holds one TFDS data set for each split (`train/`, in ArrayRecord shards) and
`manifest.json`: the hashes of the models that wrote the tokens, their layout, the data that was
read, and the number and the content hash of the examples of every complete split. A split that the
manifest does not count does not exist.

An example is a clip's `id` and `caption` and the system's token arrays, each of one shape in a
split. A MusicLM has `semantic` i32 [F], `acoustic` i32 [T, Q] and `mulan` i32 [M].

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
from musicrl_jax.core.files import read_json, write_text
from musicrl_jax.core.identity import CONTENT, changed_content
from musicrl_jax.inputs import content
from musicrl_jax.inputs.order import BatchOrder
from musicrl_jax.inputs.records import Records

if TYPE_CHECKING:
    import tensorflow as tf

# Version of examples and manifest; a change of either needs a new one.
SCHEMA = "1.1.0"
MANIFEST = "manifest.json"
# A file beside the manifest, if the clips were voted on.
VOTES = "votes.jsonl"
# Types of the manifest's fields; "?" marks one that may be missing.
MANIFEST_KIND = {
    "schema": str,
    "models": {str: str},
    "layout": dict,
    "data": dict,
    "counts": {str: int},
    "content?": {str: str},
}
# Fields of an example beside its tokens.
TEXTS = ("id", "caption")
# Name of an array -> its shape and dtype.
Shapes = dict[str, jax.ShapeDtypeStruct]
# Token folder -> name of an array -> its shape in one clip.
ClipShapes = Callable[[str], Mapping[str, tuple[int, ...]]]

# --- Reading ---


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens that `musicrl encode` wrote.

    Attributes:
      directory: the token folder.
      models: hash of each model of this run, by name ('mulan', 'semantic', 'codec'). Tokens of
        other models are refused. None accepts all.
    """

    directory: str = dataclasses.field(metadata=PATH)
    models: Mapping[str, str] | None = None
    verb: ClassVar[str] = "encode"  # writes such a folder
    examples: ClassVar[str] = "examples"  # what a split holds
    # For an error: what to do about a batch_size above the count.
    remedy: ClassVar[str] = "lower it, or encode more clips"

    def batches(
        self,
        split: str,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        epochs: int | None = None,
        rows: np.ndarray | None = None,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields the token arrays, i32 [B, ...] by name.

        A batch is a pure function of (seed, step). Without `epochs`, batches are full and endless.
        With `epochs`, the last batch may be smaller.

        Raises FileNotFoundError or ValueError, before the first batch, if tokens are missing or
        other models wrote them.
        """
        from musicrl_jax.inputs import tasks

        batch_order = BatchOrder(batch_size, seed, start_step, epochs, rows)
        records, spec = self._records(split)
        examples = f"{self.examples} of split {split!r} in {self.directory}"
        batch_order.check_count(len(records), examples, self.remedy)
        return tasks.record_batches(self.examples, split, records, spec, batch_order)

    def _records(self, split: str) -> tuple[Records, dict[str, "tf.TensorSpec"]]:
        self.count(split)  # checks the models
        records, spec = read(self.directory, split)
        return records, token_spec(spec)

    def layout(self) -> dict[str, int]:
        """Returns levels and codes of the models that wrote the tokens.

        The keys are 'acoustic_levels', 'acoustic_codes', 'semantic_codes', ...
        """
        return read_manifest(self.directory, self.verb)["layout"]

    def shapes(self, batch_size: int, clip_seconds: float, tokens: ClipShapes) -> Shapes:
        """Returns the shapes of a batch; see `objectives.objective.Data`."""
        return {
            name: jax.ShapeDtypeStruct((batch_size, *shape), np.int32)
            for name, shape in tokens(self.directory).items()
        }

    def splits(self) -> list[str]:
        """Returns the complete splits."""
        return list(read_manifest(self.directory, self.verb)["counts"])

    def content_hashes(self) -> dict[str, Any]:
        """Returns {'tokens': {split: hash}}; {} without tokens, or with tokens without hashes."""
        if not (Path(self.directory) / MANIFEST).is_file():
            return {}
        hashes = read_manifest(self.directory).get("content")
        return {"tokens": hashes} if hashes else {}

    def count(self, split: str) -> int:
        """Returns the number of examples in a split; raises ValueError for other models' tokens."""
        manifest = read_manifest(self.directory, self.verb)
        for name, expected in (self.models or {}).items():
            if (writer := manifest["models"].get(name)) != expected:
                raise ValueError(
                    f"tokens in {self.directory} were written by {name} {writer}, and this run "
                    f"uses {name} {expected}: run `musicrl {self.verb}` again with the models of "
                    "this run"
                )
        if split not in manifest["counts"]:
            raise ValueError(
                f"split {split!r} is not among {sorted(manifest['counts'])} in {self.directory}: "
                f"`musicrl {self.verb}` did not finish it"
            )
        return manifest["counts"][split]


def read_manifest(directory: str, verb: str = "encode") -> dict[str, Any]:
    """Returns the manifest of a token folder.

    It is {'schema', 'models': {name: hash}, 'layout': {}, 'data': {}, 'counts': {split: n},
    'content': {split: hash}}. Splits from a version without hashes are not in 'content'.

    Raises FileNotFoundError or ValueError, which name the verb that writes such a folder: `verb`,
    or 'collect' if it holds votes.
    """
    path = Path(directory) / MANIFEST
    if (Path(directory) / VOTES).exists():
        verb = "collect"
    if not path.exists():
        message = f"directory: no tokens at {directory}; write them with `musicrl encode`"
        if verb == "collect":
            message = (
                f"directory: no tokens at {directory} for the votes on them; `musicrl collect` "
                f"writes both, and votes of people need the {MANIFEST} and the splits of the "
                "folder whose clips they heard"
            )
        raise FileNotFoundError(message)
    # The schema first: other versions have other fields.
    remedy = f"restore a copy, or run `musicrl {verb}` again"
    if (schema := read_json(path, {"schema": str}, remedy)["schema"]) != SCHEMA:
        raise ValueError(
            f"tokens in {directory} have schema {schema}, not {SCHEMA}: run `musicrl {verb}` again"
        )
    return read_json(path, MANIFEST_KIND, remedy)


def read(directory: str, split: str) -> tuple[Records, dict[str, "tf.TensorSpec"]]:
    """Returns the examples of a split in the order of writing, and the spec of each feature.

    The features include `id` and `caption`.
    """
    from musicrl_jax.inputs import tasks

    builder = tasks.open_builder(str(Path(directory) / split), "run the verb that wrote it again")
    return builder.as_data_source(split), builder.info.features.get_tensor_spec()


def token_spec(spec: Mapping[str, "tf.TensorSpec"]) -> dict[str, "tf.TensorSpec"]:
    """Returns the specs of the token arrays among those of `read`."""
    return {
        name: each for name, each in spec.items() if name not in TEXTS and each.dtype.is_integer
    }


def clip_shapes(directory: str) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each array of a clip in a token folder; raises as `read_manifest`."""
    splits = list(read_manifest(directory)["counts"])
    if not splits:
        raise ValueError(f"tokens in {directory} have no complete split: finish writing them")
    spec = token_spec(read(directory, splits[0])[1])
    return {name: tuple(each.shape) for name, each in spec.items()}


# --- Writing ---


def complete(
    directory: str,
    split: str,
    models: Mapping[str, str],
    layout: Mapping[str, Any],
    data: Mapping[str, Any],
) -> bool:
    """Returns whether these models wrote a whole split in this layout.

    Raises ValueError if it was encoded from other data.
    """
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
    """Writes the examples of a split, then counts it in the manifest.

    An older split of this name is replaced. Splits of other models or of another layout no longer
    count. An interrupted write leaves no split.

    Args:
      directory: the token folder.
      split: name of the split.
      examples: `id`, `caption` and token arrays of each clip.
      models: hash of each model that wrote the tokens, by name.
      layout: of the tokens.
      data: what the examples were read from, as JSON.
      examples_per_shard: of the ArrayRecord files.

    Returns:
      The number of examples.

    Raises:
      OSError: if the disk is full.
      ValueError: if there are no examples, an example has no codes of the first one's shape, or the
        folder holds splits that the same models wrote from other data.
    """
    from musicrl_jax.inputs import tasks

    # Checks, before anything changes.
    folder = Path(directory) / split
    if folder.exists() and not (Path(directory) / MANIFEST).is_file():
        raise ValueError(
            f"directory: {directory} is no token folder, and has a {split!r} of its own: "
            "choose another"
        )
    examples = iter(examples)
    if (first := next(examples, None)) is None:
        raise ValueError(f"split {split!r}: there are no examples to write")

    # The manifest no longer counts the split until it is complete.
    manifest = _manifest(directory, models, layout, data)
    manifest["counts"].pop(split, None)
    manifest.get("content", {}).pop(split, None)
    _write_manifest(directory, manifest)

    # The examples.
    partial = folder.with_name(f"{split}.partial")
    for old in (folder, partial):
        shutil.rmtree(old, ignore_errors=True)
    examples = itertools.chain([first], examples)
    try:
        count, content_hash = _write_shards(partial, split, examples, examples_per_shard)
    except Exception as error:
        if tasks.disk_is_full(error):
            shutil.rmtree(partial)
            message = "directory: no space left: free some, or choose another disk"
            raise OSError(errno.ENOSPC, message, directory) from error
        raise
    # The split is complete.
    os.replace(partial, folder)
    manifest["counts"][split] = count
    manifest.setdefault("content", {})[split] = content_hash
    _write_manifest(directory, manifest)
    return count


def _write_shards(
    folder: Path, split: str, examples: Iterator[Mapping], examples_per_shard: int
) -> tuple[int, str]:
    """Writes a TFDS data set with one split into a new folder and returns its count and hash."""
    from musicrl_jax.inputs.libraries import tensorflow_datasets as tfds

    # The features are those of the first example.
    first = next(examples)
    shapes = {name: np.shape(value) for name, value in first.items() if name not in TEXTS}
    features = {name: tfds.features.Text() for name in TEXTS}
    for name, shape in shapes.items():
        features[name] = tfds.features.Tensor(shape=shape, dtype=np.int32, encoding="bytes")
    version = tfds.core.Version(SCHEMA)
    identity = tfds.core.DatasetIdentity("tokens", version, str(folder), module_name=__name__)
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))

    # TFDS writes the metadata anew at each call, so a call gets a whole shard.
    folder.mkdir()
    writer = tfds.core.SequentialWriter(info, examples_per_shard, file_format="array_record")
    writer.initialize_splits([split])
    checked = _checked(itertools.chain([first], examples), shapes)
    count, digest = 0, content.ContentHash()
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
    """Yields the examples with int32 tokens. Raises ValueError for arrays that are not codes."""
    for example in examples:
        codes = {}
        for name, shape in shapes.items():
            array = np.asarray(example[name])
            is_code = np.issubdtype(array.dtype, np.integer) and array.min() >= 0
            if not is_code or array.shape != shape:
                raise ValueError(
                    f"{name} of clip {example['id']!r} must be codes of shape {shape}, from 0 up; "
                    f"it is {array.dtype} {array.shape}"
                )
            codes[name] = array.astype(np.int32)
        yield codes | {name: example[name] for name in TEXTS}


def _manifest(
    directory: str, models: Mapping[str, str], layout: Mapping[str, Any], data: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the folder's manifest if these models wrote it in this layout, else a new one.

    Raises ValueError if they wrote it from other data.
    """
    parts = {"models": dict(models), "layout": dict(layout), "data": dict(data)}
    new = json.loads(json.dumps({"schema": SCHEMA, **parts, "counts": {}}))  # with JSON's types
    path = Path(directory) / MANIFEST
    if not path.exists():
        return new

    # Tokens of other models are written anew, whatever else their manifest says.
    remedy = "restore a copy, or remove the folder to encode again"
    old = read_json(path, remedy=remedy)
    is_same = all(old.get(name) == new[name] for name in ("schema", "models", "layout"))
    if not is_same or not old.get("counts"):
        return new
    old = read_json(path, MANIFEST_KIND, remedy)
    changes = []
    for name in old["data"] | new["data"]:
        before, now = old["data"].get(name), new["data"].get(name)
        if before != now:
            is_content = name == CONTENT
            changes.append(
                changed_content(before, now) if is_content else f"{name} {before}, not {now}"
            )
    if changes:
        raise ValueError(
            f"tokens in {directory} were encoded from {'; '.join(changes)}: "
            "give another TOKENS folder"
        )
    return old


def _write_manifest(directory: str, manifest: Mapping[str, Any]) -> None:
    write_text(Path(directory) / MANIFEST, json.dumps(manifest, indent=2) + "\n")
