"""TFDS builder of rendered scores with captions that are true of their notes.

Read `Builder._split_generators` first. N is the number of samples of a clip.
"""

import dataclasses
import errno
import itertools
import json
import os
import shutil
from collections.abc import Iterator

import joblib
import tensorflow_datasets as tfds

from musicrl_jax.core.progress import Progress
from musicrl_jax.inputs import pipelines

from ..records import ClipConfig, RepeatableBuilder
from . import chunks, scores
from .instruments import FEW, INSTRUMENTS

# Written into data sets and models. Its words are fixed: built sets hold them.
LICENCE = (
    "Clips contain samples of the soundfont TimGM6mb by Tim Brechbill, which stands under GPL-2; "
    "the scores are encodings of music in the public domain, from music21's corpus."
)
SPLITS = ("train", "validation", "test")
_CHUNK = 8  # clips or pieces of one job. An interrupted build repeats at most the jobs in progress.
_WAVE = 64  # pieces to parse before checking whether more are needed


@dataclasses.dataclass(eq=False, kw_only=True)
class ScoreClipsConfig(ClipConfig):
    """How much music, from how many scores. Only `name` and the clip counts have no default."""

    train: int
    """Number of clips of the split, at least one in each split."""
    validation: int
    test: int
    clip_seconds: float = 4.0
    pieces: int = 200
    """Number of distinct scores: 80 % train, 10 % validation, 10 % test, at least one each."""
    collections: tuple[str, ...] = (*scores.TUNE_BOOKS, "bach")
    """Folders of music21's corpus, from scores.COLLECTIONS."""
    instruments: tuple[str, ...] = FEW
    """Names from instruments.INSTRUMENTS."""
    seed: int = 0

    def __post_init__(self):
        where = f"score_clips/{self.name}"
        self.check_positive("score_clips", *SPLITS, "clip_seconds", "sample_rate_hz", "pieces")
        choices = {"collections": scores.COLLECTIONS, "instruments": tuple(INSTRUMENTS)}
        for field, names in choices.items():
            unknown = sorted(set(getattr(self, field)) - set(names))
            if unknown or not getattr(self, field):
                raise ValueError(
                    f"{where}: {field} has {unknown or 'nothing'}: choose from {names}"
                )
        if not any(INSTRUMENTS[name].chords for name in self.instruments):
            raise ValueError(
                f"{where}: instruments are {self.instruments}: add one that plays chords"
            )


class Builder(RepeatableBuilder):
    """Builds clips: `audio` (int16 [N]), `caption`, `id`, `attributes` (JSON) and `notes` (JSON).

    `notes` are rows [onset s, duration s, MIDI pitch, part], without the drums. The examples depend
    on the config alone, not on the number of cores. Build with file_format="array_record" for
    random access.
    """

    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES = {  # noqa: RUF012
        "1.0.0": "First.",
        "1.1.0": "A note that starts while its pitch sounds in the same part no longer ends with "
        "the earlier one.",
    }
    BUILDER_CONFIGS = [  # noqa: RUF012
        ScoreClipsConfig(
            name="tiny",
            train=8,
            validation=8,
            test=16,
            clip_seconds=1.0,
            pieces=4,
            collections=("ryansMammoth",),
            description="32 clips of 1 s, for tests.",
        ),
        ScoreClipsConfig(
            name="quickstart",
            train=640,
            validation=64,
            test=96,
            description="53 minutes in clips of 4 s, built in less than a minute.",
        ),
        ScoreClipsConfig(
            name="small",
            train=480,
            validation=64,
            test=128,
            clip_seconds=5.0,
            pieces=300,
            collections=scores.COLLECTIONS,
            instruments=tuple(INSTRUMENTS),
            description="56 minutes in clips of 5 s, of all that demo has, built in less than a "
            "minute.",
        ),
        ScoreClipsConfig(
            name="demo",
            train=6000,
            validation=300,
            test=300,
            clip_seconds=5.0,
            pieces=2000,
            collections=scores.COLLECTIONS,
            instruments=tuple(INSTRUMENTS),
            description="9 hours in clips of 5 s.",
        ),
        ScoreClipsConfig(
            name="hours50",
            train=17000,
            validation=500,
            test=500,
            clip_seconds=10.0,
            pieces=3500,
            collections=scores.COLLECTIONS,
            instruments=tuple(INSTRUMENTS),
            description="50 hours in clips of 10 s.",
        ),
    ]

    # --- TFDS's interface ---

    def download_and_prepare(self, **options) -> None:
        """Builds the data set if it does not exist. Takes TFDS's options.

        Caches parsed pieces and rendered clips beside the data set until it is complete, so that an
        interrupted build resumes. Raises OSError if the disk is too small, and ValueError if a data
        set of this name was built from another config.
        """
        cache = os.path.join(os.path.dirname(self.data_dir), "cache")
        if not self.data_path.exists():
            clips = sum(getattr(self.builder_config, split) for split in SPLITS)
            clip_bytes = 2 * self.builder_config.samples
            # Twice: the cache and the data set both hold the clips.
            _check_space(self.data_path, 2 * clips * clip_bytes)
        # joblib notices no change in functions that a cached function calls: one cache a version.
        self._memory = joblib.Memory(os.path.join(cache, str(self.version)), verbose=0)
        tfds.disable_progress_bar()  # TFDS's bars show no totals and fill logs; Progress shows both
        super().download_and_prepare(**options)
        shutil.rmtree(cache, ignore_errors=True)
        built = json.loads((self.data_path / "metadata.json").read_text())
        if built != _as_json(self.builder_config):
            raise ValueError(
                f"{self.data_path} was built from another config, {built}: give yours another name "
                f"than {self.builder_config.name!r}, or delete that folder"
            )

    def _info(self) -> tfds.core.DatasetInfo:
        return self.clip_info(
            *("caption", "id", "attributes", "notes"),
            metadata=_as_json(self.builder_config),
            license=LICENCE,
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # music21 includes the scores: there is nothing to download
        pieces = self._pieces()
        return {split: self._generate_examples(split, pieces[split]) for split in SPLITS}

    def _generate_examples(self, split: str, pieces: list[scores.Piece]):
        """Returns a split's examples: a transform of Beam, or a generator."""
        config = self.builder_config
        settings = (
            *(split, config.seed, config.clip_seconds, config.sample_rate_hz),
            config.instruments,
        )
        # Clips take the pieces of the split in turn.
        total = getattr(config, split)
        if not self.uses_beam:
            jobs = [(index, pieces[index % len(pieces)]) for index in range(total)]
            return self._generated(jobs, settings)
        from apache_beam import FlatMap

        path = self.beam_folder / f"{split}.jsonl"
        pipelines.write_items(path, _items(pieces, total))
        return pipelines.read_items(path) | "Render" >> FlatMap(chunks.examples, *settings)

    def _generated(
        self, jobs: list[tuple[int, scores.Piece]], settings: tuple
    ) -> Iterator[tuple[str, dict]]:
        """Yields a split's examples, rendered by processes of this machine."""
        clips = self._in_parallel(chunks.rendered, jobs, *settings)
        label = f"score_clips/{self.builder_config.name} {settings[0]} clips"
        for result in Progress(clips, label, len(jobs)):
            yield chunks.example(*result)

    # --- pieces and parallel work ---

    def _pieces(self) -> dict[str, list[scores.Piece]]:
        """Returns the pieces of each split."""
        config = self.builder_config
        quotas = scores.quotas(config.pieces)
        candidates = scores.candidates(config.collections, config.seed)
        pieces = {split: [] for split in SPLITS}
        label = f"score_clips/{config.name} scores"
        for split, piece in Progress(
            self._choose(candidates, dict(quotas)), label, sum(quotas.values())
        ):
            pieces[split].append(piece)
        if empty := [split for split in SPLITS if not pieces[split]]:
            raise ValueError(
                f"score_clips/{config.name}: collections {config.collections} hold no piece for "
                f"{empty}: add a collection"
            )
        return pieces

    def _choose(
        self, names: list[str], missing: dict[str, int]
    ) -> Iterator[tuple[str, scores.Piece]]:
        """Yields (split, piece) until no split misses pieces. Counts `missing` down.

        Takes pieces in order of `names`. Skips a piece that opens like an earlier one.
        """
        openings = set()
        while names and any(missing.values()):
            wave, names = names[:_WAVE], names[_WAVE:]
            for piece in self._in_parallel(chunks.parsed, wave):
                opening = piece and scores.opening(piece)
                if piece is None or opening in openings:
                    continue
                openings.add(opening)
                split = scores.split_of(opening)
                if missing[split]:
                    missing[split] -= 1
                    yield split, piece

    def _in_parallel(self, function, items: list, *arguments) -> Iterator:
        """Yields from function(chunk, *arguments) over chunks of items in order, cached on disk."""
        chunked = [items[at : at + _CHUNK] for at in range(0, len(items), _CHUNK)]
        parallel = joblib.Parallel(n_jobs=joblib.cpu_count(), return_as="generator")
        cached = self._memory.cache(function)
        return itertools.chain.from_iterable(
            parallel(joblib.delayed(cached)(chunk, *arguments) for chunk in chunked)
        )


def _items(pieces: list[scores.Piece], total: int) -> Iterator[list]:
    """Yields items for Beam: at most _CHUNK clips of one piece each."""
    for number, piece in enumerate(pieces):
        indices = list(range(number, total, len(pieces)))
        for at in range(0, len(indices), _CHUNK):
            yield chunks.as_json(piece, indices[at : at + _CHUNK])


def _check_space(folder, needed: int) -> None:
    """Raises OSError if the disk of `folder` has fewer free bytes than needed."""
    parent = next(parent for parent in folder.parents if parent.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{free / 1e9:.1f} GB free and the data set needs {needed / 1e9:.1f}: free some, "
            "or give another data_dir or a smaller config",
            str(parent),
        )


def _as_json(config: ScoreClipsConfig) -> dict[str, object]:
    """Returns the settings that the clips depend on, as JSON gives them back: tuples are lists."""
    fields = {field.name for field in dataclasses.fields(ScoreClipsConfig)}
    fields -= {field.name for field in dataclasses.fields(tfds.core.BuilderConfig)}
    return json.loads(json.dumps({field: getattr(config, field) for field in sorted(fields)}))
