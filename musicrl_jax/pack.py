"""The models of a run as small files that can be shipped, and back; or a system with all its parts in one folder.

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
import os
import shutil
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from musicrl_jax.core import checkpoint, hosts, lock, shipped, tensors
from musicrl_jax.core.files import json_from, read_json, write_json
from musicrl_jax.core.manifest import MANIFEST
from musicrl_jax.core.tensors import HEADER
from musicrl_jax.objectives.mulan_projections import FetchedTowers, without_towers
from musicrl_jax.systems import folder as systems
from musicrl_jax.systems.kinds import config_class

FORMATS = "safetensors", "system"
INDEX = "models.json"
FORMAT = "musicrl-jax 1"
LARGEST = 6e4  # what half precision holds
# Packs of older versions, as those that ship, have no shapes and orders.
HEADER_KIND = {"config": dict, "shapes?": {str: str}, "orders?": dict, "assets": {str: str}}
RESTORE = "restore the pack"
NOT_FETCHED = FetchedTowers()


@lock.holds("out", beside=True)
def pack(
    out: str,
    models: Mapping[str, str] = types.MappingProxyType({}),
    system: str = "",
    format: str = "safetensors",
    audio_weights: str = "",
    text_weights: str = "",
    vocabulary: str = "",
    dtype: str = "float16",
) -> None:
    """Writes models as small files that can be shipped, or a system as one folder with all its parts.

    Args:
      out: the folder of the pack, or of the new system, which must not be there.
      models: the folder of each model by the name that it is packed under.
      system: a system that refers to parts elsewhere, or a policy's folder as older versions wrote it.
      format: 'safetensors' writes `out`/NAME.safetensors for each of `models`, and `out`/models.json,
        which says what is in them; 'system' writes `system` as it is, with the hashes of its parts.
      audio_weights, text_weights, vocabulary: what MuLan's towers were fetched as, and is left out of
        safetensors; '' packs them too.
      dtype: of safetensors, 'float16', or 'float32': as they are, and so with the hash that they have.

    Raises:
      ValueError: if there is no such format or dtype, a folder holds no model of a known kind, MuLan's
        towers are not those that are left out, or parts of a system do not belong together.
      FileNotFoundError: if a model or a part is missing.
    """
    if format not in FORMATS:
        raise ValueError(f"pack.format={format!r} is none of {', '.join(FORMATS)}")
    if dtype not in ("float16", "float32"):
        raise ValueError(f"pack.dtype={dtype!r} is none of float16, float32")
    if (format == "system") != bool(system) or (system and models):
        raise ValueError(
            "pack.system names the folder that --format=system packs, and pack.models those that "
            "--format=safetensors packs: give the one that belongs to the format"
        )
    if system:
        _pack_system(system, Path(out))
        return
    if not models:
        raise ValueError(
            "pack.models is empty: name a model and its folder, as {'ru': 'runs/mine/ru'}"
        )
    for name in models:
        checkpoint.check_name(name, "pack.models")
    _pack_models(models, Path(out), FetchedTowers(audio_weights, text_weights, vocabulary), dtype)


def _pack_system(system: str, out: Path) -> None:
    """Writes a system and its parts as `out`, whole or not at all."""
    if out.exists():
        raise ValueError(
            f"pack.out={str(out)!r} is there already: choose another folder, or remove it"
        )
    # Parts that play must be there. Of those that only encode, an older policy's folder names all that may be.
    described = systems.describe(system)
    playing = systems.system_class(described["kind"], system).PLAYING
    parts = [
        name
        for name, part in described["parts"].items()
        if part["hash"] or name in playing or checkpoint.has_model(part["folder"])
    ]
    clip_seconds = systems.load(system, parts, described=described).clip_seconds

    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for name in parts:
            hosts.stop_point()
            model = systems.read_part(system, name, described=described)
            assets = model.assets
            if (
                name == "policy" and clip_seconds is not None
            ):  # else an older run alone would know it
                assets = {checkpoint.CLIP: json.dumps({"seconds": clip_seconds}).encode(), **assets}
            checkpoint.save_model(partial / name, model.config, model.variables, assets)
        systems.write(partial, described["kind"], {name: str(partial / name) for name in parts})
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{out}: a {described['kind']} of {', '.join(parts)}")


def _pack_models(folders: Mapping[str, str], out: Path, fetched: FetchedTowers, dtype: str) -> None:
    """Writes the safetensors file of each model, and the index of all."""
    # The arrays of each model, and the hash that they come back with.
    models = {name: _load(folder) for name, folder in folders.items()}
    packed, hashes = {}, {}
    for name, model in models.items():
        hosts.stop_point()
        exact = _flat(model.variables)
        left_out = _flat(fetched.variables(model.config)) if fetched else {}
        if other := [
            path for path, array in left_out.items() if not np.array_equal(exact.get(path), array)
        ]:
            raise ValueError(
                f"{folders[name]}: {other[0]} is not that of the pretrained towers: pack without them"
            )
        rounded = _rounded if dtype == "float16" else np.asarray
        packed[name] = {
            path: rounded(array) for path, array in exact.items() if path not in left_out
        }
        hashes[name] = checkpoint.content_hash(_restored({**packed[name], **left_out}))

    # Files and index. Where a model names another one of the pack, it names that one's new hash.
    out.mkdir(parents=True, exist_ok=True)
    index = {}
    for name, model in models.items():
        left_out = fetched.assets(model.config) if fetched else {}
        assets = {
            file: content for file, content in model.assets.items() if left_out.get(file) != content
        }
        for other, source in models.items():
            old, new = source.hash.encode(), hashes[other].encode()
            assets = {file: content.replace(old, new) for file, content in assets.items()}
        header = {
            "format": FORMAT,
            "hash": hashes[name],
            "config": checkpoint.config_to_json(model.config),
            "shapes": _shapes(packed[name]),
            "orders": {array: _order(content) for array, content in sorted(packed[name].items())},
            "assets": {
                file: base64.b64encode(content).decode() for file, content in sorted(assets.items())
            },
        }
        path = out / f"{name}.safetensors"
        metadata = {HEADER: json.dumps(header)}  # one key: several would be in any order
        tensors.save(path, packed[name], metadata)
        index[name] = {
            "kind": type(model.config).__name__,
            "weights": int(sum(array.size for array in packed[name].values())),
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "header": hashlib.sha256(metadata[HEADER].encode()).hexdigest(),
            "hash": hashes[name],
            "packed_from": model.hash,
        }
        print(
            f"{path}: {index[name]['weights'] / 1e6:.2f} M weights, {index[name]['bytes'] / 1e6:.2f} MB"
        )
    write_json(out / INDEX, index)


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
    source, fetched = (
        str(shipped.located(source)),
        FetchedTowers(audio_weights, text_weights, vocabulary),
    )
    index = _index(source)
    if unknown := set(changed) - index.keys():
        raise ValueError(f"unpack.changed: {min(unknown)!r} is none of {', '.join(index)}")
    for name, entry in index.items():
        hosts.stop_point()
        folder, other = Path(out) / name, name in changed
        model = load(source, name, fetched, other) if other else None
        wanted = model.hash if other else entry["hash"]
        if checkpoint.has_model(folder):
            if (digest := checkpoint.model_hash(folder)) != wanted:
                raise ValueError(
                    f"{folder} holds model {digest[:12]}, not {wanted[:12]}: unpack elsewhere"
                )
            print(f"{folder}: unpacked already")
            continue
        model = model or load(source, name, fetched)
        checkpoint.save_model(folder, model.config, model.variables, model.assets)
        print(f"{folder}: unpacked")


def load(
    source: str, name: str, fetched: FetchedTowers = NOT_FETCHED, changed: bool = False
) -> checkpoint.Model:
    """Reads one model of a pack; errors are those of `unpack`, and `changed` says whether it names this model."""
    entry = _index(source)[name]
    config, arrays, assets = _read(Path(source) / f"{name}.safetensors", entry, changed)
    if without_towers(config, arrays):
        if not (fetched.audio_weights and fetched.text_weights and fetched.vocabulary):
            raise ValueError(
                f"{source}: {name} needs its pretrained towers and their vocabulary: `musicrl fetch`"
            )
        arrays |= _flat(fetched.variables(config))
        assets = {**fetched.assets(config), **assets}
    try:
        variables = _restored(arrays)
    except ValueError as error:
        raise ValueError(f"{source}: {name}: {error}") from error
    digest = checkpoint.content_hash(variables)
    if digest != entry["hash"] and not changed:
        raise ValueError(
            f"{source}: {name} comes to {digest[:12]}, not {entry['hash'][:12]}: its towers are not those that it was "
            "packed without"
        )
    return checkpoint.Model(config, variables, digest, assets)


def _index(source: str) -> dict[str, dict[str, Any]]:
    path = Path(source) / INDEX
    if not path.is_file():
        raise FileNotFoundError(
            f"source={source!r} has no {INDEX}: name a folder that `musicrl pack` wrote"
        )
    described = {"kind": str, "sha256": str, "hash": str, "header?": str}
    index = read_json(path, {str: described}, RESTORE)
    for name, entry in index.items():
        checkpoint.check_name(name, str(path))
        config_class(entry["kind"], f"{path}: {name}")
    return index


def _load(folder: str) -> checkpoint.Model:
    path = Path(folder) / checkpoint.MODEL / MANIFEST
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint in {folder}: train it first, or mend the path")
    kind = read_json(path, {"config": {"kind": str}}, "restore a copy")["config"]["kind"]
    return checkpoint.load_model(folder, config_class(kind, str(path.parent)))


def _read(
    path: Path, entry: Mapping[str, Any], changed: bool
) -> tuple[Any, dict[str, np.ndarray], dict[str, bytes]]:
    """(config, arrays, assets) of a packed model."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: restore the pack")
    if not changed and (digest := hashlib.sha256(path.read_bytes()).hexdigest()) != entry["sha256"]:
        raise ValueError(
            f"{path} has the sha256 {digest[:12]}, not {entry['sha256'][:12]}: if it is damaged, restore it; if "
            "someone wrote other weights into it, name it in unpack.changed"
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
        raise ValueError(
            f"{path} is of format {header.get('format')!r}, not {FORMAT!r}: pack it with this version"
        )
    header = json_from(written.encode(), where, HEADER_KIND, RESTORE)
    if changed:
        if "header" not in entry:
            raise ValueError(
                f"{path} was packed by an older version: pack its model again, and change that"
            )
        if hashlib.sha256(written.encode()).hexdigest() != entry["header"]:
            raise ValueError(
                f"{path} has another header than it was packed with: write its metadata as they were"
            )
        _check_changed(path, arrays, header["shapes"], header.get("orders", {}))
    config = checkpoint.config_from_json(
        config_class(entry["kind"], str(path)), header["config"], str(path)
    )
    assets = {}
    for name, content in header["assets"].items():
        try:
            assets[checkpoint.check_name(name, where)] = base64.b64decode(content, validate=True)
        except binascii.Error as error:
            raise ValueError(
                f"{where}: the asset {name} is no base64 ({error}): {RESTORE}"
            ) from error
    return config, arrays, assets


def _shapes(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """What each array is, such as 'float [4, 2]' for either precision."""
    kinds = {"float16": "float", "float32": "float"}
    return {
        path: f"{kinds.get(str(x.dtype), x.dtype)} {list(x.shape)}"
        for path, x in sorted(arrays.items())
    }


def _check_changed(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    packed: Mapping[str, str],
    orders: Mapping[str, Sequence[str]],
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
    return tuple(
        hashlib.sha256(each.tobytes()).hexdigest()[:16] for each in (numbers, np.sort(numbers))
    )


def _rounded(array: np.ndarray) -> np.ndarray:
    """In half precision, where that holds it."""
    array = np.asarray(array)
    if array.dtype != np.float32 or np.abs(array).max(initial=0) > LARGEST:
        return array
    return array.astype(np.float16)


def _flat(tree: Any) -> dict[str, np.ndarray]:
    """Every array by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(key.key) for key in path): np.asarray(leaf) for path, leaf in leaves}


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
