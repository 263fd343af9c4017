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
from musicrl_jax.inputs.records import SPLITS, Records
from musicrl_jax.inputs.tokens import ClipShapes, Shapes

if TYPE_CHECKING:
    import seqio

RATING_COLUMNS = ("clip", "rater", "score")
LOWEST_SCORE, HIGHEST_SCORE = 1.0, 5.0
_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?")  # float() takes 1_0, nan and other digits too


@dataclasses.dataclass(frozen=True)
class Clips:
    """A mixture of prepared clip sets.

    A clip set is a TFDS folder with features `audio` (int16, fixed length), `caption`, `id` and, if it has
    them, `attributes` (JSON), whose metadata say `sample_rate_hz`. Train needs records in every set; other
    splits read the sets that have them.

    Attributes:
      datasets: rate of each set, by its folder under data_dir: {"score_clips/quickstart": 1.0,
        "audio_folder/mine": 0.3}. The newest version is read.
      data_dir: where prepared sets lie.
      sample_rate_hz: what the model expects; a set of another rate is refused.
      crop_seconds: length of a random window of each clip; None takes whole clips.
      vocabulary: path of a SentencePiece model or a BERT's tokenizer.json; given, batches hold `text`.
      text_length: L, pieces of a caption; longer ones are cut, shorter ones are filled with 0.
      with_captions: batches hold `caption` and `id` too, as object arrays of str, which JAX does not take.
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
        """{'audio': f32 [B, N] in [-1, 1)} and, with a vocabulary, {'text': i32 [B, L]}, in a fixed order.

        A batch is a pure function of (seed, step). Endless, every batch full, where `epochs` is None. With
        `epochs`, each epoch holds every clip of every set once, whatever its rate, and the last batch may
        be smaller: nothing is dropped, and a caller that wants one shape pads it.

        Raises FileNotFoundError or ValueError, before the first batch, where a set or the vocabulary is
        missing, the sample rate is another, a crop is longer than a clip, or batch_size is more than the
        split of endless data has.
        """
        from musicrl_jax.inputs import tasks

        if epochs is None and batch_size > self.count(split):
            raise ValueError(
                f"batch_size {batch_size} is more than the {self.count(split)} clips of split {split!r} in "
                f"{sorted(self.datasets)}: lower it, or build a larger data set"
            )
        length = {"audio": self.samples(), "text": self.text_length}
        return tasks.batches(
            [(self._task(name), self.datasets[name]) for name in self._sets(split)],
            split,
            length,
            batch_size,
            seed,
            start_step,
            epochs,
            rows,
            passthrough=("caption", "id") if self.with_captions else (),
        )

    def count(self, split: str) -> int:
        """The number of clips in a split, over all sets."""
        return sum(len(self.records(name)[split]) for name in self._sets(split))

    def splits(self) -> list[str]:
        """The splits that have clips: a small folder of recordings may have no validation or test."""
        return [
            split for split in SPLITS if any(split in self.records(name) for name in self.datasets)
        ]

    def shapes(self, batch_size: int, clip_seconds: float, tokens: ClipShapes) -> Shapes:
        """Returns the shapes of a batch; see `objectives.objective.Data`."""
        samples = round((self.crop_seconds or clip_seconds) * self.sample_rate_hz)
        shapes = {"audio": jax.ShapeDtypeStruct((batch_size, samples), np.float32)}
        if self.vocabulary is not None:
            shapes["text"] = jax.ShapeDtypeStruct((batch_size, self.text_length), np.int32)
        return shapes

    def content_hashes(self) -> dict[str, Any]:
        """Returns {set: {split: hash}}; sets without hashes are left out. See `tasks.content_hashes`."""
        from musicrl_jax.inputs import tasks

        return tasks.content_hashes(self.datasets, self.data_dir)

    def licences(self) -> dict[str, str]:
        """Returns what each set says of its licence, by its name; sets that say nothing are left out."""
        from musicrl_jax.inputs import tasks

        said = {
            name: tasks.prepared(name, self.data_dir).info.redistribution_info.license
            for name in self.datasets
        }
        return {name: licence for name, licence in said.items() if licence}

    def captions(self, split: str) -> list[str]:
        """The caption of every clip, set after set by name."""
        return [text["caption"] for text in self._texts(split)]

    def attributes(self, split: str) -> dict[str, dict[str, Any]]:
        """What is known to be true of every clip, by its `id`; {} where a set does not say."""
        known = {}
        for text in self._texts(split):
            where = f"the attributes of clip {text['id']!r} of {sorted(self.datasets)}"
            known[text["id"]] = json_from(
                (text.get("attributes") or "{}").encode(), where, dict, "build the set again"
            )
        return known

    def samples(self) -> int:
        """N, the samples of a clip in a batch; ValueError where the sets do not allow it."""
        lengths = {name: self._clip_samples(name) for name in self.datasets}
        if self.crop_seconds is None:
            if len(set(lengths.values())) != 1:
                raise ValueError(
                    f"crop_seconds: clips have different lengths, {lengths} samples: set one"
                )
            return next(iter(lengths.values()))
        crop = round(self.crop_seconds * self.sample_rate_hz)
        for name, samples in lengths.items():
            if not 0 < crop <= samples:
                raise ValueError(
                    f"crop_seconds {self.crop_seconds} must be above 0 and at most {samples / self.sample_rate_hz}, "
                    f"the length of the clips of {name!r}"
                )
        return crop

    def records(self, name: str) -> dict[str, Records]:
        """The records of one set, by split."""
        from musicrl_jax.inputs import tasks

        return tasks.filled_splits(tasks.prepared(name, self.data_dir))

    def _sets(self, split: str) -> list[str]:
        """The sets that have records in a split, by name."""
        if not self.datasets:
            raise ValueError("datasets is empty: name at least one prepared data set and its rate")
        empty = [name for name in sorted(self.datasets) if split not in self.records(name)]
        if len(empty) == len(self.datasets) or (empty and split == "train"):
            known = {name: sorted(self.records(name)) for name in empty}
            raise ValueError(
                f"split {split!r} has no clips in {empty}; the splits that have: {known}"
            )
        return [name for name in sorted(self.datasets) if name not in empty]

    def _clip_samples(self, name: str) -> int:
        """The length of a set's clips, after a check that it is a clip set of the right rate."""
        from musicrl_jax.inputs import tasks

        info = tasks.prepared(name, self.data_dir).info
        spec = info.features.get_tensor_spec()
        audio = spec.get("audio")
        if (
            audio is None
            or audio.dtype != np.int16
            or audio.shape.rank != 1
            or audio.shape[0] is None
        ):
            raise ValueError(
                f"datasets: {name!r} is no clip set; `audio` must be int16 of a fixed length, not {audio}"
            )
        if missing := {"caption", "id"} - set(spec):
            raise ValueError(
                f"datasets: {name!r} is no clip set; it lacks the text features {sorted(missing)}"
            )
        rate = (info.metadata or {}).get("sample_rate_hz")
        if rate is None:
            raise ValueError(
                f"datasets: the metadata of {name!r} do not say its sample_rate_hz: its builder must"
            )
        if rate != self.sample_rate_hz:
            raise ValueError(
                f"sample_rate_hz {self.sample_rate_hz} is not that of {name!r}, which is {rate}: "
                f"build the data set at {self.sample_rate_hz} Hz, or choose a model of its rate"
            )
        return int(audio.shape[0])

    def _task(self, name: str) -> "seqio.Task":
        """The SeqIO task of one set, registered under the set's name."""
        from musicrl_jax.inputs import tasks

        spec = tasks.prepared(name, self.data_dir).info.features.get_tensor_spec()
        source = tasks.RecordSource(
            self.records(name), {field: spec[field] for field in ("audio", "caption", "id")}
        )
        features = {"audio": tasks.number_feature(np.float32, rank=1)}
        steps = [tasks.crop_audio]
        if self.vocabulary is not None:
            features["text"] = tasks.text_feature()
            steps.append(functools.partial(tasks.tokenize, vocabulary=self.vocabulary))
        return tasks.register(name, source, steps, features)

    def _texts(self, split: str) -> list[dict[str, str]]:
        from musicrl_jax.inputs import tasks

        return [
            text for name in self._sets(split) for text in tasks.texts(name, self.data_dir, split)
        ]


@dataclasses.dataclass(frozen=True)
class Ratings:
    """People's ratings of clips: one example for each row of a table.

    Attributes:
      clips: the clips that were rated, by their `id`; a rating belongs to its clip's split.
      ratings_csv: a table with columns clip, rater and score, the score a number from 1 to 5.
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
        """{'audio': f32 [B, N], 'score': f32 [B] in [1, 5]}.

        Otherwise as `Clips.batches`; ValueError or FileNotFoundError too where the table is missing or a row is wrong.
        """
        from musicrl_jax.inputs import tasks

        if not (count := self.count(split)) or (epochs is None and batch_size > count):
            raise ValueError(
                f"batch_size {batch_size} is more than the {count} ratings of split {split!r} in {self.ratings_csv}"
            )
        spec = {"audio": tasks.spec([None], np.int16), "score": tasks.spec([], np.float32)}
        features = {
            "audio": tasks.number_feature(np.float32, rank=1),
            "score": tasks.number_feature(np.float32, rank=0),
        }
        source = tasks.RecordSource({split: self._rated(split)}, spec)
        task = tasks.register("ratings", source, [tasks.crop_audio], features)
        length = {"audio": self.clips.samples()}
        return tasks.batches(
            [(task, 1.0)], split, length, batch_size, seed, start_step, epochs, rows
        )

    def count(self, split: str) -> int:
        """The number of ratings of a split's clips."""
        return len(self._rated(split))

    def shapes(self, batch_size: int, clip_seconds: float, tokens: ClipShapes) -> Shapes:
        """Returns the shapes of a batch; see `objectives.objective.Data`."""
        audio = self.clips.shapes(batch_size, clip_seconds, tokens)["audio"]
        return {"audio": audio, "score": jax.ShapeDtypeStruct((batch_size,), np.float32)}

    def splits(self) -> list[str]:
        """The splits that have rated clips."""
        return [split for split in self.clips.splits() if self.count(split)]

    def _rated(self, split: str) -> "_RatedClips":
        places = self._places()
        sets = {name: self.clips.records(name) for name in self.clips.datasets}
        rated = _RatedClips()
        for rating in _read_ratings(self.ratings_csv):
            if rating.clip not in places:
                raise rating.row.error(
                    "clip", f"no clip {rating.clip!r} in {sorted(self.clips.datasets)}"
                )
            name, clip_split, index = places[rating.clip]
            if clip_split == split:
                rated.append((sets[name][split], index, rating.score))
        return rated

    def _places(self) -> dict[str, tuple[str, str, int]]:
        """(set, split, number) of every clip, by id."""
        from musicrl_jax.inputs import tasks

        places = {}
        for name in self.clips.datasets:
            for split in self.clips.records(name):
                for index, text in enumerate(tasks.texts(name, self.clips.data_dir, split)):
                    if text["id"] in places:
                        raise ValueError(
                            f"clips: the id {text['id']!r} is that of two clips, so a rating of it is unclear"
                        )
                    places[text["id"]] = (name, split, index)
        return places


class _RatedClips(list):
    """Ratings (records of the clip's set and split, number of the clip, score) as records."""

    def __getitems__(self, indices: list[int]) -> list[Mapping[str, Any]]:
        chosen = [self[i] for i in indices]
        return [
            {"audio": records[index]["audio"], "score": np.float32(score)}
            for records, index, score in chosen
        ]


class Rating(NamedTuple):
    """One row of a table of ratings, and the clip and score that it states."""

    row: tables.Row
    clip: str
    score: float


def _read_ratings(path: str) -> list[Rating]:
    """Reads every row.

    Raises FileNotFoundError where there is no table, and ValueError with line and column where a row is wrong.
    """
    if Path(path).suffix.lower() != ".csv" or not Path(path).exists():
        kind = ValueError if Path(path).exists() else FileNotFoundError
        raise kind(
            f"ratings_csv: {path!r} is no .csv file: give one with {', '.join(RATING_COLUMNS)}"
        )
    ratings = []
    for row in tables.read_rows(path, dict.fromkeys(RATING_COLUMNS, str)):
        text = row.values["score"].strip()
        score = float(text) if _NUMBER.fullmatch(text) else math.nan
        if not LOWEST_SCORE <= score <= HIGHEST_SCORE:
            remedy = "; write a point, not a comma" if "," in text else ""
            raise row.error("score", f"{row.values['score']!r} is no number from 1 to 5{remedy}")
        ratings.append(Rating(row, row.values["clip"], score))
    return ratings
