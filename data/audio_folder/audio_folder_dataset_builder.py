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

from musicrl_jax.core.progress import Progress

from ..records import RepeatableBuilder
from . import captions, recordings
from .streams import Unusable

_AHEAD = (
    2**24
)  # samples of a file that are read before its turn, 32 MiB; the rest of a longer one comes in its turn
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
    silence_share_limit: float = 0.9
    """A clip with a greater share of silence, or of a constant, is left out; 1 keeps all."""
    allow_outside: bool = False
    """Whether a row's `file` may be an absolute path, or lead out of `folder` by `..`."""

    def __post_init__(self):
        for field in ("clip_seconds", "sample_rate_hz"):
            if not 0 < getattr(self, field) < math.inf:
                raise ValueError(
                    f"audio_folder/{self.name}: {field} is {getattr(self, field)}: give more than 0"
                )
        if not 0 <= self.silence_share_limit <= 1:
            raise ValueError(
                f"audio_folder/{self.name}: silence_share_limit is {self.silence_share_limit}: give 0 to 1"
            )
        if not self.samples:
            raise ValueError(
                f"audio_folder/{self.name}: clip_seconds is {self.clip_seconds}, less than a sample: give more"
            )

    @property
    def samples(self) -> int:
        return round(self.clip_seconds * self.sample_rate_hz)


class Builder(RepeatableBuilder):
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
        path = self.data_path / "made_from.json"
        is_built = path.exists()  # a set of an earlier version did not note it
        super().download_and_prepare(**options)
        if not is_built:
            return
        # A setting that a set does not note is younger than the set, and had its default.
        built = {"silence_share_limit": AudioFolderConfig.silence_share_limit} | json.loads(
            path.read_text()
        )
        now = self._made_from(built)
        if changed := [
            _change(name, built[name], now[name])
            for name in now
            if now[name] not in (None, built[name])
        ]:
            raise ValueError(
                f"{self.data_path} was built from another {'; another '.join(changed)}: give this config another "
                f"name than {self.builder_config.name!r}, or delete that folder"
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
                }
            ),
            supervised_keys=None,
            metadata=tfds.core.MetadataDict({"sample_rate_hz": self.builder_config.sample_rate_hz}),
        )

    def _split_generators(self, dl_manager):
        """Checks every file first, so that what is wrong is said at the start and the splits hold usable files."""
        del dl_manager  # nothing is downloaded
        tfds.disable_progress_bar()  # TFDS's bars know no totals and fill logs; Progress does better
        config = self.builder_config
        folder = pathlib.Path(config.folder).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"audio_folder/{config.name}: folder {folder} does not exist")
        rows = captions.read_captions(
            pathlib.Path(config.captions).expanduser(), config.allow_outside
        )
        files = list(dict.fromkeys(row["file"] for row in rows))
        (self.data_path / "made_from.json").write_text(
            json.dumps(self._made_from({}, files), indent=2)
        )
        usable, skipped = self._check(folder, files)
        self._report(usable, skipped)
        splits = self._splits(usable)
        by_split = {split: [] for split in ("train", "validation", "test")}
        for row in rows:
            if row["file"] in usable:
                by_split[splits[row["file"]]].append(row)
        return {
            split: self._generate_examples(split, folder, chosen, usable)
            for split, chosen in by_split.items()
        }

    def _generate_examples(
        self,
        split: str,
        folder: pathlib.Path,
        rows: list[captions.Row],
        usable: dict[str, recordings.Recording],
    ):
        config = self.builder_config
        read = _in_parallel(
            lambda row: self._clips(folder / row["file"], usable[row["file"]].peak), rows
        )
        for row, clips in self._progress(zip(rows, read, strict=True), f"{split} files", len(rows)):
            for number, audio in enumerate(clips):
                if usable[row["file"]].silence[number] > config.silence_share_limit:
                    continue
                name = f"{row['id']}-{number:04d}"
                where = {"file": row["file"], "start_seconds": number * config.clip_seconds}
                yield (
                    name,
                    {
                        "audio": audio,
                        "caption": row["caption"],
                        "id": name,
                        "attributes": json.dumps(where),
                    },
                )

    def _progress(self, items: Iterable, label: str, total: int) -> Progress:
        return Progress(items, f"audio_folder/{self.builder_config.name} {label}", total)

    def _made_from(self, built: dict[str, object], files: Iterable[str] = ()) -> dict[str, object]:
        """Returns what the clips depend on: folder by its name, captions by their hash, recordings by sizes in bytes.

        None for captions that are not there, and for recordings if none is.

        Args:
          built: what a set was built from; its captions are not read again where they are the same.
          files: the recordings of a set that is not built.
        """
        config = self.builder_config
        folder, table = (
            pathlib.Path(path).expanduser() for path in (config.folder, config.captions)
        )
        captions_hash = hashlib.sha256(table.read_bytes()).hexdigest() if table.is_file() else None
        if built and captions_hash == built["captions"]:
            files = built["recordings"] or ()
        elif built and captions_hash is not None:
            files = dict.fromkeys(
                row["file"] for row in captions.read_captions(table, config.allow_outside)
            )
        sizes = {}
        for file in self._progress(files, "files looked at", len(files)) if files else ():
            sizes[file] = recordings.file_size(folder / file)
        return {
            "clip_seconds": config.clip_seconds,
            "sample_rate_hz": config.sample_rate_hz,
            "silence_share_limit": config.silence_share_limit,
            "folder": folder.absolute().name,
            "captions": captions_hash,
            "recordings": sizes if any(size is not None for size in sizes.values()) else None,
        }

    def _check(
        self, folder: pathlib.Path, files: list[str]
    ) -> tuple[dict[str, recordings.Recording], dict[str, Unusable]]:
        """Returns what each file that can be used holds, and what is wrong with each that cannot."""
        usable, skipped = {}, {}
        outcomes = _in_parallel(lambda file: self._examine(folder / file), files)
        for file, outcome in self._progress(
            zip(files, outcomes, strict=True), "files checked", len(files)
        ):
            (skipped if isinstance(outcome, Unusable) else usable)[file] = outcome
        return usable, skipped

    def _examine(self, path: pathlib.Path) -> recordings.Recording | Unusable:
        config = self.builder_config
        try:
            recording = recordings.examine(path, config.clip_seconds, config.sample_rate_hz)
        except Unusable as unusable:
            return unusable
        if min(recording.silence) > config.silence_share_limit:
            reason = (
                f"more than {config.silence_share_limit:.0%} of each clip is silence or a constant: "
                "record it again, or build with a greater silence_share_limit"
            )
            return Unusable(reason, f"{len(recording.silence)} clips")
        return recording

    def _splits(self, usable: dict[str, recordings.Recording]) -> dict[str, str]:
        """Returns the split of each file. Copies of a recording are one recording, by the first of their names."""
        firsts = {}
        for file in sorted(usable):
            firsts.setdefault(usable[file].digest, file)
        try:
            splits = captions.splits_of(
                self._progress(firsts.values(), "recordings split", len(firsts))
            )
        except ValueError as error:
            raise ValueError(f"audio_folder/{self.builder_config.name}: {error}") from error
        return {file: splits[firsts[recording.digest]] for file, recording in usable.items()}

    def _report(
        self, usable: dict[str, recordings.Recording], skipped: dict[str, Unusable]
    ) -> None:
        """Writes skipped.json and names on stderr what is left out; raises ValueError if nothing is left."""
        name, limit = (
            f"audio_folder/{self.builder_config.name}",
            self.builder_config.silence_share_limit,
        )
        by_reason = collections.defaultdict(dict)
        for file, unusable in skipped.items():
            by_reason[unusable.reason][file] = unusable.value
        summary = _summary(by_reason)
        if not usable:
            raise ValueError(f"{name}: no file can be used: {summary}")
        if skipped:
            print(f"{name}: {len(skipped)} files skipped: {summary}", file=sys.stderr)
        report = {
            reason: {"count": len(files), "files": files} for reason, files in by_reason.items()
        }

        # Clips of files that are used.
        silent = {
            file: sum(share > limit for share in recording.silence)
            for file, recording in usable.items()
        }
        if clips := sum(silent.values()):
            reason = f"clips left out, each more than {limit:.0%} silence or a constant"
            files = {
                file: f"{count} of {len(usable[file].silence)} clips"
                for file, count in silent.items()
                if count
            }
            print(f"{name}: {clips} {reason} ({_named(files)})", file=sys.stderr)
            report[reason] = {"count": clips, "files": files}
        (self.data_path / "skipped.json").write_text(json.dumps(report, indent=2))

    def _clips(self, path: pathlib.Path, peak: np.float32) -> Iterator[np.ndarray]:
        """Returns a file's clips, the first of them read already."""
        clips = self._read(path, peak)
        return itertools.chain(
            list(itertools.islice(clips, max(1, _AHEAD // self.builder_config.samples))), clips
        )

    def _read(self, path: pathlib.Path, peak: np.float32) -> Iterator[np.ndarray]:
        try:
            yield from recordings.read_clips(
                path, self.builder_config.clip_seconds, self.builder_config.sample_rate_hz, peak
            )
        except Unusable as unusable:
            raise ValueError(
                f"{path} changed since it was checked: {unusable}; build again"
            ) from unusable


def _summary(by_reason: dict[str, dict[str, str]]) -> str:
    return "; ".join(
        f"{len(files)} {reason} ({_named(files)})" for reason, files in by_reason.items()
    )


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
    named = [
        f"{file}: {value}" if value else file
        for file, value in itertools.islice(files.items(), _NAMED)
    ]
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
