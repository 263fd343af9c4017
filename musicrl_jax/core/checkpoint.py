"""Models on disk, by Orbax.

A model's folder is what other stages read: the weights, the config that rebuilds the module, a hash of the content and
any files that belong to it.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from musicrl_jax.core import hosts, sharding
from musicrl_jax.core.files import json_from
from musicrl_jax.core.identity import CONTENT, HashedData
from musicrl_jax.core.manifest import (
    FILES,
    MANIFEST,
    Kind,
    check_space,
    damage,
    described_files,
    read_regular,
    sealed,
    unsealed,
    write_on_disk,
)

MODEL = "model"
LINEAGE = "tokens.json"  # asset of a token model: which models wrote the tokens that it was trained on, {name: hash}
CLIP = "clip.json"  # asset of a token model: the length of the clips that it was trained on, {"seconds": s}
ANCHOR = "anchor.json"  # asset of a finetuned policy: its anchor's content hash, what its rewards declare, the alarm
TOLD_BY = (
    MANIFEST,
    "votes.jsonl",
)  # the files that say what a folder of tokens, or of votes on them, holds
# The kind of a model's manifest; older ones do not list their files.
KIND = {"config": {"kind?": str}, "hash": str, "assets": [str], "files?": FILES}
NO_IDENTITY = {"identity": False}

# What Orbax logs with a traceback, several times over, it raises as well, and that becomes one error here.
logging.getLogger("absl").addFilter(
    lambda record: not (record.exc_info and "orbax" in record.pathname)
)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model read from disk.

    Attributes:
      config: the dataclass that rebuilds its module.
      variables: its weights and other collections.
      hash: sha256 over names, shapes, dtypes and bytes of all arrays.
      assets: files that came with it.
    """

    config: Any
    variables: Any
    hash: str
    assets: dict[str, bytes]

    def json_asset(self, name: str, kind: Kind, default: Any = None) -> Any:
        """Returns an asset that is JSON, or the default where there is none.

        Raises ValueError if it is damaged, not of the kind (see `manifest.check_kind`), or needed and
        missing.
        """
        where = f"the {type(self.config).__name__} checkpoint {self.hash[:12]}"
        if name not in self.assets and default is not None:
            return default
        if name not in self.assets:
            raise ValueError(f"{where} has no {name}: train it again with this version")
        remedy = "train it again, or restore a copy"
        return json_from(self.assets[name], f"{name} of {where}", kind, remedy)


Reader = Callable[[str | Path, type], Model]  # as `load_model`; a planner's reads shapes alone


def content_hash(tree: Any) -> str:
    """sha256, as hex, over every leaf's path, dtype, shape and bytes: equal exactly where the content is."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def config_to_json(config: Any) -> dict[str, Any]:
    """A config dataclass as plain JSON, with its class's name under 'kind'; so are the configs in it."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {"kind": type(config).__name__} | {
        name: config_to_json(value)
        if dataclasses.is_dataclass(value)
        else json.loads(json.dumps(value))
        for name, value in values.items()
    }


def config_from_json(config_class: type, fields: dict[str, Any], where: str) -> Any:
    """Returns the config, checked.

    Raises ValueError where `fields` are those of another class or version, or have other types.
    """
    fields = dict(fields)
    kind = fields.pop("kind", config_class.__name__)
    if kind != config_class.__name__:
        raise ValueError(
            f"{where} holds a {kind}, not a {config_class.__name__}: point to a checkpoint of that model"
        )
    hints = typing.get_type_hints(config_class)
    known = {field.name for field in dataclasses.fields(config_class)}
    if set(fields) != known:
        raise ValueError(
            f"{where}: fields {sorted(set(fields) ^ known)} of {config_class.__name__} do not match this version"
        )
    values = {
        name: _field_from_json(hints[name], value, f"{config_class.__name__}.{name}", where)
        for name, value in fields.items()
    }
    try:
        return config_class(**values)
    except (TypeError, ZeroDivisionError, OverflowError) as error:
        # Of a check that takes the numbers for sensible ones.
        name = config_class.__name__
        raise ValueError(f"{where}: the fields of {name} do not go together ({error})") from error


def _field_from_json(hint: Any, value: Any, field: str, where: str) -> Any:
    """Returns a field's value; ValueError where it is of another type than its annotation."""
    choices = [choice for choice in (hint, *typing.get_args(hint)) if isinstance(choice, type)]
    configs = [choice for choice in choices if dataclasses.is_dataclass(choice)]
    if (
        isinstance(value, dict) and configs
    ):  # of several that a field may hold, the one that is named
        named = [choice for choice in configs if choice.__name__ == value.get("kind")]
        return config_from_json((named or configs)[0], value, where)
    if isinstance(value, list) and typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        fields = [(f"{field}[{i}]", part) for i, part in enumerate(value)]
        return tuple(_field_from_json(inner, part, name, where) for name, part in fields)
    if isinstance(value, list) and hint in (Any, tuple):
        return tuple(value)
    is_any = hint is Any or not choices
    if typing.get_origin(hint) is not tuple and (is_any or _is_of(value, choices)):
        return value
    words = f"{json.dumps(value)[:60]}, which is no {_name(hint)}"
    raise ValueError(f"{where}: {field} is {words}: restore a copy")


def _is_of(value: Any, choices: list[type]) -> bool:
    if value is None or isinstance(value, bool):
        return type(value) in choices
    if isinstance(value, float) and value.is_integer():  # as gin's 1e3
        return int in choices or float in choices
    return isinstance(value, (*choices, *((int,) if float in choices else ())))


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)


def describe(value: Any) -> Any:
    """Returns a setting as plain JSON, for the identity of a run.

    A text stands for itself, whatever lies in the working directory. Paths are described by
    `describe_path`: those of the type Path, and fields of a dataclass that are marked
    `field(metadata=PATH)`. A field of `field(metadata=NO_IDENTITY)`, such as a cache's folder, is
    left out. `HashedData` are described by their fields and, under CONTENT, by their hashes;
    without hashes by their fields alone, as before there were any.
    """
    if dataclasses.is_dataclass(value):
        described = {}
        for field in dataclasses.fields(value):
            if field.metadata != NO_IDENTITY:
                described[field.name] = field.metadata.get("describe", describe)(
                    getattr(value, field.name)
                )
        hashes = value.content_hashes() if isinstance(value, HashedData) else {}
        return described | ({CONTENT: hashes} if hashes else {})
    if isinstance(value, dict):
        return {str(name): describe(part) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return [describe(part) for part in value]
    return describe_path(value) if isinstance(value, Path) else value


def describe_path(path: Any) -> Any:
    """Returns what lies at a path, for the identity of a run, which may move to another disk.

    A model's folder is described by its hash, a folder of tokens or votes and a file by the hash of
    their content, another folder by its name, and what is not there as it is written. Several paths
    are described one by one; '' and None are no paths.
    """
    if isinstance(path, tuple | list):
        return [describe_path(each) for each in path]
    if not path:
        return path
    place = os.path.expanduser(path)
    if os.path.isdir(place) and has_model(place):
        return model_hash(place)
    files = [place, *(os.path.join(place, name) for name in TOLD_BY)]
    if contents := [read_regular(file) for file in files if os.path.isfile(file)]:
        return hashlib.sha256(b"".join(contents)).hexdigest()
    # '.' has a name too.
    return os.path.basename(os.path.abspath(place)) if os.path.isdir(place) else str(path)


PATH = {"describe": describe_path}  # metadata of a dataclass's field that holds a path, or several


def _alone() -> ocp.options.MultiprocessingOptions:
    """For what this process reads or writes without the others: Orbax waits for none of them."""
    host = jax.process_index()
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    return ocp.options.MultiprocessingOptions(host, {host}, f"host{host}")


def has_model(directory: str | Path) -> bool:
    """Whether `directory`/model is there, whole."""
    return (Path(directory) / MODEL / MANIFEST).exists()


def beside(directory: str | Path, name: str) -> str:
    """Returns the folder of the model `name` that stands beside a model's folder, as a run has them.

    A folder may be given as '.', relative or by a symbolic link. Of a link both neighbourhoods are looked at, that of
    the link first. Where neither has the model, the one of the folder itself is returned, for an error that names it.
    """
    places = Path(os.path.abspath(directory)).parent, Path(directory).resolve().parent
    return str(
        next((place / name for place in places if has_model(place / name)), places[-1] / name)
    )


def _model_manifest(directory: Path) -> dict[str, Any]:
    """ValueError where it is damaged."""
    try:
        return unsealed(directory / MANIFEST, "if there", KIND)
    except ValueError as error:
        raise ValueError(f"{directory} is damaged: {error}; restore a copy") from error


def model_hash(directory: str | Path) -> str:
    """The content hash of the model in `directory`, from its manifest."""
    if not has_model(directory):
        raise FileNotFoundError(f"no checkpoint in {directory}: train it first, or mend the path")
    return _model_manifest(Path(directory) / MODEL)["hash"]


def check_name(name: str, where: str) -> str:
    """`name`; ValueError where it is not that of a file or a folder in `where`, but leads elsewhere."""
    if name in ("", ".", "..") or Path(name).name != name:
        raise ValueError(
            f"{where} names {name!r}, which would lead out of the folder: do not trust where it comes from"
        )
    return name


def save_model(
    directory: str | Path, config: Any, variables: Any, assets: dict[str, bytes] | None = None
) -> str:
    """Writes `directory`/model, whole or not at all, and returns its hash.

    All hosts call it, or the first alone inside `hosts.first_alone`. The first writes, and the others wait for it.
    """
    directory = Path(directory).absolute() / MODEL
    variables = sharding.fetch(
        variables
    )  # an array that remembers its mesh could not be read on another
    model_hash = content_hash(variables)

    def write() -> None:
        directory.parent.mkdir(parents=True, exist_ok=True)
        check_space(directory.parent, variables)
        partial, old = (
            directory.with_name(directory.name + ending) for ending in (".partial", ".old")
        )
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        partial.mkdir()
        with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as checkpointer:
            checkpointer.save(partial / "variables", variables)
        for name, content in (assets or {}).items():
            (partial / check_name(name, "an asset")).write_bytes(content)
        manifest = {
            "config": config_to_json(config),
            "hash": model_hash,
            "assets": sorted(assets or {}),
        }
        write_on_disk(partial / MANIFEST, sealed({**manifest, "files": described_files(partial)}))
        if (
            directory.exists()
        ):  # gone in one move: half a folder with a manifest would pass for a whole one
            directory.rename(old)
        partial.rename(directory)
        shutil.rmtree(old, ignore_errors=True)

    hosts.first_alone(write)()
    return model_hash


def load_description(directory: str | Path, config_class: type) -> Model:
    """Reads `directory`/model without its weights, for a planner; errors as of `load_model`."""
    directory = Path(directory).absolute() / MODEL
    manifest, config = _manifest_and_config(directory, config_class)
    assets = {name: _asset(directory, name) for name in manifest["assets"]}
    return Model(config, {}, manifest["hash"], assets)


def _manifest_and_config(directory: Path, config_class: type) -> tuple[dict[str, Any], Any]:
    if not (directory / MANIFEST).exists():
        raise FileNotFoundError(
            f"no {config_class.__name__} checkpoint in {directory}: train it first, or mend the path"
        )
    manifest = _model_manifest(directory)
    return manifest, config_from_json(config_class, manifest["config"], str(directory))


def load_model(directory: str | Path, config_class: type) -> Model:
    """Reads `directory`/model; any host may, without the others.

    Raises FileNotFoundError where there is none, ValueError where it holds another kind of model or a file of it is not
    the one that was saved.
    """
    directory = Path(directory).absolute() / MODEL
    manifest, config = _manifest_and_config(directory, config_class)
    if wrong := damage(directory, manifest.get("files", {}), more=True):
        raise ValueError(f"{directory} is damaged: {wrong}; restore a copy")
    with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as checkpointer:
        try:
            variables = checkpointer.restore(directory / "variables")
        except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
            reason = (str(error) or type(error).__name__).splitlines()[0][:200]
            raise ValueError(
                f"{directory} is damaged: its arrays cannot be read ({reason}); restore a copy"
            ) from error
    found = content_hash(variables)
    if found != manifest["hash"]:
        raise ValueError(
            f"{directory} is damaged: its arrays hash to {found[:12]}, not {manifest['hash'][:12]}; restore a copy"
        )
    assets = {name: _asset(directory, name) for name in manifest["assets"]}
    return Model(config, variables, manifest["hash"], assets)


def _asset(directory: Path, name: str) -> bytes:
    try:
        return read_regular(directory / check_name(name, str(directory)))
    except FileNotFoundError as error:
        told = f"{directory} is damaged: its asset {name} is missing; restore a copy"
        raise ValueError(told) from error
