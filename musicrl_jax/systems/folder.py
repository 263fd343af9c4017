"""A system on disk: one folder with a `system.json` that lists its kind and its parts.

    {"format": 1, "kind": "musiclm",
     "parts": {"policy": {"folder": ".", "hash": "1f0a..."},
               "mulan": {"folder": "../mulan", "hash": "77c2..."}, ...}}

The folder of a part is relative to the system's. A finetuned system stores its policy and refers to
the frozen parts. Older versions wrote no `system.json`: there, a system is the folder of a MusicLM
policy, and the other parts are in folders beside it.
"""

import dataclasses
import json
import os
import pkgutil
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
LAST = "last"  # folder in a finetuned system's: the last policy, if an earlier one was chosen
FORMAT = 1
KIND = {"format": int, "kind": str, "parts": {str: {"folder": str, "hash": str}}}
KINDS: dict[str, str | type[MusicSystem]] = {
    "musiclm": "musicrl_jax.systems.musiclm:MusicLMSystem",
    "tiny": "musicrl_jax.systems.tiny:TinySystem",
}
# The names of older versions for the folders beside a policy's, by part.
BESIDE = {"soundstorm": "fine", "soundstream": "codec", "mulan": "mulan", "semantic": "semantic"}


@dataclasses.dataclass(frozen=True)
class LoadedSystem:
    """A system with its weights. The fields from `policy` on are empty if that part is not loaded.

    Attributes:
      kind: name of the system's kind.
      system: the model, without weights.
      frozen: variables of the loaded parts but the policy, by name.
      hashes: content hash of each loaded part.
      folders: folder of each part, loaded or not.
      policy: weights of the policy, or their shapes.
      lineage: hashes of the models that define the policy's tokens, by name.
      clip_seconds: length of the clips that the policy was trained on, if it is recorded.
      config: the policy's config.
      assets: files in the policy's folder, by name.
    """

    kind: str
    system: MusicSystem
    frozen: dict[str, Tree]
    hashes: dict[str, str]
    folders: dict[str, str]
    policy: Tree = None
    lineage: dict[str, str] = dataclasses.field(default_factory=dict)
    clip_seconds: float | None = None
    config: Any = None
    assets: Mapping[str, bytes] = dataclasses.field(default_factory=dict)


# --- kinds ---


def register(kind: str) -> Callable[[type[MusicSystem]], type[MusicSystem]]:
    """Returns a decorator that registers a system's class; a gin file imports its module."""

    def add(system: type[MusicSystem]) -> type[MusicSystem]:
        KINDS[kind] = system
        return system

    return add


def system_class(kind: str, where: str) -> type[MusicSystem]:
    """Returns the class of a kind; raises ValueError, with `where`, if it is not registered."""
    if kind not in KINDS:
        raise ValueError(
            f"{where} is a system of kind {kind!r}, which is none of {', '.join(sorted(KINDS))}: "
            "import the module that registers it in the gin file"
        )
    if isinstance(KINDS[kind], str):
        KINDS[kind] = pkgutil.resolve_name(KINDS[kind])
    return KINDS[kind]


# --- loading ---


def load(
    folder: str,
    parts: Sequence[str] | None = None,
    read: checkpoint.Reader = checkpoint.load_model,
    described: Mapping[str, Any] | None = None,
) -> LoadedSystem:
    """Loads a system.

    Args:
      folder: folder of the system.
      parts: names of the parts to load; by default `MusicSystem.PLAYING`.
      read: function that loads a part's folder.
      described: content of the system.json, if the planner knows it before it is written.

    Raises:
      ValueError: if parts do not belong together or are not those of the system.json.
      FileNotFoundError: if a part is missing.
    """
    # The models.
    described = described or describe(folder)
    kind = system_class(described["kind"], folder)
    names = kind.PLAYING if parts is None else parts
    models = {name: read_part(folder, name, read, described) for name in names}
    try:
        system = kind.from_models(models)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    loaded = LoadedSystem(
        kind=described["kind"],
        system=system,
        frozen={name: model.variables for name, model in models.items() if name != "policy"},
        hashes={name: model.hash for name, model in models.items()},
        folders={name: part["folder"] for name, part in described["parts"].items()},
    )

    # The policy, with its history.
    if "policy" not in models:
        return loaded
    policy = models["policy"]
    return dataclasses.replace(
        loaded,
        policy=_restored(system, policy.variables),
        lineage=policy.json_asset(checkpoint.LINEAGE, {str: str}, default={}),
        clip_seconds=_trained_seconds(loaded.folders["policy"], policy),
        config=policy.config,
        assets=policy.assets,
    )


def read_part(
    folder: str,
    name: str,
    read: checkpoint.Reader = checkpoint.load_model,
    described: Mapping[str, Any] | None = None,
) -> checkpoint.Model:
    """Loads one part of a system; see `load` for arguments and errors."""
    described = described or describe(folder)
    parts = described["parts"]
    if name not in parts:
        raise ValueError(
            f"{folder} has no part {name!r}, only {', '.join(parts)}: add its folder with "
            "`musicrl assemble`"
        )
    part, recorded = parts[name]["folder"], parts[name]["hash"]
    model = read(part, system_class(described["kind"], folder).PARTS[name])
    if recorded and model.hash != recorded:
        raise ValueError(
            f"{folder}: the part {name} in {part} is {model.hash[:12]}, not {recorded[:12]}: "
            "restore it, or assemble the system again"
        )
    return model


# --- the policy alone ---


def read_policy(folder: str, read: checkpoint.Reader = checkpoint.load_model) -> checkpoint.Model:
    """Loads the policy of a system alone."""
    return read_part(folder, "policy", read, _policy_alone(folder))


def policy_hash(folder: str) -> str:
    """Returns the content hash of a system's policy, without reading its weights."""
    policy = _policy_alone(folder)["parts"]["policy"]
    return policy["hash"] or checkpoint.model_hash(policy["folder"])


def describe_policy(folder: str) -> str:
    """Returns the hash of a system's policy, or a description of its folder if it has no hash."""
    policy = _policy_alone(folder)["parts"]["policy"]
    return policy["hash"] or checkpoint.describe_path(policy["folder"])


POLICY = {"describe": describe_policy}  # metadata of config fields that name a policy's system


def _policy_alone(folder: str) -> dict[str, Any]:
    """Describes a system; without a system.json, a policy's folder, which may not exist yet."""
    if folder and (Path(folder) / FILE).is_file():
        return describe(folder)
    return {"kind": "musiclm", "parts": {"policy": {"folder": folder, "hash": ""}}}


# --- describing ---


def encoding_parts(folder: str) -> tuple[str, ...]:
    """Returns the parts that turn sound into tokens; raises ValueError if the system cannot."""
    kind = describe(folder)["kind"]
    if not (parts := system_class(kind, folder).ENCODING):
        raise ValueError(
            f"{folder} is of kind {kind!r}, which cannot encode sound: name another system"
        )
    return parts


def _restored(system: MusicSystem, variables: Tree) -> Tree:
    """Returns the policy's weights, or their shapes if the planner's reader returned shapes."""
    if all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(variables)):
        return jax.eval_shape(system.restored, variables)
    return system.restored(variables)


def describe(folder: str) -> dict[str, Any]:
    """Returns the content of a system.json with absolute folders, or the same for an older policy.

    Raises FileNotFoundError if there is no system, and ValueError if the file is damaged.
    """
    path = Path(folder) / FILE
    if path.is_file():
        described = read_json(path, KIND, "restore a copy, or assemble the system again")
        if described["format"] != FORMAT:
            raise ValueError(
                f"{path} has format {described['format']}, not {FORMAT}: update musicrl-jax"
            )
        for part in described["parts"].values():
            # `write` made them relative to the real folder, not to a link to it.
            part["folder"] = os.path.normpath(Path(os.path.realpath(folder)) / part["folder"])
        return described
    if not checkpoint.has_model(folder):
        raise FileNotFoundError(
            f"no system in {folder}: name a folder with a {FILE}, or the folder of a policy"
        )
    return describe_neighbours(folder, checkpoint.beside)


def describe_neighbours(folder: str, beside: Callable[[str, str], str]) -> dict[str, Any]:
    """Describes a MusicLM of an older version, whose other parts lie beside the policy.

    `beside(folder, name)` finds the folder of a part.
    """
    parts = {"policy": {"folder": str(folder), "hash": ""}}
    for name, neighbour in BESIDE.items():
        parts[name] = {"folder": beside(folder, neighbour), "hash": ""}
    return {"format": FORMAT, "kind": "musiclm", "parts": parts}


# --- writing ---


def write(
    folder: str | Path,
    kind: str,
    parts: Mapping[str, str],
    hashes: Mapping[str, str] = types.MappingProxyType({}),
) -> bool:
    """Writes a system.json with relative folders and content hashes of the parts.

    All hosts call it, or the first alone inside `hosts.first_alone`. Returns False if the file
    already has this content.

    Args:
      folder: folder of the system.
      kind: kind of the system.
      parts: folder of each part, by name.
      hashes: content hashes of parts that are not written yet.

    Raises:
      FileNotFoundError: if a part is missing.
    """
    start = os.path.realpath(folder)
    # Relative folders, so that a run can move with its models.
    described = {}
    for name, part in sorted(parts.items()):
        described[name] = {
            "folder": os.path.relpath(os.path.realpath(part), start),
            "hash": hashes.get(name) or checkpoint.model_hash(part),
        }

    text = json.dumps({"format": FORMAT, "kind": kind, "parts": described}, indent=1) + "\n"
    path = Path(folder) / FILE

    # The first host writes the file; all hosts return its answer.
    def write_file() -> bool:
        if path.is_file() and path.read_bytes() == text.encode():
            return False
        write_text(path, text)
        return True

    return hosts.first_decides(write_file)


def save_policy(
    directory: str | Path, loaded: LoadedSystem, policy: Tree, assets: Mapping[str, bytes]
) -> None:
    """Writes a finetuned policy, and a system.json that refers to the frozen parts.

    Args:
      directory: folder of the new system.
      loaded: the base system.
      policy: the new weights, on the host.
      assets: files to store with the policy; its lineage is added.
    """
    assets = {checkpoint.LINEAGE: json.dumps(loaded.lineage).encode(), **assets}
    variables = loaded.system.stored(policy)
    parts = {name: part for name, part in loaded.folders.items() if checkpoint.has_model(part)}
    hashes = {"policy": checkpoint.content_hash(variables)}
    # The model comes last: it marks the run as done.
    write(directory, loaded.kind, {**parts, "policy": str(directory)}, hashes)
    checkpoint.save_model(directory, loaded.config, variables, assets)


def _trained_seconds(folder: str, model: checkpoint.Model) -> float | None:
    """Returns the length of the clips that a policy was trained on; None if it is not recorded."""
    if checkpoint.CLIP in model.assets:
        return float(model.json_asset(checkpoint.CLIP, {"seconds": float})["seconds"])
    # Older versions recorded it only in the identity of the run.
    run = Path(folder) / CHECKPOINTS / RUN
    try:
        return float(unsealed(run, digest_required=False)["clip_seconds"])
    except (ValueError, KeyError, TypeError):
        return None
