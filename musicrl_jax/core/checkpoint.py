"""Models on disk, by Orbax, and the description of settings that identifies a run.

A model's folder holds the weights, the config that rebuilds the module, a hash of the content and
assets: small files that belong to the model.
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
    error_context,
    read_regular,
    unsealed,
    write_manifest,
)

MODEL = "model"
# Assets of a token model: the models that wrote its training tokens, {name: hash}, and the length
# of its training clips, {"seconds": s}.
LINEAGE, CLIP = "tokens.json", "clip.json"
# Asset of a finetuned policy: its anchor's hash, the declarations of its rewards, the alarm.
ANCHOR = "anchor.json"
# Files whose hash describes a folder of tokens, or of votes on them.
DESCRIPTIONS = MANIFEST, "votes.jsonl"
# Fields of a model's manifest and their types; '?' marks optional ones.
KIND = {"config": {"kind?": str}, "hash": str, "assets": [str], "files?": FILES}
NO_IDENTITY = {"identity": False}  # metadata of a dataclass's field that `describe` omits

# Orbax logs errors, several times and with tracebacks, that it also raises.
logging.getLogger("absl").addFilter(
    lambda record: not (record.exc_info and "orbax" in record.pathname)
)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model read from disk.

    Attributes:
      config: the dataclass that rebuilds its module.
      variables: its weights and other collections.
      hash: the `content_hash` of the variables.
      assets: the content of its assets, by name.
    """

    config: Any
    variables: Any
    hash: str
    assets: dict[str, bytes]

    def json_asset(self, name: str, kind: Kind, default: Any = None) -> Any:
        """Returns an asset that is JSON, or the default if there is no such asset.

        Raises ValueError if it is damaged, is not of the kind (see `manifest.check_kind`), or is
        missing and has no default.
        """
        where = f"the {type(self.config).__name__} checkpoint {self.hash[:12]}"
        if name not in self.assets:
            if default is not None:
                return default
            raise ValueError(f"{where} has no {name}: train it again with this version")
        remedy = "train it again, or restore a copy"
        return json_from(self.assets[name], f"{name} of {where}", kind, remedy)


Reader = Callable[[str | Path, type], Model]  # `load_model`, or a planner's that reads only shapes


# --- Hashes and configs. ---


def content_hash(tree: Any) -> str:
    """Returns the sha256, in hex, over path, dtype, shape and bytes of every array of a tree."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def config_to_json(config: Any) -> dict[str, Any]:
    """Returns a config dataclass as plain JSON, with its class's name under 'kind'."""
    content = {"kind": type(config).__name__}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        is_config = dataclasses.is_dataclass(value)
        content[field.name] = config_to_json(value) if is_config else json.loads(json.dumps(value))
    return content


def config_from_json(config_class: type, fields: dict[str, Any], where: str) -> Any:
    """Returns the config that `config_to_json` gave, checked.

    Raises ValueError if `fields` belong to another class or version, or have other types.
    """
    name, fields = config_class.__name__, dict(fields)
    kind = fields.pop("kind", name)
    if kind != name:
        raise ValueError(
            f"{where} holds a {kind}, not a {name}: point to a checkpoint of that model"
        )
    # All fields of this version, and no others.
    hints = typing.get_type_hints(config_class)
    known = {field.name for field in dataclasses.fields(config_class)}
    if changed := sorted(set(fields) ^ known):
        raise ValueError(f"{where}: fields {changed} of {name} do not match this version")
    # The fields, and the checks of the class itself.
    values = {
        field: _field_from_json(hints[field], value, f"{name}.{field}", where)
        for field, value in fields.items()
    }
    try:
        return config_class(**values)
    except (TypeError, ZeroDivisionError, OverflowError) as error:
        # From a check in __post_init__ that expects sensible numbers.
        raise ValueError(f"{where}: the fields of {name} do not go together ({error})") from error


def _field_from_json(hint: Any, value: Any, field: str, where: str) -> Any:
    """Returns a field's value. Raises ValueError if its type does not match the annotation."""
    # A nested config. If the field allows several classes, value['kind'] names one.
    choices = [choice for choice in (hint, *typing.get_args(hint)) if isinstance(choice, type)]
    configs = [choice for choice in choices if dataclasses.is_dataclass(choice)]
    if isinstance(value, dict) and configs:
        named = [choice for choice in configs if choice.__name__ == value.get("kind")]
        return config_from_json((named or configs)[0], value, where)

    # A tuple, which JSON has as a list.
    if isinstance(value, list) and typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        return tuple(
            _field_from_json(inner, part, f"{field}[{i}]", where) for i, part in enumerate(value)
        )
    if isinstance(value, list) and hint in (Any, tuple):
        return tuple(value)

    # A plain value.
    is_any = hint is Any or not choices
    if typing.get_origin(hint) is not tuple and (is_any or _is_instance(value, choices)):
        return value
    name = hint.__name__ if isinstance(hint, type) else str(hint)
    words = f"{json.dumps(value)[:60]}, which is no {name}"
    raise ValueError(f"{where}: {field} is {words}: restore a copy")


def _is_instance(value: Any, choices: list[type]) -> bool:
    """Returns whether a JSON value has one of the types. 3 may be a float, and gin's 1e3 an int."""
    if value is None or isinstance(value, bool):
        return type(value) in choices
    if isinstance(value, float) and value.is_integer():
        return int in choices or float in choices
    return isinstance(value, (*choices, *((int,) if float in choices else ())))


# --- Settings in the identity of a run. ---


def describe(value: Any) -> Any:
    """Returns a setting as plain JSON, for the identity of a run.

    A str stays text, even if a file of that name exists. Only values of the type Path, and
    dataclass fields with `field(metadata=PATH)`, are described by `describe_path`. Fields with
    `field(metadata=NO_IDENTITY)`, such as a cache's folder, are omitted. The description of a
    `HashedData` has its fields and, if it has hashes, these under CONTENT.
    """
    if dataclasses.is_dataclass(value):
        described = {}
        for field in dataclasses.fields(value):
            if field.metadata != NO_IDENTITY:
                describe_field = field.metadata.get("describe", describe)
                described[field.name] = describe_field(getattr(value, field.name))
        hashes = value.content_hashes() if isinstance(value, HashedData) else {}
        return described | ({CONTENT: hashes} if hashes else {})

    # Containers, and paths.
    if isinstance(value, dict):
        return {str(name): describe(part) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return [describe(part) for part in value]
    return describe_path(value) if isinstance(value, Path) else value


def describe_path(path: Any) -> Any:
    """Returns a description of the content at a path, for the identity of a run that may move.

    It is the hash of a model's folder, the hash of the content of a file or of a folder of tokens
    or votes, the name of any other folder, and the path itself if nothing is there. Several paths
    are described one by one; '' and None stay as they are.
    """
    if isinstance(path, tuple | list):
        return [describe_path(each) for each in path]
    if not path:
        return path
    place = os.path.expanduser(path)
    if os.path.isdir(place) and has_model(place):
        return model_hash(place)
    files = [place, *(os.path.join(place, name) for name in DESCRIPTIONS)]
    if contents := [read_regular(file) for file in files if os.path.isfile(file)]:
        return hashlib.sha256(b"".join(contents)).hexdigest()
    # abspath, because '.' needs a name too.
    return os.path.basename(os.path.abspath(place)) if os.path.isdir(place) else str(path)


PATH = {"describe": describe_path}  # metadata of a dataclass's field that holds a path, or several


# --- Models. ---


def has_model(directory: str | Path) -> bool:
    """Returns whether `directory`/model is there, whole."""
    return (Path(directory) / MODEL / MANIFEST).exists()


def beside(directory: str | Path, name: str) -> str:
    """Returns the folder of the model `name` beside a model's folder, as in the folder of a run.

    The folder may be '.', relative or a symbolic link. Beside a link, the link's parent is searched
    first and the target's second. If neither has the model, the latter's path is returned, for an
    error that names it.
    """
    parents = Path(os.path.abspath(directory)).parent, Path(directory).resolve().parent
    for parent in parents:
        if has_model(parent / name):
            return str(parent / name)
    return str(parents[-1] / name)


def _model_manifest(directory: Path) -> dict[str, Any]:
    """Reads a model's manifest. Raises ValueError if it is damaged."""
    with error_context(f"{directory} is damaged: ", "; restore a copy"):
        return unsealed(directory / MANIFEST, KIND, digest_required=False)


def model_hash(directory: str | Path) -> str:
    """Returns the content hash of the model in `directory`, from its manifest."""
    if not has_model(directory):
        raise FileNotFoundError(f"no checkpoint in {directory}: train it first, or mend the path")
    return _model_manifest(Path(directory) / MODEL)["hash"]


def check_name(name: str, where: str) -> str:
    """Returns `name`. Raises ValueError if it is a path that leads out of its folder."""
    if name in ("", ".", "..") or Path(name).name != name:
        raise ValueError(
            f"{where} names {name!r}, which would lead out of the folder: do not trust its source"
        )
    return name


def _checkpointer() -> ocp.StandardCheckpointer:
    """Returns a checkpointer for this process alone, in which Orbax waits for no other process."""
    host = jax.process_index()
    options = ocp.options.MultiprocessingOptions()
    if jax.process_count() > 1:
        options = ocp.options.MultiprocessingOptions(host, {host}, f"host{host}")
    return ocp.StandardCheckpointer(multiprocessing_options=options)


def save_model(
    directory: str | Path, config: Any, variables: Any, assets: dict[str, bytes] | None = None
) -> str:
    """Writes `directory`/model, whole or not at all, and returns its hash.

    All hosts call it, or only the first inside `hosts.first_alone`. The first writes, and the
    others wait.
    """
    directory, assets = Path(directory).absolute() / MODEL, assets or {}
    # As NumPy arrays, since an array that remembers its mesh could not be read on another.
    variables = sharding.fetch(variables)
    model_hash = content_hash(variables)

    def write() -> None:
        # A new folder beside the model.
        directory.parent.mkdir(parents=True, exist_ok=True)
        check_space(directory.parent, variables)
        partial, old = directory.with_suffix(".partial"), directory.with_suffix(".old")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        partial.mkdir()
        with _checkpointer() as checkpointer:
            checkpointer.save(partial / "variables", variables)
        for name, content in assets.items():
            (partial / check_name(name, "an asset")).write_bytes(content)
        manifest = {"config": config_to_json(config), "hash": model_hash, "assets": sorted(assets)}
        write_manifest(partial, manifest)

        # The old model is moved away first: half of it with a manifest would look whole.
        if directory.exists():
            directory.rename(old)
        partial.rename(directory)
        shutil.rmtree(old, ignore_errors=True)

    hosts.first_alone(write)()
    return model_hash


def load_description(directory: str | Path, config_class: type) -> Model:
    """Reads `directory`/model without its weights, for a planner. Raises as `load_model` does."""
    return _description(Path(directory).absolute() / MODEL, config_class)[0]


def _description(directory: Path, config_class: type) -> tuple[Model, dict[str, list[Any]]]:
    """Reads a model's config and assets, but no weights; also returns its list of files."""
    if not (directory / MANIFEST).exists():
        name = config_class.__name__
        raise FileNotFoundError(
            f"no {name} checkpoint in {directory}: train it first, or mend the path"
        )
    manifest = _model_manifest(directory)
    config, assets = config_from_json(config_class, manifest["config"], str(directory)), {}
    for name in manifest["assets"]:
        try:
            assets[name] = read_regular(directory / check_name(name, str(directory)))
        except FileNotFoundError as error:
            words = f"{directory} is damaged: its asset {name} is missing; restore a copy"
            raise ValueError(words) from error
    return Model(config, {}, manifest["hash"], assets), manifest.get("files", {})


def load_model(directory: str | Path, config_class: type) -> Model:
    """Reads `directory`/model; each host on its own.

    Raises FileNotFoundError if there is none, ValueError if it holds another kind of model or one
    of its files is not the one that was saved.
    """
    directory = Path(directory).absolute() / MODEL
    model, files = _description(directory, config_class)
    # Every file is the one that was saved.
    if fault := damage(directory, files, more=True):
        raise ValueError(f"{directory} is damaged: {fault}; restore a copy")
    with _checkpointer() as checkpointer:
        try:
            variables = checkpointer.restore(directory / "variables")
        except Exception as error:  # Orbax and TensorStore raise many types for damaged files
            reason = (str(error) or type(error).__name__).splitlines()[0][:200]
            raise ValueError(
                f"{directory} is damaged: its arrays cannot be read ({reason}); restore a copy"
            ) from error
    # A model of an older version has no list of files, but a hash of its arrays.
    if (actual := content_hash(variables)) != model.hash:
        raise ValueError(
            f"{directory} is damaged: its arrays hash to {actual[:12]}, not {model.hash[:12]}; "
            "restore a copy"
        )
    return dataclasses.replace(model, variables=variables)
