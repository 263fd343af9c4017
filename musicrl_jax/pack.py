"""The models of a run as small files that can be shipped, and back.

A packed model is one safetensors file: its arrays by their path ("params/trunk/begin"; the names are in the card of
`data/pretrained/demo`), in half precision or as they are, and in the header the config that rebuilds the module and the
files that belong to it. Rounded weights are other weights: a packed model has a hash of its own, and where it was
trained on, from or with another model of the pack it names that one's.

Towers that were fetched stay out; whoever unpacks fetches them too.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from musicrl_jax.core import checkpoint, hosts, lock, shipped, tensors
from musicrl_jax.core.files import json_from, read_json, write_json
from musicrl_jax.core.manifest import MANIFEST, read_regular
from musicrl_jax.models.mulan import MuLanConfig
from musicrl_jax.models.musiclm import MusicLMConfig
from musicrl_jax.models.rewards import PreferenceConfig, QualityConfig
from musicrl_jax.models.semantic import SemanticConfig
from musicrl_jax.models.soundstorm import SoundStormConfig
from musicrl_jax.models.soundstream import SoundStreamConfig
from musicrl_jax.objectives.mulan import VOCABULARY
from musicrl_jax.objectives.mulan_projections import PretrainedTowers

KINDS = {
    kind.__name__: kind
    for kind in (
        SoundStreamConfig,
        SemanticConfig,
        MuLanConfig,
        QualityConfig,
        MusicLMConfig,
        SoundStormConfig,
        PreferenceConfig,
    )
}
INDEX = "models.json"
HEADER, FORMAT = "musicrl", "musicrl-jax 1"
LARGEST = 6e4  # what half precision holds
# Packs of older versions, as those that ship, have no shapes and orders.
HEADER_KIND = {"config": dict, "shapes?": {str: str}, "orders?": dict, "assets": {str: str}}
TOWERS = "params/towers/"
RESTORE = "restore the pack"


@lock.holds("out")
def pack(
    models: Mapping[str, str],
    out: str,
    audio_weights: str = "",
    text_weights: str = "",
    vocabulary: str = "",
    dtype: str = "float16",
) -> None:
    """Writes `out`/NAME.safetensors for each model and `out`/models.json, which says what is in them.

    Args:
      models: the folder of each model by the name that it is packed under.
      out: the folder of the pack.
      audio_weights, text_weights, vocabulary: what MuLan's towers were fetched as, and is left out; '' packs them too.
      dtype: 'float16', or 'float32': as they are, and so with the hash that they have.

    Raises:
      ValueError: where there is no such dtype, a folder holds no model of a known kind, or MuLan's towers are not those
        that are left out.
    """
    if dtype not in ("float16", "float32"):
        raise ValueError(f"pack.dtype={dtype!r} is none of float16, float32")
    if not models:
        raise ValueError("pack.models is empty: name a model and its folder, as {'ru': 'runs/mine/ru'}")
    for name in models:
        checkpoint.check_name(name, "pack.models")
    whole = {name: _load(folder) for name, folder in models.items()}
    kept, hashes = {}, {}
    for name, model in whole.items():
        hosts.stop_point()
        exact, left_out = _flat(model.variables), {}
        if audio_weights and isinstance(model.config, MuLanConfig):
            left_out = _towers(model.config, audio_weights, text_weights)
            if other := [path for path, array in left_out.items() if not np.array_equal(exact.get(path), array)]:
                raise ValueError(f"{models[name]}: {other[0]} is not that of the pretrained towers: pack without them")
        rounded = _rounded if dtype == "float16" else np.asarray
        kept[name] = {path: rounded(array) for path, array in exact.items() if path not in left_out}
        hashes[name] = checkpoint.content_hash(_restored({**kept[name], **left_out}))
    Path(out).mkdir(parents=True, exist_ok=True)
    words = read_regular(vocabulary) if vocabulary else None
    described = {}
    for name, model in whole.items():
        assets = {file: content for file, content in model.assets.items() if (file, content) != (VOCABULARY, words)}
        for other, found in whole.items():
            old, new = found.hash.encode(), hashes[other].encode()
            assets = {file: content.replace(old, new) for file, content in assets.items()}
        header = {
            "format": FORMAT,
            "hash": hashes[name],
            "config": checkpoint.config_to_json(model.config),
            "shapes": _shapes(kept[name]),
            "orders": {array: _order(content) for array, content in sorted(kept[name].items())},
            "assets": {file: base64.b64encode(content).decode() for file, content in sorted(assets.items())},
        }
        path = Path(out) / f"{name}.safetensors"
        told = {HEADER: json.dumps(header)}  # one key: several would be in any order
        tensors.save(path, kept[name], told)
        described[name] = {
            "kind": type(model.config).__name__,
            "weights": int(sum(array.size for array in kept[name].values())),
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "header": hashlib.sha256(told[HEADER].encode()).hexdigest(),
            "hash": hashes[name],
            "packed_from": model.hash,
        }
        print(f"{path}: {described[name]['weights'] / 1e6:.2f} M weights, {described[name]['bytes'] / 1e6:.2f} MB")
    write_json(Path(out) / INDEX, described)


@lock.holds("out")
def unpack(
    source: str,
    out: str,
    audio_weights: str = "",
    text_weights: str = "",
    vocabulary: str = "",
    changed: Sequence[str] = (),
) -> None:
    """Writes the models of a pack as `out`/NAME/model, as if they had been trained there; leaves done ones alone.

    Args:
      source: the folder of the pack.
      out: the run's folder.
      audio_weights, text_weights, vocabulary: what was left out of MuLan, fetched again.
      changed: names of models whose weights someone else wrote into the file, its header kept: they are taken, if they
        are finite, of the names and shapes that were packed, and not what was packed in another memory order, as a
        model of their own.

    Raises:
      ValueError: where a file is not the one that models.json describes, MuLan lacks its towers, or another model is
        there already.
      FileNotFoundError: where a file is missing.
    """
    source = str(shipped.located(source))
    index = _index(source)
    if unknown := set(changed) - index.keys():
        raise ValueError(f"unpack.changed: {min(unknown)!r} is none of {', '.join(index)}")
    for name, told in index.items():
        hosts.stop_point()
        folder, other = Path(out) / name, name in changed
        model = load(source, name, audio_weights, text_weights, vocabulary, other) if other else None
        wanted = model.hash if other else told["hash"]
        if checkpoint.has_model(folder):
            if (found := checkpoint.model_hash(folder)) != wanted:
                raise ValueError(f"{folder} holds model {found[:12]}, not {wanted[:12]}: unpack elsewhere")
            print(f"{folder}: unpacked already")
            continue
        model = model or load(source, name, audio_weights, text_weights, vocabulary)
        checkpoint.save_model(folder, model.config, model.variables, model.assets)
        print(f"{folder}: unpacked")


def load(
    source: str,
    name: str,
    audio_weights: str = "",
    text_weights: str = "",
    vocabulary: str = "",
    changed: bool = False,
) -> checkpoint.Model:
    """One model of a pack; arguments and errors are those of `unpack`."""
    told = _index(source)[name]
    config, arrays, assets = _read(Path(source) / f"{name}.safetensors", told, changed)
    if isinstance(config, MuLanConfig) and not any(path.startswith(TOWERS) for path in arrays):
        if not (audio_weights and text_weights and vocabulary):
            raise ValueError(f"{source}: {name} needs its pretrained towers and their vocabulary: `musicrl fetch`")
        arrays |= _towers(config, audio_weights, text_weights)
        assets = {VOCABULARY: read_regular(vocabulary), **assets}
    try:
        variables = _restored(arrays)
    except ValueError as error:
        raise ValueError(f"{source}: {name}: {error}") from error
    found = checkpoint.content_hash(variables)
    if found != told["hash"] and not changed:
        raise ValueError(
            f"{source}: {name} comes to {found[:12]}, not {told['hash'][:12]}: its towers are not those that it was "
            "packed without"
        )
    return checkpoint.Model(config, variables, found, assets)


def _index(source: str) -> dict[str, dict[str, Any]]:
    path = Path(source) / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"source={source!r} has no {INDEX}: name a folder that `musicrl pack` wrote")
    described = {"kind": str, "sha256": str, "hash": str, "header?": str}
    index = read_json(path, {str: described}, RESTORE)
    for name, told in index.items():
        checkpoint.check_name(name, str(path))
        if told["kind"] not in KINDS:
            raise ValueError(f"{path}: {name} is a {told['kind']}, which is none of {', '.join(KINDS)}: {RESTORE}")
    return index


def _load(folder: str) -> checkpoint.Model:
    path = Path(folder) / checkpoint.MODEL / MANIFEST
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint in {folder}: train it first, or mend the path")
    kind = read_json(path, {"config": {"kind": str}}, "restore a copy")["config"]["kind"]
    if kind not in KINDS:
        raise ValueError(f"{path.parent} holds a {kind}, which is none of {', '.join(KINDS)}")
    return checkpoint.load_model(folder, KINDS[kind])


def _towers(config: MuLanConfig, audio_weights: str, text_weights: str) -> dict[str, np.ndarray]:
    """The pretrained towers, by path."""
    return _flat({"params": {"towers": PretrainedTowers(config, audio_weights, text_weights).params()}})


def _read(path: Path, told: Mapping[str, Any], changed: bool) -> tuple[Any, dict[str, np.ndarray], dict[str, bytes]]:
    """(config, arrays, assets) of a packed model."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: restore the pack")
    if not changed and (found := hashlib.sha256(path.read_bytes()).hexdigest()) != told["sha256"]:
        raise ValueError(
            f"{path} has the sha256 {found[:12]}, not {told['sha256'][:12]}: if it is damaged, restore it; if someone "
            "wrote other weights into it, name it in unpack.changed"
        )
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            written = (file.metadata() or {}).get(HEADER, "{}")
        arrays = safetensors.numpy.load_file(path)
    except Exception as error:  # a header that is damaged makes KeyError and others of it too
        raise ValueError(f"{path} is no whole safetensors file ({error}): {RESTORE}") from error
    where = f"the header of {path}"
    header = json_from(written.encode(), where, {"format?": str}, RESTORE)
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} is of format {header.get('format')!r}, not {FORMAT!r}: pack it with this version")
    header = json_from(written.encode(), where, HEADER_KIND, RESTORE)
    if changed:
        if "header" not in told:
            raise ValueError(f"{path} was packed by an older version: pack its model again, and change that")
        if hashlib.sha256(written.encode()).hexdigest() != told["header"]:
            raise ValueError(f"{path} has another header than it was packed with: write its metadata as they were")
        _check_changed(path, arrays, header["shapes"], header.get("orders", {}))
    config = checkpoint.config_from_json(KINDS[told["kind"]], header["config"], str(path))
    assets = {}
    for name, content in header["assets"].items():
        try:
            assets[checkpoint.check_name(name, where)] = base64.b64decode(content, validate=True)
        except binascii.Error as error:
            raise ValueError(f"{where}: the asset {name} is no base64 ({error}): {RESTORE}") from error
    return config, arrays, assets


def _shapes(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """What each array is, such as 'float [4, 2]' for either precision."""
    kinds = {"float16": "float", "float32": "float"}
    return {path: f"{kinds.get(str(x.dtype), x.dtype)} {list(x.shape)}" for path, x in sorted(arrays.items())}


def _check_changed(
    path: Path, arrays: Mapping[str, np.ndarray], packed: Mapping[str, str], orders: Mapping[str, Sequence[str]]
) -> None:
    """Checks weights that someone else wrote against the model that was packed.

    Not everything can be seen: an array that holds new numbers in a wrong order looks like any other.

    Args:
      path: of the file, for the message.
      arrays: its content.
      packed: `_shapes` of the model that was packed.
      orders: `_order` of each of its arrays; {} of a pack of an older version.

    Raises:
      ValueError: by name of the array, where it has another shape or kind, numbers that are not finite, or the numbers
        that were packed in another order, as safetensors writes an array that is not row-major.
    """
    shapes = _shapes(arrays)
    for name in sorted(shapes.keys() | packed.keys()):
        was, now = packed.get(name, "nothing"), shapes.get(name, "nothing")
        if was != now:
            raise ValueError(f"{path}: {name} was packed as {was} and is {now}: write it as it was")
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"{path}: {name} has weights that are not finite")
        (old, old_sorted), (new, new_sorted) = orders.get(name, ("", "")), _order(arrays[name])
        if new_sorted == old_sorted and new != old:
            raise ValueError(
                f"{path}: {name} has the numbers that were packed, in another order, as safetensors writes an array "
                "that is not row-major: make every array contiguous (numpy.ascontiguousarray) before it is written"
            )


def _order(array: np.ndarray) -> tuple[str, str]:
    """Returns two short hashes in hex: of an array's numbers as they stand, and of the same numbers sorted.

    Two arrays with one second hash and two first ones differ in order alone. Half precision counts as single.
    """
    numbers = np.ravel(array.astype(np.float32) if array.dtype == np.float16 else array)
    return tuple(hashlib.sha256(each.tobytes()).hexdigest()[:16] for each in (numbers, np.sort(numbers)))


def _rounded(array: np.ndarray) -> np.ndarray:
    """In half precision, where that holds it."""
    array = np.asarray(array)
    if array.dtype != np.float32 or np.abs(array).max(initial=0) > LARGEST:
        return array
    return array.astype(np.float16)


def _flat(tree: Any) -> dict[str, np.ndarray]:
    """Every array by its path."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(key.key) for key in path): np.asarray(leaf) for path, leaf in found}


def _restored(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The inverse, in single precision."""
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        *outer, last = path.split("/")
        inner = tree
        for key in outer:
            inner = inner.setdefault(key, {})
            if not isinstance(inner, dict):
                raise ValueError(f"the array {path} lies in another array: {RESTORE}")
        if last in inner:
            raise ValueError(f"the array {path} holds other arrays: {RESTORE}")
        inner[last] = array.astype(np.float32) if array.dtype == np.float16 else array
    return tree
