"""TFDS builder of rendered scores with true captions. Read `Builder._split_generators` first."""

import dataclasses
import errno
import itertools
import json
import os
import shutil
from collections.abc import Iterator

import joblib
import numpy as np
import tensorflow_datasets as tfds

from musicrl_jax.core.progress import Progress

from ..records import RepeatableBuilder
from . import chunks, scores
from .instruments import FEW, INSTRUMENTS

LICENCE = (
    "Clips contain samples of the soundfont TimGM6mb by Tim Brechbill, which stands under GPL-2; the scores are "
    "encodings of music in the public domain, from music21's corpus."
)
SPLITS = ("train", "validation", "test")
_CHUNK = (
    8  # clips or pieces that a worker takes at once, and that a build started again need not redo
)
_WAVE = 64  # pieces parsed before looking whether more are needed


@dataclasses.dataclass(eq=False, kw_only=True)
class ScoreClipsConfig(tfds.core.BuilderConfig):
    """How much music, from how many scores. Only `name` and the counts of clips have no default."""

    train: int
    """Clips in the split; each split has at least one."""
    validation: int
    test: int
    clip_seconds: float = 4.0
    sample_rate_hz: int = 16000
    pieces: int = 200
    """Distinct scores: 80 % for train, 10 % each for validation and test, at least one each."""
    collections: tuple[str, ...] = (*scores.TUNE_BOOKS, "bach")
    """Folders of music21's corpus, out of scores.COLLECTIONS."""
    instruments: tuple[str, ...] = FEW
    """Names out of instruments.INSTRUMENTS."""
    seed: int = 0

    def __post_init__(self):
        for field in (*SPLITS, "clip_seconds", "sample_rate_hz", "pieces"):
            if getattr(self, field) <= 0:
                raise ValueError(
                    f"score_clips/{self.name}: {field} is {getattr(self, field)}: give more than 0"
                )
        for field, known in (
            ("collections", scores.COLLECTIONS),
            ("instruments", tuple(INSTRUMENTS)),
        ):
            unknown = sorted(set(getattr(self, field)) - set(known))
            if unknown or not getattr(self, field):
                raise ValueError(
                    f"score_clips/{self.name}: {field} has {unknown or 'nothing'}: choose from {known}"
                )
        if not any(INSTRUMENTS[name].chords for name in self.instruments):
            raise ValueError(
                f"score_clips/{self.name}: instruments are {self.instruments}: add one that plays chords"
            )

    @property
    def samples(self) -> int:
        return round(self.clip_seconds * self.sample_rate_hz)


class Builder(RepeatableBuilder):
    """Clips of `audio` (int16 [N]) with `caption`, `id`, `attributes` and `notes` (both JSON).

    `notes` are rows [onset s, duration s, MIDI pitch, part]; without the drums. Bytes depend on the config
    alone, not on the machine's cores. Build with file_format="array_record" for random access.
    """

    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES = {  # noqa: RUF012
        "1.0.0": "First.",
        "1.1.0": "A note that starts while its pitch sounds in the same part no longer ends with the earlier one.",
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
            description="56 minutes in clips of 5 s, of all that demo has, built in less than a minute.",
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

    def download_and_prepare(self, **options) -> None:
        """Builds the data set, or does nothing where it is built; takes TFDS's options.

        Parsed pieces and rendered clips are kept beside the data set until it is complete: started again
        after an interruption, a build goes on where it was. Raises OSError if the disk cannot hold it and
        ValueError if a data set of this name was built from another config.
        """
        cache = os.path.join(os.path.dirname(self.data_dir), "cache")
        if not self.data_path.exists():
            _check_space(
                self.data_path, 2 * self._bytes()
            )  # the clips are in the cache and in the data set
        # joblib does not see a change of what the cached functions call: each version keeps what it made.
        self._memory = joblib.Memory(os.path.join(cache, str(self.version)), verbose=0)
        tfds.disable_progress_bar()  # TFDS's bars know no totals and fill logs; Progress does better
        super().download_and_prepare(**options)
        shutil.rmtree(cache, ignore_errors=True)
        built = json.loads((self.data_path / "metadata.json").read_text())
        if built != _as_json(self.builder_config):
            raise ValueError(
                f"{self.data_path} was built from another config, {built}: give yours another name "
                f"than {self.builder_config.name!r}, or delete that folder"
            )

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "audio": tfds.features.Tensor(
                        shape=(self.builder_config.samples,),
                        dtype=np.int16,
                        encoding=tfds.features.Encoding.BYTES,
                    ),
                    "caption": tfds.features.Text(),
                    "id": tfds.features.Text(),
                    "attributes": tfds.features.Text(),
                    "notes": tfds.features.Text(),
                }
            ),
            supervised_keys=None,
            metadata=tfds.core.MetadataDict(_as_json(self.builder_config)),
            license=LICENCE,
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing is downloaded: the scores come with music21
        pieces = self._pieces()
        return {split: self._generate_examples(split, pieces[split]) for split in SPLITS}

    def _generate_examples(self, split: str, pieces: list[scores.Piece]):
        config = self.builder_config
        total = getattr(config, split)
        jobs = [(index, pieces[index % len(pieces)]) for index in range(total)]
        clips = self._in_parallel(
            chunks.rendered,
            jobs,
            split,
            config.seed,
            config.clip_seconds,
            config.sample_rate_hz,
            config.instruments,
        )
        for clip, audio, caption in Progress(
            clips, f"score_clips/{config.name} {split} clips", total
        ):
            yield (
                clip.id,
                {
                    "audio": audio,
                    "caption": caption,
                    "id": clip.id,
                    "attributes": json.dumps(clip.attributes),
                    "notes": json.dumps(clip.notes),
                },
            )

    def _pieces(self) -> dict[str, list[scores.Piece]]:
        """The pieces of each split."""
        config = self.builder_config
        wanted = scores.quotas(config.pieces)
        chosen = {split: [] for split in SPLITS}
        found = self._choose(scores.candidates(config.collections, config.seed), wanted)
        for split, piece in Progress(
            found, f"score_clips/{config.name} scores", sum(wanted.values())
        ):
            chosen[split].append(piece)
        if not all(chosen.values()):
            raise ValueError(
                f"score_clips/{config.name}: collections {config.collections} hold no piece for "
                f"{[split for split in SPLITS if not chosen[split]]}: add a collection"
            )
        return chosen

    def _choose(
        self, names: list[str], wanted: dict[str, int]
    ) -> Iterator[tuple[str, scores.Piece]]:
        """The first pieces, in order, that begin unlike all before, until each split has as many as wanted."""
        wanted, openings = dict(wanted), set()
        while names and any(wanted.values()):
            few, names = names[:_WAVE], names[_WAVE:]
            for piece in self._in_parallel(chunks.parsed, few):
                opening = piece and scores.opening(piece)
                if piece is None or opening in openings:
                    continue
                openings.add(opening)
                split = scores.split_of(opening)
                if wanted[split]:
                    wanted[split] -= 1
                    yield split, piece

    def _in_parallel(self, function, items: list, *arguments) -> Iterator:
        """function(chunk, *arguments) over chunks of the items, in all cores, in order; cached."""
        chunked = [items[at : at + _CHUNK] for at in range(0, len(items), _CHUNK)]
        parallel = joblib.Parallel(n_jobs=joblib.cpu_count(), return_as="generator")
        cached = self._memory.cache(function)
        return itertools.chain.from_iterable(
            parallel(joblib.delayed(cached)(chunk, *arguments) for chunk in chunked)
        )

    def _bytes(self) -> int:
        return (
            2
            * self.builder_config.samples
            * sum(getattr(self.builder_config, split) for split in SPLITS)
        )


def _check_space(folder, needed: int) -> None:
    standing = next(parent for parent in folder.parents if parent.exists())
    free = shutil.disk_usage(standing).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{free / 1e9:.1f} GB free and the data set needs {needed / 1e9:.1f}: free some, "
            "or give another data_dir or a smaller config",
            str(standing),
        )


def _as_json(config: ScoreClipsConfig) -> dict[str, object]:
    """What the clips depend on, as JSON would give it back."""
    fields = {field.name for field in dataclasses.fields(ScoreClipsConfig)}
    fields -= {field.name for field in dataclasses.fields(tfds.core.BuilderConfig)}
    return json.loads(json.dumps({field: getattr(config, field) for field in sorted(fields)}))
