"""The states of a training run on disk, by Orbax, so that it can go on whatever happened to it."""

import contextlib
import json
import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from musicrl_jax.core import hosts
from musicrl_jax.core.checkpoint import has_model
from musicrl_jax.core.identity import CONTENT, changed_content
from musicrl_jax.core.manifest import (
    FILES,
    MANIFEST,
    bytes_needed,
    check_space,
    damage,
    described_files,
    flush_names,
    sealed,
    unsealed,
    write_on_disk,
)

CHECKPOINTS, STATE, RUN = "checkpoints", "state", "run.json"
STATE_BEFORE = "default"  # where versions without a manifest had the state
DAMAGED = ".damaged"  # the ending of a step that is set aside
KIND = {
    "step": int,
    "about": dict,
    "identity": dict,
    "arrays": {str: str},
    "files": FILES,
}  # of a step's manifest


def _arrays(tree: Any) -> dict[str, str]:
    """The kind and shape of every array of a tree, by its path."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype} {list(leaf.shape)}" for path, leaf in found}


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
            raise OSError(
                f"{self._directory} is not there on every host: MODEL_DIR must be a folder that all share"
            )
        self._checkpointer = ocp.StandardCheckpointer()

    def steps(self) -> list[int]:
        """The steps that have a manifest, ascending; not whether their files are undamaged."""
        return [
            step for step in self._folders() if (self._directory / f"{step}" / MANIFEST).exists()
        ]

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

    def save(self, step: int, tree: Any, notes: dict[str, Any] | None = None) -> None:
        """Writes the state of `step` in the background, after the one before it; a step that is there already is not
        written again.

        Args:
          step: updates so far, 1 or more.
          tree: the arrays; they may be donated to the next update.
          notes: what comes back from `notes` after a restart, as JSON holds it.

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
            "about": json.loads(json.dumps(notes or {}, default=lambda number: number.item())),
            "identity": self._identity,
            "arrays": _arrays(tree),
        }
        self._writing, self._needed = step, bytes_needed(tree)
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
        there, here = unsealed(folder / MANIFEST, kind=KIND)["arrays"], _arrays(tree)
        for name in sorted(set(there) | set(here)):
            if there.get(name) != here.get(name):
                raise ValueError(
                    f"{folder} holds another state: {name} is {there.get(name)} there and {here.get(name)} here; "
                    "go on with the version that wrote it or choose a new MODEL_DIR"
                )
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
            tree,
        )
        return self._checkpointer.restore(folder / STATE, abstract)

    def notes(self) -> dict[str, Any]:
        """What was told to `save` with `latest_step`; {} where there is no step."""
        step = self.latest_step()
        return unsealed(self._directory / f"{step}" / MANIFEST, kind=KIND)["about"] if step else {}

    def leave(self, step: int, tree: Any, notes: dict[str, Any] | None = None) -> NoReturn:
        """Saves, waits until that is done on all hosts, and raises `hosts.Preempted`."""
        told = "told to stop before the first step"
        if step:
            self.save(step, tree, notes)
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
        return sorted(
            int(path.name)
            for path in self._directory.iterdir()
            if path.name.isdecimal() and path.is_dir()
        )

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
                return unsealed(self._directory / f"{step}" / MANIFEST, kind=KIND)["identity"]
        path = self._directory / RUN
        before = any(
            (self._directory / f"{step}" / STATE_BEFORE).is_dir() for step in self._folders()
        )
        if not path.exists() or not (steps or before or has_model(self._model_dir)):
            return None
        try:
            return unsealed(path, "if there")
        except ValueError as error:
            raise ValueError(
                f"{self._directory}: {error}, so whose run this is cannot be told; choose a new MODEL_DIR, or remove "
                "that file if it is this one's"
            ) from error

    def _write_identity(self) -> None:
        write_on_disk(self._directory / RUN, sealed(self._identity))

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
                    wrong = damage(
                        folder, unsealed(folder / MANIFEST, kind=KIND)["files"], more=False
                    )
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
            write_on_disk(folder / MANIFEST, sealed({**told, "files": described_files(folder)}))
            flush_names(self._directory)
            for old in self.steps()[: -self._keep]:
                self._remove(old)
            for aside in self._directory.glob(f"*{DAMAGED}"):
                shutil.rmtree(aside)
        except Exception as error:
            self._error = error

    def _remove(self, step: int) -> None:
        folder = self._directory / f"{step}"
        (folder / MANIFEST).unlink(
            missing_ok=True
        )  # first: half a folder must not pass for a damaged one
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
        return (
            f"The last whole checkpoint is that of step {self._latest}."
            if self._latest
            else "No step was saved."
        )


def _reason(error: Exception) -> str:
    """An error in one line; the system's own word where it is the system's."""
    if code := re.search(r"os_error_code='(\d+)'", str(error)):  # as Orbax's storage tells it
        return os.strerror(int(code[1]))
    told = (
        error.strerror
        if isinstance(error, OSError) and error.strerror
        else str(error) or type(error).__name__
    )
    return told.strip().splitlines()[0][:300]


def _check_identity(saved: Any, wanted: Any, where: Path, field: str = "") -> None:
    """ValueError at the first field that differs."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        if changes := changed_content(saved.get(CONTENT), wanted.get(CONTENT)):
            raise ValueError(
                f"{where} holds a run that learned from other data: {changes}; choose a new MODEL_DIR, or put back the "
                "data that it learned from (of a set's versions the newest is read)"
            )
        for name in sorted((set(saved) | set(wanted)) - {CONTENT}):
            _check_identity(
                saved.get(name), wanted.get(name), where, f"{field}.{name}" if field else name
            )
    elif saved != wanted:
        raise ValueError(
            f"{where} holds another run: {field} is {saved!r} there and {wanted!r} here; "
            f"choose a new MODEL_DIR or give the old value"
        )
