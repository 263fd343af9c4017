"""Audio clips with their captions, and people's ratings of them.

Legend: B clips, N samples, L text pieces.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from musicrl_jax.core import tables
from musicrl_jax.core.checkpoint import PATH
from musicrl_jax.core.files import json_from
from musicrl_jax.inputs.order import BatchOrder
from musicrl_jax.inputs.records import SPLITS, Records
from musicrl_jax.inputs.tokens import ClipShapes, Shapes

if TYPE_CHECKING:
    import seqio
    import tensorflow_datasets as tfds

RATING_COLUMNS = ("clip", "rater", "score")
LOWEST_SCORE, HIGHEST_SCORE = 1.0, 5.0
# float() accepts 1_0, nan and other digits too.
_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?")


@dataclasses.dataclass(frozen=True)
class Clips:
    """A mixture of prepared clip sets.

    A clip set is a TFDS folder with features `audio` (int16, fixed length), `caption`, `id` and
    optionally `attributes` (JSON). Its metadata have `sample_rate_hz`. Every set needs train
    records; other splits read the sets that have them.

    Attributes:
      datasets: rate of each set, by its folder under data_dir: {"score_clips/quickstart": 1.0,
        "audio_folder/mine": 0.3}. The newest version is read.
      data_dir: the folder of prepared sets.
      sample_rate_hz: of the model; sets of another rate are refused.
      crop_seconds: length of a random window of each clip; None takes whole clips.
      vocabulary: path of a SentencePiece model or a BERT's tokenizer.json; adds `text` to batches.
      text_length: L, pieces of a caption; longer ones are cut, shorter ones are padded with 0.
      with_captions: adds `caption` and `id` to batches, as object arrays of str. JAX does not take
        these.
    """

    datasets: Mapping[str, float]
    data_dir: str = dataclasses.field(metadata=PATH)
    sample_rate_hz: int
    crop_seconds: float | None = None
    vocabulary: str | None = dataclasses.field(default=None, metadata=PATH)
    text_length: int = 64
    with_captions: bool = False

    def batches(
        self,
        split: str,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        epochs: int | None = None,
        rows: np.ndarray | None = None,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields {'audio': f32 [B, N] in [-1, 1)}, and 'text': i32 [B, L] with a vocabulary.

        A batch is a pure function of (seed, step). Without `epochs`, batches are full and endless.
        With `epochs`, each epoch holds every clip of every set once, whatever its rate, and the
        last batch may be smaller.

        Raises FileNotFoundError or ValueError, before the first batch, if a set or the vocabulary
        is missing, a sample rate differs, a crop is longer than a clip, or a full batch is larger
        than the split.
        """
        from musicrl_jax.inputs import tasks

        batch_order = BatchOrder(batch_size, seed, start_step, epochs, rows)
        examples = f"clips of split {split!r} in {sorted(self.datasets)}"
        batch_order.check_count(self.count(split), examples, "lower it, or build a larger data set")
        length = {"audio": self.samples(), "text": self.text_length}  # checks the sets
        return tasks.batches(
            [(self._task(name), self.datasets[name]) for name in self._sets(split)],
            split,
            length,
            batch_order,
            passthrough=("caption", "id") if self.with_captions else (),
        )

    def count(self, split: str) -> int:
        """Returns the number of clips in a split, over all sets."""
        return sum(len(self.records(name)[split]) for name in self._sets(split))

    def splits(self) -> list[str]:
        """Returns the splits with clips; a small folder may have no validation or test clips."""
        filled = set().union(*(self.records(name) for name in self.datasets))
        return [split for split in SPLITS if split in filled]

    def shapes(self, batch_size: int, clip_seconds: float, tokens: ClipShapes) -> Shapes:
        """Returns the shapes of a batch; see `objectives.objective.Data`."""
        samples = round((self.crop_seconds or clip_seconds) * self.sample_rate_hz)
        shapes = {"audio": jax.ShapeDtypeStruct((batch_size, samples), np.float32)}
        if self.vocabulary is not None:
            shapes["text"] = jax.ShapeDtypeStruct((batch_size, self.text_length), np.int32)
        return shapes

    def content_hashes(self) -> dict[str, Any]:
        """Returns {set: {split: hash}}; sets without hashes are left out."""
        from musicrl_jax.inputs import tasks

        return tasks.content_hashes(self.datasets, self.data_dir)

    def licences(self) -> dict[str, str]:
        """Returns the licence of each set by its name; sets without one are left out."""
        licences = {}
        for name in self.datasets:
            if licence := self._prepared(name).info.redistribution_info.license:
                licences[name] = licence
        return licences

    def captions(self, split: str) -> list[str]:
        """Returns the caption of every clip, set after set by name."""
        return [text["caption"] for name in self._sets(split) for text in self.texts(name, split)]

    def attributes(self, split: str) -> dict[str, dict[str, Any]]:
        """Returns the known attributes of every clip by its `id`; {} for clips without any."""
        attributes = {}
        for name in self._sets(split):
            for text in self.texts(name, split):
                where = f"the attributes of clip {text['id']!r} of {sorted(self.datasets)}"
                raw = (text.get("attributes") or "{}").encode()
                attributes[text["id"]] = json_from(raw, where, dict, "build the set again")
        return attributes

    def samples(self) -> int:
        """Returns N. Raises ValueError if the sets have clips of other lengths or rates."""
        lengths = {name: self._clip_samples(name) for name in self.datasets}
        if self.crop_seconds is None:
            if len(set(lengths.values())) != 1:
                raise ValueError(
                    f"crop_seconds: clips have different lengths, {lengths} samples: set one"
                )
            return next(iter(lengths.values()))
        # A crop must fit into the clips of every set.
        crop = round(self.crop_seconds * self.sample_rate_hz)
        for name, samples in lengths.items():
            if not 0 < crop <= samples:
                raise ValueError(
                    f"crop_seconds {self.crop_seconds} must be above 0 and at most "
                    f"{samples / self.sample_rate_hz}, the length of the clips of {name!r}"
                )
        return crop

    def records(self, name: str) -> dict[str, Records]:
        """Returns the records of one set, by split."""
        from musicrl_jax.inputs import tasks

        return tasks.filled_splits(self._prepared(name))

    def texts(self, name: str, split: str) -> tuple[dict[str, str], ...]:
        """Returns id, caption and attributes of each clip of one set; see `tasks.texts`."""
        from musicrl_jax.inputs import tasks

        return tasks.texts(name, self.data_dir, split)

    # --- The sets ---

    def _prepared(self, name: str) -> "tfds.core.DatasetBuilder":
        from musicrl_jax.inputs import tasks

        return tasks.prepared(name, self.data_dir)

    def _sets(self, split: str) -> list[str]:
        """Returns the names of the sets with records in a split."""
        if not self.datasets:
            raise ValueError("datasets is empty: name at least one prepared data set and its rate")
        empty = [name for name in sorted(self.datasets) if split not in self.records(name)]
        if len(empty) == len(self.datasets) or (empty and split == "train"):
            filled = {name: sorted(self.records(name)) for name in empty}
            raise ValueError(
                f"split {split!r} has no clips in {empty}: choose another, of {filled}"
            )
        return [name for name in sorted(self.datasets) if name not in empty]

    def _clip_samples(self, name: str) -> int:
        """Returns the length of a set's clips, and checks its features and sample rate."""
        info = self._prepared(name).info
        spec = info.features.get_tensor_spec()
        # Its features.
        audio = spec.get("audio")
        is_clip = audio is not None and audio.dtype == np.int16 and audio.shape.rank == 1
        if not is_clip or audio.shape[0] is None:
            raise ValueError(
                f"datasets: {name!r} is no clip set; `audio` must be int16 of a fixed length, "
                f"not {audio}"
            )
        if missing := {"caption", "id"} - set(spec):
            raise ValueError(
                f"datasets: {name!r} is no clip set; it lacks the text features {sorted(missing)}"
            )
        # Its sample rate.
        rate = (info.metadata or {}).get("sample_rate_hz")
        if rate is None:
            raise ValueError(
                f"datasets: the metadata of {name!r} lack sample_rate_hz: add it in its builder"
            )
        if rate != self.sample_rate_hz:
            raise ValueError(
                f"sample_rate_hz {self.sample_rate_hz} is not that of {name!r}, which is {rate}: "
                f"build the data set at {self.sample_rate_hz} Hz, or choose a model of its rate"
            )
        return int(audio.shape[0])

    def _task(self, name: str) -> "seqio.Task":
        """Returns the SeqIO task of one set, registered under the set's name."""
        from musicrl_jax.inputs import tasks

        spec = self._prepared(name).info.features.get_tensor_spec()
        fields = {field: spec[field] for field in ("audio", "caption", "id")}
        features = {"audio": tasks.number_feature(np.float32)}
        steps = [tasks.crop_audio]
        if self.vocabulary is not None:
            features["text"] = tasks.number_feature(np.int32)
            steps.append(functools.partial(tasks.tokenize, vocabulary=self.vocabulary))
        source = tasks.RecordSource(self.records(name), fields)
        return tasks.register(name, source, steps, features)


# --- Ratings ---


@dataclasses.dataclass(frozen=True)
class Ratings:
    """People's ratings of clips: one example for each row of a table.

    Attributes:
      clips: the rated clips, by their `id`. A rating belongs to the split of its clip.
      ratings_csv: a table with columns clip, rater and score; scores are numbers from 1 to 5.
    """

    clips: Clips
    ratings_csv: str = dataclasses.field(metadata=PATH)

    def batches(
        self,
        split: str,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        epochs: int | None = None,
        rows: np.ndarray | None = None,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields {'audio': f32 [B, N], 'score': f32 [B] in [1, 5]}, else as `Clips.batches`.

        Also raises ValueError or FileNotFoundError if the table is missing or a row is wrong.
        """
        from musicrl_jax.inputs import tasks

        batch_order = BatchOrder(batch_size, seed, start_step, epochs, rows)
        # No ratings are an error in a single pass too.
        rated = self._rated(split)
        examples = f"ratings of split {split!r} in {self.ratings_csv}"
        if not rated:
            raise ValueError(f"batch_size {batch_size} is more than the 0 {examples}: add some")
        batch_order.check_count(len(rated), examples, "lower it, or add ratings")
        spec = {"audio": tasks.spec([None], np.int16), "score": tasks.spec([], np.float32)}
        # The features after cropping, which converts audio to float32.
        features = {
            "audio": tasks.number_feature(np.float32),
            "score": tasks.number_feature(np.float32, rank=0),
        }
        source = tasks.RecordSource({split: rated}, spec)
        task = tasks.register("ratings", source, [tasks.crop_audio], features)
        return tasks.batches([(task, 1.0)], split, {"audio": self.clips.samples()}, batch_order)

    def count(self, split: str) -> int:
        """Returns the number of ratings of a split's clips."""
        return len(self._rated(split))

    def shapes(self, batch_size: int, clip_seconds: float, tokens: ClipShapes) -> Shapes:
        """Returns the shapes of a batch; see `objectives.objective.Data`."""
        audio = self.clips.shapes(batch_size, clip_seconds, tokens)["audio"]
        return {"audio": audio, "score": jax.ShapeDtypeStruct((batch_size,), np.float32)}

    def splits(self) -> list[str]:
        """Returns the splits with rated clips."""
        return [split for split in self.clips.splits() if self.count(split)]

    def _rated(self, split: str) -> "_RatedClips":
        places = self._places()
        sets = {name: self.clips.records(name) for name in self.clips.datasets}
        rated = _RatedClips()
        for rating in _read_ratings(self.ratings_csv):
            if rating.clip not in places:
                message = f"no clip {rating.clip!r} in {sorted(self.clips.datasets)}"
                raise rating.row.error("clip", message)
            name, clip_split, index = places[rating.clip]
            if clip_split == split:
                rated.append((sets[name][split], index, rating.score))
        return rated

    def _places(self) -> dict[str, tuple[str, str, int]]:
        """Returns (set, split, number) of every clip, by id."""
        places = {}
        for name in self.clips.datasets:
            for split in self.clips.records(name):
                for index, text in enumerate(self.clips.texts(name, split)):
                    if text["id"] in places:
                        raise ValueError(
                            f"clips: two clips have the id {text['id']!r}, so a rating of it is "
                            "ambiguous: build the sets again with other ids"
                        )
                    places[text["id"]] = (name, split, index)
        return places


class _RatedClips(list):
    """Ratings (records of the clip's set and split, number of the clip, score) as records."""

    def __getitems__(self, indices: list[int]) -> list[Mapping[str, Any]]:
        rated = []
        for i in indices:
            records, index, score = self[i]
            rated.append({"audio": records[index]["audio"], "score": np.float32(score)})
        return rated


class Rating(NamedTuple):
    """One row of a table of ratings, with its clip and score."""

    row: tables.Row
    clip: str
    score: float


def _read_ratings(path: str) -> list[Rating]:
    """Returns every row of the table.

    Raises FileNotFoundError without a table, and ValueError with line and column for a wrong row.
    """
    if Path(path).suffix.lower() != ".csv" or not Path(path).exists():
        kind = ValueError if Path(path).exists() else FileNotFoundError
        columns = ", ".join(RATING_COLUMNS)
        raise kind(f"ratings_csv: {path!r} is no .csv file: give one with the columns {columns}")
    ratings = []
    for row in tables.read_rows(path, dict.fromkeys(RATING_COLUMNS, str)):
        text = row.values["score"].strip()
        score = float(text) if _NUMBER.fullmatch(text) else math.nan
        if not LOWEST_SCORE <= score <= HIGHEST_SCORE:
            remedy = "; write a point, not a comma" if "," in text else ""
            raise row.error("score", f"{row.values['score']!r} is no number from 1 to 5{remedy}")
        ratings.append(Rating(row, row.values["clip"], score))
    return ratings
