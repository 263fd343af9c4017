"""Models and runs on disk, by Orbax.

A *model* folder is what other stages read: the weights, the config that rebuilds the module, a hash of the
content and any files that belong to it. A *run* folder holds the states of a training run, so that it can go on.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import typing
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from musicrl_jax.core.files import write_json

MANIFEST = "manifest.json"
MODEL = "model"
SAVE_MARGIN = 1.1  # the disk space asked for, over the bytes of the arrays
LINEAGE = "tokens.json"  # asset of a token model: which models wrote the tokens that it was trained on, {name: hash}
ANCHOR = "anchor.json"  # asset of a finetuned policy: its anchor's content hash, what its rewards declare, the alarm
TOLD_BY = (MANIFEST, "votes.jsonl")  # the files that say what a folder of tokens, or of votes on them, holds
NO_IDENTITY = {"identity": False}


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
        name: config_to_json(value) if dataclasses.is_dataclass(value) else json.loads(json.dumps(value))
        for name, value in values.items()
    }


def config_from_json(config_class: type, fields: dict[str, Any], where: str) -> Any:
    """The inverse, checked: ValueError where `fields` are those of another class or version."""
    fields = dict(fields)
    kind = fields.pop("kind", config_class.__name__)
    if kind != config_class.__name__:
        raise ValueError(f"{where} holds a {kind}, not a {config_class.__name__}: point to a checkpoint of that model")
    hints = typing.get_type_hints(config_class)
    known = {field.name for field in dataclasses.fields(config_class)}
    if set(fields) != known:
        raise ValueError(
            f"{where}: fields {sorted(set(fields) ^ known)} of {config_class.__name__} do not match this version"
        )
    values = {}
    for name, value in fields.items():
        if isinstance(value, dict):  # a config; of several that a field may hold, the one that is named
            choices = [choice for choice in (hints[name], *typing.get_args(hints[name])) if isinstance(choice, type)]
            named = [choice for choice in choices if choice.__name__ == value.get("kind")]
            value = config_from_json((named or choices)[0], value, where)
        elif isinstance(value, list):
            value = tuple(value)
        values[name] = value
    return config_class(**values)


def describe(value: Any) -> Any:
    """A setting as plain JSON, for the identity of a run: a model's folder, a folder of tokens or votes and a file by
    their content's hash, another folder by its name.

    A run may then move to another disk, and is another run where a model or a file that it builds on changed. A field
    of `field(metadata=NO_IDENTITY)`, such as a cache's folder, is left out.
    """
    if dataclasses.is_dataclass(value):
        told = [field.name for field in dataclasses.fields(value) if field.metadata != NO_IDENTITY]
        return {name: describe(getattr(value, name)) for name in told}
    if isinstance(value, dict):
        return {str(name): describe(part) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return [describe(part) for part in value]
    if isinstance(value, str | Path):
        path = os.path.expanduser(value)
        if os.path.isdir(path) and has_model(path):
            return model_hash(path)
        files = [path, *(os.path.join(path, name) for name in TOLD_BY)]
        if told_by := [Path(file).read_bytes() for file in files if os.path.isfile(file)]:
            return hashlib.sha256(b"".join(told_by)).hexdigest()
        return Path(path).name if os.path.isdir(path) else str(value)
    return value


def check_space(directory: Path, tree: Any) -> None:
    """OSError, before anything is written, where `directory` has no room for the arrays of `tree`."""
    needed = int(SAVE_MARGIN * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(
            f"no space to save in {directory}: {needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free; "
            f"free some or choose another MODEL_DIR. What was saved before is whole."
        )


def has_model(directory: str | Path) -> bool:
    """Whether `directory`/model is there, whole."""
    return (Path(directory) / MODEL / MANIFEST).exists()


def model_hash(directory: str | Path) -> str:
    """The content hash of the model in `directory`, from its manifest."""
    path = Path(directory) / MODEL / MANIFEST
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint in {directory}: train it first, or mend the path")
    return json.loads(path.read_text())["hash"]


def save_model(directory: str | Path, config: Any, variables: Any, assets: dict[str, bytes] | None = None) -> str:
    """Writes `directory`/model, whole or not at all, and returns its hash."""
    directory = Path(directory).absolute() / MODEL
    directory.parent.mkdir(parents=True, exist_ok=True)
    variables = jax.device_get(variables)  # an array that remembers its mesh could not be read on another
    check_space(directory.parent, variables)
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(partial / "variables", variables)
    for name, content in (assets or {}).items():
        (partial / name).write_bytes(content)
    model_hash = content_hash(variables)
    manifest = {"config": config_to_json(config), "hash": model_hash, "assets": sorted(assets or {})}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
    return model_hash


def load_model(directory: str | Path, config_class: type) -> Model:
    """Reads `directory`/model.

    Raises FileNotFoundError where there is none, ValueError where it holds another kind of model or its arrays are not
    the ones that were saved.
    """
    directory = Path(directory).absolute() / MODEL
    if not (directory / MANIFEST).exists():
        raise FileNotFoundError(
            f"no {config_class.__name__} checkpoint in {directory}: train it first, or mend the path"
        )
    manifest = json.loads((directory / MANIFEST).read_text())
    config = config_from_json(config_class, manifest["config"], str(directory))
    with ocp.StandardCheckpointer() as checkpointer:
        variables = checkpointer.restore(directory / "variables")
    found = content_hash(variables)
    if found != manifest["hash"]:
        raise ValueError(
            f"{directory} is damaged: its arrays hash to {found[:12]}, not {manifest['hash'][:12]}; restore a copy"
        )
    assets = {name: (directory / name).read_bytes() for name in manifest["assets"]}
    return Model(config, variables, manifest["hash"], assets)


class RunCheckpoints:
    """The states of one training run, the newest kept, under `directory`/checkpoints.

    `identity` says what run this is (configs, sizes, hashes); a folder that holds another run's states or model is
    refused. A run that was refused before its first state leaves nothing that binds the next.
    """

    def __init__(self, directory: str | Path, identity: dict[str, Any]):
        self._directory = Path(directory).absolute() / "checkpoints"
        self._directory.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            self._directory, options=ocp.CheckpointManagerOptions(max_to_keep=1, create=False)
        )
        identity = json.loads(json.dumps(identity))
        path = self._directory / "run.json"
        if path.exists() and (self.latest_step() or has_model(directory)):
            _check_identity(json.loads(path.read_text()), identity, self._directory)
        else:
            write_json(path, identity)

    def latest_step(self) -> int:
        """The step of the newest state, or 0 where there is none."""
        return self._manager.latest_step() or 0

    def save(self, step: int, tree: Any) -> None:
        """Writes the state of `step` in the background; the newest one becomes `latest_step` once it is whole."""
        check_space(self._directory, tree)
        self._manager.save(step, args=ocp.args.StandardSave(tree))

    def restore(self, tree: Any) -> Any:
        """The newest state, with the shapes, dtypes and shardings of `tree`, bit-equal to what was saved."""
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
        return self._manager.restore(self.latest_step(), args=ocp.args.StandardRestore(abstract))

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()


def _check_identity(saved: Any, wanted: Any, where: Path, field: str = "") -> None:
    """ValueError at the first field that differs."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        for name in sorted(set(saved) | set(wanted)):
            _check_identity(saved.get(name), wanted.get(name), where, f"{field}.{name}" if field else name)
    elif saved != wanted:
        raise ValueError(
            f"{where} holds another run: {field} is {saved!r} there and {wanted!r} here; "
            f"choose a new MODEL_DIR or give the old value"
        )
