"""Packs models as small files to ship, and unpacks them; or packs a system as one folder.

A packed model is one safetensors file. It has the arrays by their path ("params/trunk/begin"), in
half precision or as they are, and in its header the config and the assets of the model. Rounded
weights have a hash of their own. Where a model records the hash of another one of the pack, as of
the models that it was trained on, the packed model records that one's new hash.

Fetched towers of MuLan are left out. Whoever unpacks fetches them too.
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
LARGEST = 6e4  # largest absolute value that is stored in half precision
# Packs of older versions, as those that ship, have no shapes and orders.
HEADER_KIND = {"config": dict, "shapes?": {str: str}, "orders?": dict, "assets": {str: str}}
RESTORE = "restore the pack"
NOT_FETCHED = FetchedTowers()


# --- packing ---


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
    """Writes models as small files, or a system as one folder with all its parts.

    Args:
      out: folder of the pack, or of the new system, which must not exist.
      models: folder of each model by the name that it is packed under.
      system: a system whose parts are elsewhere, or a policy's folder of an older version.
      format: 'safetensors' writes `out`/NAME.safetensors for each of `models`, and the index
        `out`/models.json; 'system' writes `system` as it is, with the hashes of its parts.
      audio_weights: file of MuLan's audio tower as it was fetched. The towers and the vocabulary
        are left out of safetensors if it is given, and packed if it is ''.
      text_weights: file of the text tower.
      vocabulary: file of the vocabulary.
      dtype: of safetensors: 'float16', or 'float32', which changes no weights and no hash.

    Raises:
      ValueError: format or dtype is unknown, a folder has no model of a known kind, MuLan's towers
        are not the fetched ones, or parts of a system do not belong together.
      FileNotFoundError: a model or a part is missing.
    """
    # Which of the two formats.
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

    # Models.
    if not models:
        raise ValueError("pack.models is empty: name a model and its folder")
    for name in models:
        checkpoint.check_name(name, "pack.models")
    _pack_models(models, Path(out), FetchedTowers(audio_weights, text_weights, vocabulary), dtype)


def _pack_system(system: str, out: Path) -> None:
    """Writes a system and its parts as `out`, whole or not at all."""
    if out.exists():
        raise ValueError(f"pack.out='{out}' is there already: choose another folder, or remove it")
    # Parts that play are required. An older policy's folder names all parts for encoding, of which
    # some may be missing.
    described = systems.describe(system)
    playing = systems.system_class(described["kind"], system).PLAYING
    parts = []
    for name, part in described["parts"].items():
        if part["hash"] or name in playing or checkpoint.has_model(part["folder"]):
            parts.append(name)
    clip_seconds = systems.load(system, parts, described=described).clip_seconds

    # The folder gets its name when it is whole.
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for name in parts:
            hosts.stop_point()
            model = systems.read_part(system, name, described=described)
            assets = model.assets
            if name == "policy" and clip_seconds is not None:  # older versions had it elsewhere
                assets = {checkpoint.CLIP: json.dumps({"seconds": clip_seconds}).encode(), **assets}
            checkpoint.save_model(partial / name, model.config, model.variables, assets)
        systems.write(partial, described["kind"], {name: str(partial / name) for name in parts})
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{out}: a {described['kind']} of {', '.join(parts)}")


def _pack_models(folders: Mapping[str, str], out: Path, fetched: FetchedTowers, dtype: str) -> None:
    """Writes the safetensors file of each model, and the index of all."""
    # The arrays of each model, and the hash that it has when it is unpacked.
    models = {name: _load(folder) for name, folder in folders.items()}
    rounded = _rounded if dtype == "float16" else np.asarray
    packed, hashes = {}, {}
    for name, model in models.items():
        hosts.stop_point()
        exact = _flat(model.variables)
        towers = _flat(fetched.variables(model.config)) if fetched else {}
        for path, array in towers.items():
            if not np.array_equal(exact.pop(path, None), array):
                tower = f"{folders[name]}: {path}"
                raise ValueError(f"{tower} is not that of the pretrained towers: pack without them")
        packed[name] = {path: rounded(array) for path, array in exact.items()}
        hashes[name] = checkpoint.content_hash(_restored({**packed[name], **towers}))

    # Files and index.
    out.mkdir(parents=True, exist_ok=True)
    index = {}
    for name, model in models.items():
        left_out = fetched.assets(model.config) if fetched else {}
        assets = {}
        for asset, content in sorted(model.assets.items()):
            if left_out.get(asset) != content:
                for other in models:  # a recorded hash of another model becomes its new one
                    content = content.replace(models[other].hash.encode(), hashes[other].encode())
                assets[asset] = base64.b64encode(content).decode()
        header = {
            "format": FORMAT,
            "hash": hashes[name],
            "config": checkpoint.config_to_json(model.config),
            "shapes": _shapes(packed[name]),
            "orders": {path: _order(array) for path, array in sorted(packed[name].items())},
            "assets": assets,
        }
        file = out / f"{name}.safetensors"
        metadata = {HEADER: json.dumps(header)}  # one key: several would be in any order
        tensors.save(file, packed[name], metadata)
        index[name] = {
            "kind": type(model.config).__name__,
            "weights": int(sum(array.size for array in packed[name].values())),
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "header": hashlib.sha256(metadata[HEADER].encode()).hexdigest(),
            "hash": hashes[name],
            "packed_from": model.hash,
        }
        weights, size = index[name]["weights"], index[name]["bytes"]
        print(f"{file}: {weights / 1e6:.2f} M weights, {size / 1e6:.2f} MB")
    write_json(out / INDEX, index)


# --- unpacking ---


@lock.holds("out")
def unpack(
    source: str,
    out: str,
    audio_weights: str = "",
    text_weights: str = "",
    vocabulary: str = "",
    changed: Sequence[str] = (),
) -> None:
    """Writes the models of a pack as `out`/NAME/model; those that are done are left alone.

    Args:
      source: folder of the pack.
      out: the run's folder.
      audio_weights: file of MuLan's audio tower, fetched again if the pack has no towers.
      text_weights: file of the text tower.
      vocabulary: file of the vocabulary.
      changed: names of models whose weights someone else changed in the file, with the same header.
        They become models of their own. Names and shapes must be the packed ones, values finite,
        and not the packed values in another memory order.

    Raises:
      ValueError: a file differs from its entry in models.json, MuLan lacks its towers, or `out` has
        another model.
      FileNotFoundError: a file is missing.
    """
    # Read the index, models.json, and check the names in `changed`.
    source = str(shipped.located(source))
    fetched = FetchedTowers(audio_weights, text_weights, vocabulary)
    index = _index(source)
    if unknown := set(changed) - index.keys():
        raise ValueError(f"unpack.changed: {min(unknown)!r} is none of {', '.join(index)}")

    # The models, one after the other.
    for name, entry in index.items():
        hosts.stop_point()
        # The hash of a changed model is known once it is read.
        folder = Path(out) / name
        model = load(source, name, fetched, changed=True) if name in changed else None
        expected = entry["hash"] if model is None else model.hash
        if checkpoint.has_model(folder):
            if (digest := checkpoint.model_hash(folder)) != expected:
                raise ValueError(
                    f"{folder} holds model {digest[:12]}, not {expected[:12]}: unpack elsewhere"
                )
            print(f"{folder}: unpacked already")
            continue
        model = model or load(source, name, fetched)
        checkpoint.save_model(folder, model.config, model.variables, model.assets)
        print(f"{folder}: unpacked")


def load(
    source: str, name: str, fetched: FetchedTowers = NOT_FETCHED, changed: bool = False
) -> checkpoint.Model:
    """Reads one model of a pack; `changed` is whether its weights may be other ones.

    Raises the errors of `unpack`.
    """
    entry = _index(source)[name]
    config, arrays, assets = _read(Path(source) / f"{name}.safetensors", entry, changed)
    # Towers that were left out.
    if without_towers(config, arrays):
        if not (fetched.audio_weights and fetched.text_weights and fetched.vocabulary):
            needs = f"{name} needs its pretrained towers and their vocabulary"
            raise ValueError(f"{source}: {needs}: `musicrl fetch`")
        arrays |= _flat(fetched.variables(config))
        assets = {**fetched.assets(config), **assets}

    # The whole model.
    try:
        variables = _restored(arrays)
    except ValueError as error:
        raise ValueError(f"{source}: {name}: {error}") from error
    digest = checkpoint.content_hash(variables)
    if digest != entry["hash"] and not changed:
        raise ValueError(
            f"{source}: {name} comes to {digest[:12]}, not {entry['hash'][:12]}: its towers are "
            "not those that it was packed without"
        )
    return checkpoint.Model(config, variables, digest, assets)


def _index(source: str) -> dict[str, dict[str, Any]]:
    """Reads the index of a pack."""
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
    """Reads a model of any known kind."""
    path = Path(folder) / checkpoint.MODEL / MANIFEST
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint in {folder}: train it first, or mend the path")
    kind = read_json(path, {"config": {"kind": str}}, "restore a copy")["config"]["kind"]
    return checkpoint.load_model(folder, config_class(kind, str(path.parent)))


def _read(
    path: Path, entry: Mapping[str, Any], changed: bool
) -> tuple[Any, dict[str, np.ndarray], dict[str, bytes]]:
    """Returns (config, arrays, assets) of a packed model."""
    # The file.
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: restore the pack")
    if not changed and (digest := hashlib.sha256(path.read_bytes()).hexdigest()) != entry["sha256"]:
        raise ValueError(
            f"{path} has the sha256 {digest[:12]}, not {entry['sha256'][:12]}: if it is damaged, "
            "restore it; if someone wrote other weights into it, name it in unpack.changed"
        )
    try:
        text = tensors.read_metadata(path).get(HEADER, "{}")
        arrays = safetensors.numpy.load_file(path)
    except Exception as error:  # a damaged header raises KeyError and others too
        raise ValueError(f"{path} is no whole safetensors file ({error}): {RESTORE}") from error

    # The header.
    where = f"the header of {path}"
    header = json_from(text.encode(), where, {"format?": str}, RESTORE)
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path} is of format {header.get('format')!r}, not {FORMAT!r}: pack it with this "
            "version"
        )
    header = json_from(text.encode(), where, HEADER_KIND, RESTORE)
    if changed:
        if "header" not in entry:
            raise ValueError(
                f"{path} was packed by an older version: pack its model again, and change that"
            )
        if hashlib.sha256(text.encode()).hexdigest() != entry["header"]:
            raise ValueError(
                f"{path} has another header than it was packed with: write its metadata as they "
                "were"
            )
        _check_changed(path, arrays, header["shapes"], header.get("orders", {}))

    # The config and the assets in it.
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


# --- arrays ---


def _shapes(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Returns the kind and shape of each array, such as 'float [4, 2]' for either precision."""
    shapes = {}
    for path, array in sorted(arrays.items()):
        kind = "float" if array.dtype in (np.float16, np.float32) else array.dtype
        shapes[path] = f"{kind} {list(array.shape)}"
    return shapes


def _check_changed(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    packed: Mapping[str, str],
    orders: Mapping[str, Sequence[str]],
) -> None:
    """Checks weights that someone else wrote against the model that was packed.

    New numbers in a wrong order cannot be noticed.

    Args:
      path: of the file, for the message.
      arrays: its content.
      packed: `_shapes` of the packed model.
      orders: `_order` of each of its arrays; {} in a pack of an older version.

    Raises:
      ValueError: by name of the array, if its shape or kind differs, a number is not finite, or it
        has the packed numbers in another order, as safetensors writes an array that is not
        row-major.
    """
    shapes = _shapes(arrays)
    # Missing and additional arrays too.
    for name in sorted(shapes.keys() | packed.keys()):
        old_shape, shape = packed.get(name, "nothing"), shapes.get(name, "nothing")
        if shape != old_shape:
            raise ValueError(
                f"{path}: {name} was packed as {old_shape} and is {shape}: write it as it was"
            )
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"{path}: {name} has weights that are not finite")
        (old, old_sorted), (new, new_sorted) = orders.get(name, ("", "")), _order(arrays[name])
        if new_sorted == old_sorted and new != old:
            raise ValueError(
                f"{path}: {name} has the numbers that were packed, in another order, as "
                "safetensors writes an array that is not row-major: make every array contiguous "
                "(numpy.ascontiguousarray) before it is written"
            )


def _order(array: np.ndarray) -> tuple[str, str]:
    """Returns two short hashes in hex: of an array's numbers in order, and of the numbers sorted.

    If only the first differs, two arrays differ in order alone. Half precision counts as single.
    """
    numbers = np.ravel(array.astype(np.float32) if array.dtype == np.float16 else array)
    contents = numbers.tobytes(), np.sort(numbers).tobytes()
    return tuple(hashlib.sha256(content).hexdigest()[:16] for content in contents)


def _rounded(array: np.ndarray) -> np.ndarray:
    """Returns a float32 array in half precision if its values are small enough, else as it is."""
    array = np.asarray(array)
    if array.dtype != np.float32 or np.abs(array).max(initial=0) > LARGEST:
        return array
    return array.astype(np.float16)


def _flat(tree: Any) -> dict[str, np.ndarray]:
    """Returns the arrays of a tree by their path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(key.key) for key in path): np.asarray(leaf) for path, leaf in leaves}


def _restored(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the inverse of `_flat`, in single precision."""
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        # The dictionary that the array belongs to; other people's files may have impossible paths.
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
