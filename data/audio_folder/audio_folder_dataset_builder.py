"""TFDS builder of a folder of recordings with a file of captions.

Read `Builder._split_generators` first. N is the number of samples of a clip.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures

import joblib
import numpy as np
import tensorflow_datasets as tfds

from musicrl_jax.core.progress import Progress
from musicrl_jax.inputs import pipelines

from ..records import ClipConfig, RepeatableBuilder
from . import captions, jobs, recordings
from .streams import Unusable

_AHEAD = 2**24  # samples of a file, 32 MiB, to read before its turn. The rest is read in its turn.
_NAMED = 5  # files to name on stderr for each reason. skipped.json names all.


@dataclasses.dataclass(eq=False, kw_only=True)
class AudioFolderConfig(ClipConfig):
    """Which recordings to use and how to cut them into clips."""

    folder: str
    """Folder of the recordings. Each row's `file` is relative to it."""
    captions: str
    """.jsonl or .csv file with columns file, caption and, if a file has several rows, id."""
    clip_seconds: float = 10.0
    silence_share_limit: float = 0.9
    """Largest share of a clip that may be silence or a constant; 1 keeps all clips."""
    allow_outside: bool = False
    """Whether a row's `file` may be an absolute path, or leave `folder` by `..`."""

    def __post_init__(self):
        where, limit = f"audio_folder/{self.name}", self.silence_share_limit
        self.check_positive("audio_folder", "clip_seconds", "sample_rate_hz")
        if not 0 <= limit <= 1:
            raise ValueError(f"{where}: silence_share_limit is {limit}: give 0 to 1")
        if not self.samples:
            raise ValueError(
                f"{where}: clip_seconds is {self.clip_seconds}, less than a sample: give more"
            )


class Builder(RepeatableBuilder):
    """Builds clips: `audio` (int16 [N]), `caption`, `id` ("<row id>-<clip>"), `attributes` (JSON).

    Needs a config: none is built in. Names unusable files on stderr and, by reason, in skipped.json
    of the data set. The examples depend on the recordings and the config alone.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First."}  # noqa: RUF012

    # --- TFDS's interface ---

    def download_and_prepare(self, **options) -> None:
        """Builds the data set if it does not exist. Takes TFDS's options.

        Raises ValueError if a data set of this name was built from another config, captions or
        recordings. Captions and recordings that no longer exist are not compared: a data set may
        outlive them.
        """
        path = self.data_path / "made_from.json"
        is_built = path.exists()  # early versions did not write it
        super().download_and_prepare(**options)
        if not is_built:
            return
        # A setting that the file lacks is newer than the data set: it had its default.
        built = {"silence_share_limit": AudioFolderConfig.silence_share_limit}
        built |= json.loads(path.read_text())
        changes = []
        for name, now in self._made_from(built).items():
            if now not in (None, built[name]):
                changes.append(_change(name, built[name], now))
        if changes:
            raise ValueError(
                f"{self.data_path} was built from another {'; another '.join(changes)}: give this "
                f"config another name than {self.builder_config.name!r}, or delete that folder"
            )

    def _info(self) -> tfds.core.DatasetInfo:
        metadata = {"sample_rate_hz": self.builder_config.sample_rate_hz}
        return self.clip_info("caption", "id", "attributes", metadata=metadata)

    def _split_generators(self, dl_manager):
        """Checks all files first: errors come at the start, and splits count usable files only."""
        del dl_manager  # there is nothing to download
        tfds.disable_progress_bar()  # TFDS's bars show no totals and fill logs; Progress shows both
        config, folder = self.builder_config, self._folder
        if not folder.is_dir():
            raise FileNotFoundError(f"audio_folder/{config.name}: folder {folder} does not exist")

        # What the data set is built from.
        rows = captions.read_captions(self._table, config.allow_outside)
        files = list(dict.fromkeys(row["file"] for row in rows))
        made_from = json.dumps(self._made_from({}, files), indent=2)
        (self.data_path / "made_from.json").write_text(made_from)

        # Which files are usable, and in which split each is.
        usable, skipped = self._check(files)
        self._report(usable, skipped)
        splits = self._splits(usable)
        by_split = {split: [] for split in ("train", "validation", "test")}
        for row in rows:
            if row["file"] in usable:
                by_split[splits[row["file"]]].append(row)
        return {
            split: self._generate_examples(split, split_rows, usable)
            for split, split_rows in by_split.items()
        }

    @property
    def _folder(self) -> pathlib.Path:
        return self._settings.path()

    @property
    def _settings(self) -> jobs.Settings:
        config = self.builder_config
        return jobs.Settings(
            config.folder, config.clip_seconds, config.sample_rate_hz, config.silence_share_limit
        )

    @property
    def _table(self) -> pathlib.Path:
        return pathlib.Path(self.builder_config.captions).expanduser()

    def _generate_examples(
        self, split: str, rows: list[captions.Row], usable: dict[str, recordings.Recording]
    ):
        """Returns a split's examples: a transform of Beam, or a generator."""
        if not self.uses_beam:
            return self._generated(split, rows, usable)
        from apache_beam import FlatMap

        path = self.beam_folder / f"{split}.jsonl"
        pairs = ([row, jobs.as_json(usable[row["file"]])] for row in rows)
        pipelines.write_items(path, pairs)
        cut = functools.partial(jobs.examples_of_pair, self._settings)
        return pipelines.read_items(path) | "Cut" >> FlatMap(cut)

    def _generated(
        self, split: str, rows: list[captions.Row], usable: dict[str, recordings.Recording]
    ) -> Iterator[jobs.Example]:
        """Yields a split's examples, read by threads of this process."""
        clips_of_rows = _in_parallel(
            lambda row: self._clips(self._folder / row["file"], usable[row["file"]].peak), rows
        )
        pairs = zip(rows, clips_of_rows, strict=True)
        for row, clips in self._progress(pairs, f"{split} files", len(rows)):
            yield from jobs.examples(self._settings, row, usable[row["file"]], clips)

    # --- checks before a build ---

    def _progress(self, items: Iterable, label: str, total: int) -> Progress:
        return Progress(items, f"audio_folder/{self.builder_config.name} {label}", total)

    def _made_from(self, built: dict[str, object], files: Iterable[str] = ()) -> dict[str, object]:
        """Returns what the clips depend on: settings, folder name, captions' hash, sizes in bytes.

        Captions that do not exist are None. Recordings are None if none exists.

        Args:
          built: the result for an existing data set. Unchanged captions are not read again.
          files: recordings of a new data set.
        """
        # Captions: by their hash.
        config, captions_hash = self.builder_config, None
        if self._table.is_file():
            captions_hash = hashlib.sha256(self._table.read_bytes()).hexdigest()

        # Recordings: by their sizes.
        if built and captions_hash == built["captions"]:
            files = built["recordings"] or ()
        elif built and captions_hash is not None:
            rows = captions.read_captions(self._table, config.allow_outside)
            files = dict.fromkeys(row["file"] for row in rows)
        sizes = {}
        for file in self._progress(files, "files looked at", len(files)) if files else ():
            sizes[file] = recordings.file_size(self._folder / file)
        return {
            "clip_seconds": config.clip_seconds,
            "sample_rate_hz": config.sample_rate_hz,
            "silence_share_limit": config.silence_share_limit,
            "folder": self._folder.absolute().name,
            "captions": captions_hash,
            "recordings": sizes if any(size is not None for size in sizes.values()) else None,
        }

    def _check(
        self, files: list[str]
    ) -> tuple[dict[str, recordings.Recording], dict[str, Unusable]]:
        """Returns the measurements of each usable file, and the fault of each other one."""
        usable, skipped = {}, {}
        if self.uses_beam:
            examine = functools.partial(jobs.examined_as_json, self._settings)
            results = dict(self.mapped_by_beam(examine, files, f"{len(files)} files"))
            outcomes = (jobs.from_json(results[file]) for file in files)
        else:
            outcomes = _in_parallel(functools.partial(jobs.examined, self._settings), files)
        pairs = zip(files, outcomes, strict=True)
        for file, outcome in self._progress(pairs, "files checked", len(files)):
            (skipped if isinstance(outcome, Unusable) else usable)[file] = outcome
        return usable, skipped

    def _splits(self, usable: dict[str, recordings.Recording]) -> dict[str, str]:
        """Returns the split of each file. Copies of a recording share a split."""
        firsts = {}  # by digest: the first name of a recording
        for file in sorted(usable):
            firsts.setdefault(usable[file].digest, file)
        names = self._progress(firsts.values(), "recordings split", len(firsts))
        try:
            splits = captions.splits_of(names)
        except ValueError as error:
            raise ValueError(f"audio_folder/{self.builder_config.name}: {error}") from error
        return {file: splits[firsts[recording.digest]] for file, recording in usable.items()}

    def _report(
        self, usable: dict[str, recordings.Recording], skipped: dict[str, Unusable]
    ) -> None:
        """Writes skipped.json and names unused files and clips on stderr.

        Raises ValueError if no file is usable.
        """
        config = self.builder_config
        name, limit = f"audio_folder/{config.name}", config.silence_share_limit

        # Files, by their fault.
        by_reason = collections.defaultdict(dict)
        for file, unusable in skipped.items():
            by_reason[unusable.reason][file] = unusable.value
        report = {
            reason: {"count": len(files), "files": files} for reason, files in by_reason.items()
        }
        summary = "; ".join(
            f"{len(files)} {reason} ({_named(files)})" for reason, files in by_reason.items()
        )
        if not usable:
            raise ValueError(f"{name}: no file can be used: {summary}")
        if skipped:
            print(f"{name}: {len(skipped)} files skipped: {summary}", file=sys.stderr)

        # Silent clips of usable files.
        clips, files = 0, {}
        for file, recording in usable.items():
            if count := sum(share > limit for share in recording.silence):
                clips += count
                files[file] = f"{count} of {len(recording.silence)} clips"
        if clips:
            reason = f"clips left out, each more than {limit:.0%} silence or a constant"
            print(f"{name}: {clips} {reason} ({_named(files)})", file=sys.stderr)
            report[reason] = {"count": clips, "files": files}
        (self.data_path / "skipped.json").write_text(json.dumps(report, indent=2))

    # --- reading ---

    def _clips(self, path: pathlib.Path, peak: np.float32) -> Iterator[np.ndarray]:
        """Returns an iterator over a file's clips. Reads the first ones at once."""
        clips = jobs.read(self._settings, path, peak)
        count = max(1, _AHEAD // self.builder_config.samples)
        return itertools.chain(list(itertools.islice(clips, count)), clips)


def _in_parallel(function: Callable, items: Iterable) -> Iterator:
    """Yields function(item) in order, computed by threads: decoding and resampling release the GIL.

    At most two items for each thread are ahead. joblib's generator has no such limit and would read
    a whole folder into memory.
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
    """Returns the first files as text, each with its value, and the number of others."""
    named = []
    for file, value in itertools.islice(files.items(), _NAMED):
        named.append(f"{file}: {value}" if value else file)
    more = len(files) - len(named)
    return ", ".join(named) + (f" and {more} more, all in skipped.json" if more else "")


def _change(name: str, built: object, now: object) -> str:
    """Returns the name of what changed, and its values or files."""
    if name == "captions":
        return "captions file"
    if name != "recordings":
        return f"{name} ({built}, now {now})"
    files = sorted(file for file in built | now if built.get(file) != now.get(file))
    more = f" and {len(files) - 3} more" if files[3:] else ""
    return f"set of recordings ({', '.join(files[:3])}{more})"
