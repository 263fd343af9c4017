"""Models and runs on disk, by Orbax.

A *model* folder is what other stages read: the weights, the config that rebuilds the module, a hash of the
content and any files that belong to it. A *run* folder holds the states of a training run, so that it can go on.

Both have a manifest, written last and in one move: what has one is whole. It holds the size and sha256 of every file
and a digest of itself, so that one flipped bit in any of them is noticed.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import threading
import typing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from musicrl_jax.core import hosts, sharding

MANIFEST = "manifest.json"
SEAL = "sha256"  # the key of a manifest's digest of itself
MODEL = "model"
CHECKPOINTS, STATE, RUN = "checkpoints", "state", "run.json"
STATE_BEFORE = "default"  # where versions without a manifest had the state
DAMAGED = ".damaged"  # the ending of a step that is set aside
READERS = 8  # files that are hashed at a time
SAVE_MARGIN = 1.1  # the disk space asked for, over the bytes of the arrays
LINEAGE = "tokens.json"  # asset of a token model: which models wrote the tokens that it was trained on, {name: hash}
ANCHOR = "anchor.json"  # asset of a finetuned policy: its anchor's content hash, what its rewards declare, the alarm
TOLD_BY = (MANIFEST, "votes.jsonl")  # the files that say what a folder of tokens, or of votes on them, holds
NO_IDENTITY = {"identity": False}

# What Orbax logs with a traceback, several times over, it raises as well, and that becomes one error here.
logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))


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


def _sealed(content: dict[str, Any]) -> str:
    """JSON with a digest of itself."""
    digest = hashlib.sha256(json.dumps(content, indent=1).encode()).hexdigest()
    return json.dumps({**content, SEAL: digest}, indent=1) + "\n"


def _unsealed(path: Path, seal: str = "asked for") -> dict[str, Any]:
    """What was sealed; ValueError that says what is wrong where a bit has changed or the file cannot be read.

    With seal="if there" a file without a digest, as older versions wrote it, is taken as it is.
    """
    try:
        raw = path.read_bytes()
        content = json.loads(raw)
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error
    there = isinstance(content, dict) and content.pop(SEAL, None)
    if (there or seal == "asked for") and (not there or _sealed(content).encode() != raw):
        raise ValueError(f"{path.name} does not have the digest that it names")
    return content


def _write_on_disk(path: Path, text: str) -> None:
    """`files.write_text`, and back once a power cut would not undo it."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _flush_names(path.parent)


def _flush_names(folder: Path) -> None:
    """Puts a folder's list of files on the disk, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sha256(path: Path, flush: bool = False) -> str:
    with open(path, "rb") as file:
        if flush:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_names(folder: Path) -> list[str]:
    """The files in a folder and the folders in it, but for its manifest."""
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(path for path in paths if path != MANIFEST)


def _described_files(folder: Path) -> dict[str, list[Any]]:
    """{name: [bytes, sha256]} of the files in `folder`; they are on the disk then."""
    names = _file_names(folder)
    with ThreadPoolExecutor(READERS) as pool:
        hashes = list(pool.map(lambda name: _sha256(folder / name, flush=True), names))
    for inner in sorted({(folder / name).parent for name in names} | {folder}):
        _flush_names(inner)
    return {name: [(folder / name).stat().st_size, found] for name, found in zip(names, hashes, strict=True)}


def _damage(folder: Path, files: dict[str, list[Any]], more: bool) -> str:
    """What is wrong with the first file that is not as described, '' where all are; `more` files may be allowed."""
    there = _file_names(folder)
    if missing := sorted(set(files) - set(there)):
        return f"{missing[0]} is missing"
    if not more and (unknown := sorted(set(there) - set(files))):
        return f"{unknown[0]} does not belong to it"

    def wrong(name: str) -> str:
        size, wanted = files[name]
        try:
            if (found := (folder / name).stat().st_size) != size:
                return f"{name} has {found} bytes, not {size}"
            if (found := _sha256(folder / name)) != wanted:
                return f"{name} has the sha256 {found[:12]}, not {wanted[:12]}"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        return ""

    with ThreadPoolExecutor(READERS) as pool:
        return next(filter(None, pool.map(wrong, files)), "")


def _arrays(tree: Any) -> dict[str, str]:
    """The kind and shape of every array of a tree, by its path."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype} {list(leaf.shape)}" for path, leaf in found}


def _bytes_needed(tree: Any) -> int:
    return int(SAVE_MARGIN * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))


def check_space(directory: Path, tree: Any) -> None:
    """OSError, before anything is written, where `directory` has no room for the arrays of `tree`."""
    needed, free = _bytes_needed(tree), shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(
            f"no space to save in {directory}: {needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free; "
            f"free some or choose another MODEL_DIR. What was saved before is whole."
        )


def _alone() -> ocp.options.MultiprocessingOptions:
    """For what this process reads or writes without the others: Orbax waits for none of them."""
    host = jax.process_index()
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    return ocp.options.MultiprocessingOptions(host, {host}, f"host{host}")


def has_model(directory: str | Path) -> bool:
    """Whether `directory`/model is there, whole."""
    return (Path(directory) / MODEL / MANIFEST).exists()


def _model_manifest(directory: Path) -> dict[str, Any]:
    """ValueError where it is damaged."""
    try:
        return _unsealed(directory / MANIFEST, "if there")
    except ValueError as error:
        raise ValueError(f"{directory} is damaged: {error}; restore a copy") from error


def model_hash(directory: str | Path) -> str:
    """The content hash of the model in `directory`, from its manifest."""
    if not has_model(directory):
        raise FileNotFoundError(f"no checkpoint in {directory}: train it first, or mend the path")
    return _model_manifest(Path(directory) / MODEL)["hash"]


def save_model(directory: str | Path, config: Any, variables: Any, assets: dict[str, bytes] | None = None) -> str:
    """Writes `directory`/model, whole or not at all, and returns its hash.

    All hosts call it, or the first alone inside `hosts.first_alone`. The first writes, and the others wait for it.
    """
    directory = Path(directory).absolute() / MODEL
    variables = sharding.fetch(variables)  # an array that remembers its mesh could not be read on another
    model_hash = content_hash(variables)

    def write() -> None:
        directory.parent.mkdir(parents=True, exist_ok=True)
        check_space(directory.parent, variables)
        partial, old = (directory.with_name(directory.name + ending) for ending in (".partial", ".old"))
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        partial.mkdir()
        with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as checkpointer:
            checkpointer.save(partial / "variables", variables)
        for name, content in (assets or {}).items():
            (partial / name).write_bytes(content)
        manifest = {"config": config_to_json(config), "hash": model_hash, "assets": sorted(assets or {})}
        _write_on_disk(partial / MANIFEST, _sealed({**manifest, "files": _described_files(partial)}))
        if directory.exists():  # gone in one move: half a folder with a manifest would pass for a whole one
            directory.rename(old)
        partial.rename(directory)
        shutil.rmtree(old, ignore_errors=True)

    hosts.first_alone(write)()
    return model_hash


def load_model(directory: str | Path, config_class: type) -> Model:
    """Reads `directory`/model; any host may, without the others.

    Raises FileNotFoundError where there is none, ValueError where it holds another kind of model or a file of it is not
    the one that was saved.
    """
    directory = Path(directory).absolute() / MODEL
    if not (directory / MANIFEST).exists():
        raise FileNotFoundError(
            f"no {config_class.__name__} checkpoint in {directory}: train it first, or mend the path"
        )
    manifest = _model_manifest(directory)
    config = config_from_json(config_class, manifest["config"], str(directory))
    if wrong := _damage(directory, manifest.get("files", {}), more=True):
        raise ValueError(f"{directory} is damaged: {wrong}; restore a copy")
    with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as checkpointer:
        variables = checkpointer.restore(directory / "variables")
    found = content_hash(variables)
    if found != manifest["hash"]:
        raise ValueError(
            f"{directory} is damaged: its arrays hash to {found[:12]}, not {manifest['hash'][:12]}; restore a copy"
        )
    assets = {name: (directory / name).read_bytes() for name in manifest["assets"]}
    return Model(config, variables, manifest["hash"], assets)


class RunCheckpoints:
    """The states of one training run, the newest `keep` of them, under `directory`/checkpoints/STEP.

    A step's manifest is written when all else of it is on the disk, and makes it whole: a kill or a power cut leaves
    the step before. On several hosts all of them make every call, in one order, and `directory` is the same folder.

    `identity` says what run this is (configs, sizes, hashes); a folder that holds another run's states or model is
    refused. A run that was refused before its first state leaves nothing that binds the next.
    """

    def __init__(self, directory: str | Path, identity: dict[str, Any], keep: int = 2):
        if keep < 1:
            raise ValueError(f"RunCheckpoints.keep={keep} must be 1 or more")
        self._model_dir = Path(directory).absolute()
        self._directory = self._model_dir / CHECKPOINTS
        self._identity = json.loads(json.dumps(identity))
        self._keep = keep
        self._latest: int | None = None  # not known before the files are checked
        self._thread: threading.Thread | None = None
        self._writing = self._needed = 0
        self._error: Exception | None = None
        self._closed = False
        hosts.first_alone(self._bind)()
        if not (self._directory / RUN).exists():
            raise OSError(f"{self._directory} is not there on every host: MODEL_DIR must be a folder that all share")
        self._checkpointer = ocp.StandardCheckpointer()

    def steps(self) -> list[int]:
        """The steps that have a manifest, ascending; not whether their files are undamaged."""
        return [step for step in self._folders() if (self._directory / f"{step}" / MANIFEST).exists()]

    def latest_step(self) -> int:
        """The newest whole step, or 0 where there is none.

        The first call reads every file of the newest step. One that is damaged is named, set aside as STEP.damaged
        until the next step is whole, and the one before is looked at; what a kill left half written is removed.
        """
        if self._latest is None:
            found = hosts.first_alone(self._newest_whole)() or 0
            if jax.process_count() > 1:
                found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
            self._latest = found
        return self._latest

    def save(self, step: int, tree: Any, about: dict[str, Any] | None = None) -> None:
        """Writes the state of `step` in the background, after the one before it; a step that is there already is not
        written again.

        Args:
          step: updates so far, 1 or more.
          tree: the arrays; they may be donated to the next update.
          about: what comes back from `about` after a restart, as JSON holds it.

        Raises:
          OSError: where this save cannot begin or the one before it failed.
        """
        self.latest_step()  # clears away what a kill left
        if not hosts.first():
            self._settle()
        hosts.first_alone(self._make_ready)(tree)
        if step == self._latest:
            return
        told = {
            "step": step,
            "about": json.loads(json.dumps(about or {}, default=lambda number: number.item())),
            "identity": self._identity,
            "arrays": _arrays(tree),
        }
        self._writing, self._needed = step, _bytes_needed(tree)
        try:
            self._checkpointer.save(self._directory / f"{step}" / STATE, tree)
        except OSError as error:
            raise self._failed(error) from error
        self._thread = threading.Thread(target=self._commit, args=(step, told), name=f"step {step}")
        self._thread.start()

    def restore(self, tree: Any) -> Any:
        """The state of `latest_step`, with the shapes, dtypes and shardings of `tree`, bit-equal to what was saved.

        ValueError where there is none or it has other arrays.
        """
        step = self.latest_step()
        if not step:
            raise ValueError(f"{self._directory} holds no step to go on from: save one first")
        folder = self._directory / f"{step}"
        there, here = _unsealed(folder / MANIFEST)["arrays"], _arrays(tree)
        for name in sorted(set(there) | set(here)):
            if there.get(name) != here.get(name):
                raise ValueError(
                    f"{folder} holds another state: {name} is {there.get(name)} there and {here.get(name)} here; "
                    "go on with the version that wrote it or choose a new MODEL_DIR"
                )
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), tree
        )
        return self._checkpointer.restore(folder / STATE, abstract)

    def about(self) -> dict[str, Any]:
        """What was told to `save` with `latest_step`; {} where there is no step."""
        step = self.latest_step()
        return _unsealed(self._directory / f"{step}" / MANIFEST)["about"] if step else {}

    def leave(self, step: int, tree: Any, about: dict[str, Any] | None = None) -> NoReturn:
        """Saves, waits until that is done on all hosts, and raises `hosts.Preempted`."""
        told = "told to stop before the first step"
        if step:
            self.save(step, tree, about)
            if not hosts.first():
                self._settle()
            hosts.first_alone(self._settle)()
            told = f"told to stop; step {step} is saved"
        self.close()
        raise hosts.Preempted(f"{told}, and the same command goes on in {self._model_dir}")

    def close(self) -> None:
        """Waits for what is being written; OSError where that failed. Again, it does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            self._settle()
        finally:
            self._checkpointer.close()

    def _folders(self) -> list[int]:
        """The steps that have a folder, ascending."""
        if not self._directory.is_dir():
            return []
        return sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdecimal() and path.is_dir())

    def _bind(self) -> None:
        """Makes this run's folder, or refuses another's."""
        path = self._directory / RUN
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            there = self._identity_there()
            if there is not None:
                _check_identity(there, self._identity, self._directory)
            if not path.exists() or there is None:
                self._write_identity()
        except OSError as error:
            raise self._unusable(error) from error

    def _identity_there(self) -> Any:
        """Whose states or model are here: the newest manifest knows, else run.json; None where nothing is."""
        steps = self.steps()
        for step in reversed(steps):
            with contextlib.suppress(ValueError):
                return _unsealed(self._directory / f"{step}" / MANIFEST)["identity"]
        path = self._directory / RUN
        before = any((self._directory / f"{step}" / STATE_BEFORE).is_dir() for step in self._folders())
        if not path.exists() or not (steps or before or has_model(self._model_dir)):
            return None
        try:
            return _unsealed(path, "if there")
        except ValueError as error:
            raise ValueError(
                f"{self._directory}: {error}, so whose run this is cannot be told; choose a new MODEL_DIR, or remove "
                "that file if it is this one's"
            ) from error

    def _write_identity(self) -> None:
        _write_on_disk(self._directory / RUN, _sealed(self._identity))

    def _newest_whole(self) -> int:
        """Clears away what is not whole, down to the newest step that is; 0 where none is."""
        try:
            self._write_identity()  # also shows that the folder can be written to
            for step in sorted(set(self._folders()) - set(self.steps())):
                folder = self._directory / f"{step}"
                if (folder / STATE_BEFORE).is_dir():
                    raise ValueError(
                        f"{folder} is of an older version, which wrote no manifest: go on with that version, choose a "
                        "new MODEL_DIR, or remove that folder to begin anew"
                    )
                print(f"{folder} was not written to its end: removed", flush=True)
                self._remove(step)
            for step in reversed(self.steps()):
                folder = self._directory / f"{step}"
                try:
                    wrong = _damage(folder, _unsealed(folder / MANIFEST)["files"], more=False)
                except ValueError as error:
                    wrong = str(error)
                if not wrong:
                    return step
                aside = folder.with_name(folder.name + DAMAGED)
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
                print(f"{folder} is damaged: {wrong}; set aside as {aside.name}", flush=True)
        except OSError as error:
            raise self._unusable(error) from error
        return 0

    def _make_ready(self, tree: Any) -> None:
        """On the first host, before a save: the one before is done and there is room."""
        self._settle()
        try:
            check_space(self._directory, tree)
        except OSError as error:
            raise self._unusable(error) from error

    def _commit(self, step: int, told: dict[str, Any]) -> None:
        """In a thread: makes a step whole once its arrays are written, and removes those that are not kept."""
        try:
            self._checkpointer.wait_until_finished()
            if not hosts.first():
                return
            folder = self._directory / f"{step}"
            _write_on_disk(folder / MANIFEST, _sealed({**told, "files": _described_files(folder)}))
            _flush_names(self._directory)
            for old in self.steps()[: -self._keep]:
                self._remove(old)
            for aside in self._directory.glob(f"*{DAMAGED}"):
                shutil.rmtree(aside)
        except Exception as error:
            self._error = error

    def _remove(self, step: int) -> None:
        folder = self._directory / f"{step}"
        (folder / MANIFEST).unlink(missing_ok=True)  # first: half a folder must not pass for a damaged one
        shutil.rmtree(folder)

    def _settle(self) -> None:
        """Waits for this host's part of what is being written; OSError where that failed."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise self._failed(error) from error
        self._latest = self._writing

    def _failed(self, error: Exception) -> OSError:
        """The error of a save; what was written of it is removed."""
        folder, free = self._directory / f"{self._writing}", "?"
        with contextlib.suppress(OSError):
            free = f"{shutil.disk_usage(self._directory).free / 1e6:.0f}"
        if hosts.first() and not (folder / MANIFEST).exists():
            shutil.rmtree(folder, ignore_errors=True)
        return OSError(
            f"step {self._writing} cannot be saved in {self._directory}: {_reason(error)}; "
            f"{self._needed / 1e6:.0f} MB needed, {free} MB free; free some, mend the folder or choose another "
            f"MODEL_DIR. {self._last_whole()}"
        )

    def _unusable(self, error: OSError) -> OSError:
        """`error`, if it is the system's, with the folder, what to do and what is left."""
        if error.errno is None:
            return error
        told = f"{self._directory} cannot be written to: {error.strerror}; mend the folder or choose another MODEL_DIR"
        return OSError(f"{told}. {self._last_whole()}" if self._latest else told)

    def _last_whole(self) -> str:
        return f"The last whole checkpoint is that of step {self._latest}." if self._latest else "No step was saved."


def _reason(error: Exception) -> str:
    """An error in one line; the system's own word where it is the system's."""
    if code := re.search(r"os_error_code='(\d+)'", str(error)):  # as Orbax's storage tells it
        return os.strerror(int(code[1]))
    told = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    return told.strip().splitlines()[0][:300]


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
