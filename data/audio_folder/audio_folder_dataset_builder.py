"""TFDS builder of a folder of recordings with a file of captions. Read `Builder._split_generators` first."""

import collections
import dataclasses
import hashlib
import json
import pathlib
import sys
from collections.abc import Iterator

import joblib
import numpy as np
import tensorflow_datasets as tfds

from data.audio_folder import recordings
from data.records import RepeatableWriter
from musicrl_jax.core.progress import Progress


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
            if getattr(self, field) <= 0:
                raise ValueError(f"audio_folder/{self.name}: {field} is {getattr(self, field)}: give more than 0")

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
        skipped = self._check(folder, list(dict.fromkeys(row["file"] for row in rows)))
        rows = [row for row in rows if row["file"] not in skipped]
        self._tell(skipped, len(rows))
        splits = recordings.splits_of([row["file"] for row in rows])
        by_split = {
            split: [row for row in rows if splits[row["file"]] == split] for split in ("train", "validation", "test")
        }
        return {split: self._generate_examples(split, folder, chosen) for split, chosen in by_split.items() if chosen}

    def _generate_examples(self, split: str, folder: pathlib.Path, rows: list[recordings.Row]):
        read = self._in_parallel(self._clips, [folder / row["file"] for row in rows])
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

    def _check(self, folder: pathlib.Path, files: list[str]) -> dict[str, str]:
        """The reason why it cannot be used, for each file that cannot."""
        reasons = self._in_parallel(self._fault, [folder / file for file in files])
        told = Progress(
            zip(files, reasons, strict=True), f"audio_folder/{self.builder_config.name} files checked", len(files)
        )
        return {file: reason for file, reason in told if reason}

    def _tell(self, skipped: dict[str, str], left: int) -> None:
        by_reason = collections.defaultdict(list)
        for file, reason in skipped.items():
            by_reason[reason].append(file)
        summary = "; ".join(f"{len(files)} {reason} ({', '.join(files)})" for reason, files in by_reason.items())
        if not left:
            raise ValueError(f"audio_folder/{self.builder_config.name}: no file can be used: {summary}")
        if skipped:
            print(f"audio_folder/{self.builder_config.name}: {len(skipped)} files skipped: {summary}", file=sys.stderr)
        by_reason = {reason: {"count": len(files), "files": files} for reason, files in by_reason.items()}
        (self.data_path / "skipped.json").write_text(json.dumps(by_reason, indent=2))

    def _fault(self, path: pathlib.Path) -> str | None:
        try:
            self._clips(path)
        except recordings.Unusable as unusable:
            return str(unusable)
        return None

    def _clips(self, path: pathlib.Path) -> list[np.ndarray]:
        return recordings.read_clips(path, self.builder_config.clip_seconds, self.builder_config.sample_rate_hz)

    def _in_parallel(self, function, paths: list[pathlib.Path]) -> Iterator:
        """In threads, in order: decoding and resampling let go of the interpreter's lock."""
        parallel = joblib.Parallel(n_jobs=joblib.cpu_count(), prefer="threads", return_as="generator")
        return parallel(joblib.delayed(function)(path) for path in paths)


def _change(name: str, built: object, now: object) -> str:
    """A part of what the clips depend on, and how it differs."""
    if name == "captions":
        return "captions file"
    if name != "recordings":
        return f"{name} ({built}, now {now})"
    files = sorted(file for file in built | now if built.get(file) != now.get(file))
    return f"set of recordings ({', '.join(files[:3])}{f' and {len(files) - 3} more' if files[3:] else ''})"
