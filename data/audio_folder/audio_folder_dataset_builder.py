"""TFDS builder of a folder of recordings with a file of captions. Read `Builder._split_generators` first."""

import collections
import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures

import joblib
import numpy as np
import tensorflow_datasets as tfds

from data.audio_folder import recordings
from data.records import RepeatableWriter
from musicrl_jax.core.progress import Progress

_AHEAD = 2**24  # samples of a file that are read before its turn, 32 MiB; the rest of a longer one comes in its turn
_NAMED = 5  # files of a fault that are named on stderr; skipped.json names all


@dataclasses.dataclass(eq=False, kw_only=True)
class AudioFolderConfig(tfds.core.BuilderConfig):
    """Which recordings, and how they are cut."""

    folder: str
    """Where the recordings are; a row's `file` is relative to it."""
    captions: str
    """.jsonl or .csv with columns file, caption and, if a file has more than one row, id."""
    clip_seconds: float = 10.0
    sample_rate_hz: int = 16000

    def __post_init__(self):
        for field in ("clip_seconds", "sample_rate_hz"):
            if not 0 < getattr(self, field) < math.inf:
                raise ValueError(f"audio_folder/{self.name}: {field} is {getattr(self, field)}: give more than 0")
        if not self.samples:
            raise ValueError(
                f"audio_folder/{self.name}: clip_seconds is {self.clip_seconds}, less than a sample: give more"
            )

    @property
    def samples(self) -> int:
        return round(self.clip_seconds * self.sample_rate_hz)


class Builder(tfds.core.GeneratorBasedBuilder):
    """Clips of `audio` (int16 [N]) with `caption`, `id` ("<row's id>-<clip>") and `attributes` (JSON).

    Give a config: there is none built in. Files that cannot be used are named on stderr and, by reason, in
    skipped.json of the data set. Bytes depend on the recordings and the config alone.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First."}  # noqa: RUF012

    def download_and_prepare(self, **options) -> None:
        """Builds the data set, or does nothing where it is built; takes TFDS's options.

        Raises ValueError if a data set of this name was built from another config, captions or recordings, as
        far as these are still there: a set outlives what it was built from.
        """
        super().download_and_prepare(**options)
        path = self.data_path / "made_from.json"
        if not path.exists():
            return  # a set of an earlier version, which did not note it
        built, now = json.loads(path.read_text()), self._made_from()
        if changed := [_change(name, built[name], now[name]) for name in now if now[name] not in (None, built[name])]:
            raise ValueError(
                f"{self.data_path} was built from another {'; another '.join(changed)}: give this config another "
                f"name than {self.builder_config.name!r}, or delete that folder"
            )

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "audio": tfds.features.Tensor(
                        shape=(self.builder_config.samples,), dtype=np.int16, encoding=tfds.features.Encoding.BYTES
                    ),
                    "caption": tfds.features.Text(),
                    "id": tfds.features.Text(),
                    "attributes": tfds.features.Text(),
                }
            ),
            supervised_keys=None,
            metadata=tfds.core.MetadataDict({"sample_rate_hz": self.builder_config.sample_rate_hz}),
        )

    def _example_writer(self) -> RepeatableWriter:
        return RepeatableWriter(self.info.file_format)

    def _split_generators(self, dl_manager):
        """Checks every file first, so that what is wrong is said at the start and the splits hold usable files."""
        del dl_manager  # nothing is downloaded
        tfds.disable_progress_bar()  # TFDS's bars know no totals and fill logs; Progress does better
        config = self.builder_config
        folder = pathlib.Path(config.folder).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"audio_folder/{config.name}: folder {folder} does not exist")
        rows = recordings.read_captions(pathlib.Path(config.captions).expanduser())
        (self.data_path / "made_from.json").write_text(json.dumps(self._made_from(), indent=2))
        peaks, skipped = self._check(folder, list(dict.fromkeys(row["file"] for row in rows)))
        rows = [row for row in rows if row["file"] in peaks]
        self._tell(skipped, len(rows))
        splits = recordings.splits_of([row["file"] for row in rows])
        by_split = {
            split: [row for row in rows if splits[row["file"]] == split] for split in ("train", "validation", "test")
        }
        return {
            split: self._generate_examples(split, folder, chosen, peaks) for split, chosen in by_split.items() if chosen
        }

    def _generate_examples(
        self, split: str, folder: pathlib.Path, rows: list[recordings.Row], peaks: dict[str, np.float32]
    ):
        read = _in_parallel(lambda row: self._clips(folder / row["file"], peaks[row["file"]]), rows)
        told = Progress(
            zip(rows, read, strict=True), f"audio_folder/{self.builder_config.name} {split} files", len(rows)
        )
        for row, clips in told:
            for number, audio in enumerate(clips):
                name = f"{row['id']}-{number:04d}"
                where = {"file": row["file"], "start_seconds": number * self.builder_config.clip_seconds}
                yield name, {"audio": audio, "caption": row["caption"], "id": name, "attributes": json.dumps(where)}

    def _made_from(self) -> dict[str, object]:
        """What the clips depend on: folder by its name, captions by their hash, recordings by their sizes in bytes.

        None for captions that are not there, and for recordings if none is.
        """
        config = self.builder_config
        folder, captions = (pathlib.Path(path).expanduser() for path in (config.folder, config.captions))
        there = captions.is_file()
        files = {row["file"]: folder / row["file"] for row in recordings.read_captions(captions)} if there else {}
        sizes = {file: path.stat().st_size if path.is_file() else None for file, path in files.items()}
        return {
            "clip_seconds": config.clip_seconds,
            "sample_rate_hz": config.sample_rate_hz,
            "folder": folder.absolute().name,
            "captions": hashlib.sha256(captions.read_bytes()).hexdigest() if there else None,
            "recordings": sizes if any(size is not None for size in sizes.values()) else None,
        }

    def _check(
        self, folder: pathlib.Path, files: list[str]
    ) -> tuple[dict[str, np.float32], dict[str, recordings.Unusable]]:
        """The peak of each file that can be used, and what is wrong with each that cannot."""
        found = _in_parallel(lambda file: self._examine(folder / file), files)
        told = Progress(
            zip(files, found, strict=True), f"audio_folder/{self.builder_config.name} files checked", len(files)
        )
        outcomes = dict(told)
        skipped = {file: found for file, found in outcomes.items() if isinstance(found, recordings.Unusable)}
        return {file: found for file, found in outcomes.items() if file not in skipped}, skipped

    def _examine(self, path: pathlib.Path) -> np.float32 | recordings.Unusable:
        try:
            return recordings.examine(path, self.builder_config.clip_seconds, self.builder_config.sample_rate_hz)
        except recordings.Unusable as unusable:
            return unusable

    def _tell(self, skipped: dict[str, recordings.Unusable], left: int) -> None:
        by_reason = collections.defaultdict(dict)
        for file, unusable in skipped.items():
            by_reason[unusable.reason][file] = unusable.value
        summary = "; ".join(f"{len(files)} {reason} ({_named(files)})" for reason, files in by_reason.items())
        if not left:
            raise ValueError(f"audio_folder/{self.builder_config.name}: no file can be used: {summary}")
        if skipped:
            print(f"audio_folder/{self.builder_config.name}: {len(skipped)} files skipped: {summary}", file=sys.stderr)
        by_reason = {reason: {"count": len(files), "files": files} for reason, files in by_reason.items()}
        (self.data_path / "skipped.json").write_text(json.dumps(by_reason, indent=2))

    def _clips(self, path: pathlib.Path, peak: np.float32) -> Iterator[np.ndarray]:
        """A file's clips, the first of them read already."""
        clips = self._read(path, peak)
        return itertools.chain(list(itertools.islice(clips, max(1, _AHEAD // self.builder_config.samples))), clips)

    def _read(self, path: pathlib.Path, peak: np.float32) -> Iterator[np.ndarray]:
        try:
            yield from recordings.read_clips(
                path, self.builder_config.clip_seconds, self.builder_config.sample_rate_hz, peak
            )
        except recordings.Unusable as unusable:
            raise ValueError(f"{path} changed since it was checked: {unusable}; build again") from unusable


def _in_parallel(function: Callable, items: Iterable) -> Iterator:
    """function(item) in order, by threads: decoding and resampling let go of the interpreter's lock.

    They are ahead by two items a thread, no more: joblib's generator would read a whole folder into memory.
    """
    threads = joblib.cpu_count()
    with futures.ThreadPoolExecutor(threads) as pool:
        ahead = collections.deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > 2 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _named(files: dict[str, str]) -> str:
    """The first files, each with what was found."""
    named = [f"{file}: {value}" if value else file for file, value in itertools.islice(files.items(), _NAMED)]
    more = len(files) - len(named)
    return ", ".join(named) + (f" and {more} more, all in skipped.json" if more else "")


def _change(name: str, built: object, now: object) -> str:
    """A part of what the clips depend on, and how it differs."""
    if name == "captions":
        return "captions file"
    if name != "recordings":
        return f"{name} ({built}, now {now})"
    files = sorted(file for file in built | now if built.get(file) != now.get(file))
    return f"set of recordings ({', '.join(files[:3])}{f' and {len(files) - 3} more' if files[3:] else ''})"
