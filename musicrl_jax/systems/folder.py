"""A system on disk: one folder with a `system.json` that names its kind and its parts.

    {"format": 1, "kind": "musiclm",
     "parts": {"policy": {"folder": ".", "hash": "1f0a..."},
               "mulan": {"folder": "../mulan", "hash": "77c2..."}, ...}}

A part is the folder of a model, relative to the system's. A finetuned policy stores its own weights
and refers to the frozen parts. A policy's folder without a `system.json`, as older versions wrote
it, is a MusicLM whose other parts stand beside it.
"""

import dataclasses
import importlib
import json
import os
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from musicrl_jax.core import checkpoint, hosts
from musicrl_jax.core.files import read_json, write_text
from musicrl_jax.core.manifest import unsealed
from musicrl_jax.core.run_checkpoints import CHECKPOINTS, RUN
from musicrl_jax.systems.system import MusicSystem, Tree

FILE = "system.json"
LAST = "last"  # in a finetuned system's folder: its last policy, if the judge keeps an earlier one
FORMAT = 1
KIND = {
    "format": int,
    "kind": str,
    "parts": {str: {"folder": str, "hash": str}},
}
KINDS: dict[str, str | type[MusicSystem]] = {
    "musiclm": "musicrl_jax.systems.musiclm:MusicLMSystem",
    "tiny": "musicrl_jax.systems.tiny:TinySystem",
}
# The folders that stood beside a policy's before there was a system.json.
BESIDE = {"soundstorm": "fine", "soundstream": "codec", "mulan": "mulan", "semantic": "semantic"}


@dataclasses.dataclass(frozen=True)
class LoadedSystem:
    """A system, its weights and what came with them.

    Attributes:
      kind: name of the system's kind.
      system: the model, without weights.
      policy: weights of the policy, or shapes; None if only parts for encoding were loaded.
      frozen: variables of the other parts, by name.
      hashes: content hash of each part.
      folders: folder of each part that is known, loaded or not.
      lineage: hashes of the models whose tokens the policy speaks, by name.
      clip_seconds: length of the clips that the policy was trained on; None if it is not recorded.
      config: the policy's config.
      assets: files that came with the policy.
    """

    kind: str
    system: MusicSystem
    policy: Tree
    frozen: dict[str, Tree]
    hashes: dict[str, str]
    folders: dict[str, str]
    lineage: dict[str, str]
    clip_seconds: float | None
    config: Any
    assets: Mapping[str, bytes] = dataclasses.field(default_factory=dict)


def register(kind: str) -> Callable[[type[MusicSystem]], type[MusicSystem]]:
    """Returns a decorator that makes a system known by its kind; a gin file imports its module."""

    def known(system: type[MusicSystem]) -> type[MusicSystem]:
        KINDS[kind] = system
        return system

    return known


def system_class(kind: str, where: str) -> type[MusicSystem]:
    """Returns the class of a kind; ValueError if it is not registered."""
    if kind not in KINDS:
        raise ValueError(
            f"{where} is a system of kind {kind!r}, which is none of {', '.join(sorted(KINDS))}: "
            "import the module that registers it in the gin file"
        )
    place = KINDS[kind]
    if isinstance(place, str):
        module, _, name = place.partition(":")
        place = KINDS[kind] = getattr(importlib.import_module(module), name)
    return place


def load(
    folder: str,
    parts: Sequence[str] | None = None,
    read: checkpoint.Reader = checkpoint.load_model,
    described: Mapping[str, Any] | None = None,
) -> LoadedSystem:
    """Reads a system.

    Args:
      folder: of the system.
      parts: names of the parts to read; by default those that play, see `MusicSystem.PLAYING`.
      read: reads a part's folder.
      described: what `describe` would return, for a planner's folders that are not there.

    Raises:
      ValueError: by name of the field, if parts do not fit or are not those that are described.
      FileNotFoundError: if one is missing.
    """
    described = described or describe(folder)
    kind = system_class(described["kind"], folder)
    wanted = kind.PLAYING if parts is None else parts
    known = described["parts"]
    models = {name: read_part(folder, name, read, described) for name in wanted}
    try:
        system = kind.from_models(models)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    policy = models.get("policy")
    return LoadedSystem(
        described["kind"],
        system,
        None if policy is None else _restored(system, policy.variables),
        {name: model.variables for name, model in models.items() if name != "policy"},
        {name: model.hash for name, model in models.items()},
        {name: part["folder"] for name, part in known.items()},
        {} if policy is None else policy.json_asset(checkpoint.LINEAGE, {str: str}, default={}),
        None if policy is None else _trained_seconds(known["policy"]["folder"], policy),
        None if policy is None else policy.config,
        {} if policy is None else policy.assets,
    )


def read_part(
    folder: str,
    name: str,
    read: checkpoint.Reader = checkpoint.load_model,
    described: Mapping[str, Any] | None = None,
) -> checkpoint.Model:
    """Reads one part of a system; arguments and errors are those of `load`."""
    described = described or describe(folder)
    known = described["parts"]
    if name not in known:
        raise ValueError(
            f"{folder} has no part {name!r}, only {', '.join(known)}: add its folder with "
            "`musicrl assemble`"
        )
    part, recorded = known[name]["folder"], known[name]["hash"]
    model = read(part, system_class(described["kind"], folder).PARTS[name])
    if recorded and model.hash != recorded:
        raise ValueError(
            f"{folder}: the part {name} in {part} is {model.hash[:12]}, not {recorded[:12]}: "
            "restore it, or assemble the system again"
        )
    return model


def read_policy(folder: str, read: checkpoint.Reader = checkpoint.load_model) -> checkpoint.Model:
    """Reads the policy of a system, for those who need nothing else of it."""
    return read_part(folder, "policy", read, _policy_alone(folder))


def policy_hash(folder: str) -> str:
    """Returns the content hash of a system's policy, without reading its weights."""
    policy = _policy_alone(folder)["parts"]["policy"]
    return policy["hash"] or checkpoint.model_hash(policy["folder"])


def describe_policy(folder: str) -> str:
    """Returns what the policy of a system is, for the identity of a run that reads it alone."""
    policy = _policy_alone(folder)["parts"]["policy"]
    return policy["hash"] or checkpoint.describe_path(policy["folder"])


POLICY = {"describe": describe_policy}  # metadata of a field that holds such a folder


def _policy_alone(folder: str) -> dict[str, Any]:
    """Describes a system; a folder without a system.json as that of a policy, be it there or not."""
    if folder and (Path(folder) / FILE).is_file():
        return describe(folder)
    return {"kind": "musiclm", "parts": {"policy": {"folder": folder, "hash": ""}}}


def encoding_parts(folder: str) -> tuple[str, ...]:
    """Returns the parts that make tokens from sound; ValueError if the system cannot."""
    described = describe(folder)
    kind = described["kind"]
    if not (parts := system_class(kind, folder).ENCODING):
        raise ValueError(
            f"{folder} is of kind {kind!r}, which cannot encode sound: name another system"
        )
    return parts


def _restored(system: MusicSystem, variables: Tree) -> Tree:
    """Returns the policy's weights, or their shapes if a planner's reader gave shapes."""
    if all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(variables)):
        return jax.eval_shape(system.restored, variables)
    return system.restored(variables)


def describe(folder: str) -> dict[str, Any]:
    """Returns a system.json's content with absolute folders; a policy's folder without one too.

    Raises FileNotFoundError if there is no system, ValueError if the file is damaged.
    """
    path = Path(folder) / FILE
    if path.is_file():
        described = read_json(path, KIND, "restore a copy, or assemble the system again")
        if described["format"] != FORMAT:
            raise ValueError(
                f"{path} has format {described['format']}, not {FORMAT}: update musicrl-jax"
            )
        for part in described["parts"].values():
            # As they were written: relative to where the folder really is.
            part["folder"] = os.path.normpath(Path(os.path.realpath(folder)) / part["folder"])
        return described
    if not checkpoint.has_model(folder):
        raise FileNotFoundError(
            f"no system in {folder}: name a folder with a {FILE}, a policy's, or a run's finetuned one"
        )
    return describe_neighbours(folder, checkpoint.beside)


def describe_neighbours(folder: str, beside: Callable[[str, str], str]) -> dict[str, Any]:
    """Describes a MusicLM whose policy is in `folder` and whose other parts stand beside it.

    `beside(folder, name)` is the folder of the model `name`.
    """
    parts = {"policy": {"folder": str(folder), "hash": ""}}
    for name, neighbour in BESIDE.items():
        parts[name] = {"folder": beside(folder, neighbour), "hash": ""}
    return {"format": FORMAT, "kind": "musiclm", "parts": parts}


def write(
    folder: str | Path,
    kind: str,
    parts: Mapping[str, str],
    hashes: Mapping[str, str] = types.MappingProxyType({}),
) -> bool:
    """Writes a system.json that refers to the folders of parts, by relative paths and hashes.

    All hosts call it, or the first alone inside `hosts.first_alone`. An equal file is left alone;
    returns whether there was none.

    Args:
      folder: of the system.
      kind: of the system.
      parts: folder of each part, by name.
      hashes: content hash of parts that are not written yet; the others are read.

    Raises:
      FileNotFoundError: if a part is missing.
    """
    start = os.path.realpath(folder)
    described = {}
    for name, part in sorted(parts.items()):
        described[name] = {
            "folder": os.path.relpath(os.path.realpath(part), start),
            "hash": hashes.get(name) or checkpoint.model_hash(part),
        }

    text = json.dumps({"format": FORMAT, "kind": kind, "parts": described}, indent=1) + "\n"
    path = Path(folder) / FILE

    def write_file() -> bool:
        if path.is_file() and path.read_bytes() == text.encode():
            return False
        write_text(path, text)
        return True

    return hosts.first_decides(write_file)


def save_policy(
    directory: str | Path, loaded: LoadedSystem, policy: Tree, assets: Mapping[str, bytes]
) -> None:
    """Writes a finetuned policy and the system.json that joins it to the frozen parts.

    Args:
      directory: of the new system.
      loaded: the system that was finetuned.
      policy: its new weights, on the host.
      assets: files that travel with the policy; its lineage is added.
    """
    assets = {checkpoint.LINEAGE: json.dumps(loaded.lineage).encode(), **assets}
    variables = loaded.system.stored(policy)
    parts = {name: part for name, part in loaded.folders.items() if checkpoint.has_model(part)}
    hashes = {"policy": checkpoint.content_hash(variables)}
    # The model comes last: with it the run is done.
    write(directory, loaded.kind, {**parts, "policy": str(directory)}, hashes)
    checkpoint.save_model(directory, loaded.config, variables, assets)


def _trained_seconds(folder: str, model: checkpoint.Model) -> float | None:
    """Returns the length of the clips that a policy was trained on; None if nothing records it."""
    if checkpoint.CLIP in model.assets:
        return float(model.json_asset(checkpoint.CLIP, {"seconds": float})["seconds"])
    # An older finetuning recorded it in the identity of its run alone.
    run = Path(folder) / CHECKPOINTS / RUN
    try:
        return float(unsealed(run, digest_required=False)["clip_seconds"])
    except (ValueError, KeyError, TypeError):
        return None
