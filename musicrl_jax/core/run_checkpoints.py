"""The states of a training run on disk, by Orbax: a run resumes from its newest whole state."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import jax
import orbax.checkpoint as ocp

from musicrl_jax.core import hosts
from musicrl_jax.core.checkpoint import has_model
from musicrl_jax.core.files import DAMAGED
from musicrl_jax.core.identity import CONTENT, changed_content
from musicrl_jax.core.manifest import (
    FILES,
    MANIFEST,
    bytes_needed,
    check_space,
    damage,
    error_context,
    flush_names,
    sealed,
    unsealed,
    write_manifest,
    write_on_disk,
)

CHECKPOINTS, STATE, RUN = "checkpoints", "state", "run.json"
KEEP = 2  # states of a run
OLD_STATE = "default"  # folder of the state in versions without a manifest
# The kind of a step's manifest. 'about' holds the notes.
KIND = {"step": int, "about": dict, "identity": dict, "arrays": {str: str}, "files": FILES}


def _arrays(tree: Any) -> dict[str, str]:
    """Returns the dtype and shape of every array of a tree, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype} {list(leaf.shape)}" for path, leaf in leaves}


class RunCheckpoints:
    """The newest KEEP states of one training run, in `directory`/checkpoints/STEP.

    The manifest of a step makes it whole. It is written once all other files are on the disk, so a
    kill or a power cut leaves the step before. All hosts make every call, in one order, and share
    `directory`.

    `identity` says what run this is (configs, sizes, hashes). A folder with another run's states or
    model is refused. A run without a state does not reserve its folder.
    """

    def __init__(self, directory: str | Path, identity: dict[str, Any]):
        self._model_dir = Path(directory).absolute()
        self._directory = self._model_dir / CHECKPOINTS
        self._identity = json.loads(json.dumps(identity))
        self._latest: int | None = None  # None until the files are checked
        self._executor = ThreadPoolExecutor(1)  # hashes a step's files and writes its manifest
        self._commit_result: Future | None = None  # of the step that is being written
        self._writing = self._needed = 0  # that step, and its bytes
        self._closed = False
        hosts.first_alone(self._bind)()
        if not (self._directory / RUN).exists():
            raise OSError(
                f"{self._directory} is not there on every host: MODEL_DIR must be a folder that "
                "all share"
            )
        self._checkpointer = ocp.StandardCheckpointer()

    # --- Reading. ---

    def steps(self) -> list[int]:
        """Returns the steps that have a manifest, ascending, without a check of their files."""
        return [step for step in self._folders() if (self._step(step) / MANIFEST).exists()]

    def latest_step(self) -> int:
        """Returns the newest whole step, or 0 if there is none.

        The first call reads every file of the newest step. A damaged step is reported and set aside
        as STEP.damaged until the next step is whole, and the step before is checked. A step that a
        killed run left incomplete is removed.
        """
        if self._latest is None:
            self._latest = hosts.first_decides(self._newest_whole)
        return self._latest

    def restore(self, tree: Any) -> Any:
        """Returns the state of `latest_step`, bit-equal to what was saved.

        It has the shapes, dtypes and shardings of `tree`.

        Raises ValueError if there is no state or it has other arrays.
        """
        step = self.latest_step()
        if not step:
            raise ValueError(f"{self._directory} holds no step to resume from: save one first")
        folder = self._step(step)
        # The same arrays.
        saved, expected = self._manifest(step)["arrays"], _arrays(tree)
        for name in sorted(set(saved) | set(expected)):
            if saved.get(name) != expected.get(name):
                raise ValueError(
                    f"{folder} holds another state: {name} is {saved.get(name)} there and "
                    f"{expected.get(name)} here; go on with the version that wrote it or choose a "
                    "new MODEL_DIR"
                )
        # The arrays, created with the shardings of `tree`.
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
            tree,
        )
        return self._checkpointer.restore(folder / STATE, abstract)

    def notes(self) -> dict[str, Any]:
        """Returns the notes that were saved with `latest_step`; {} if there is no step."""
        step = self.latest_step()
        return self._manifest(step)["about"] if step else {}

    # --- Writing. ---

    def save(self, step: int, tree: Any, notes: dict[str, Any] | None = None) -> None:
        """Writes the state of `step` in the background, once the step before is written.

        A step that exists is not written again.

        Args:
          step: updates so far, 1 or more.
          tree: the arrays; they may be donated to the next update.
          notes: JSON that `notes` returns after a restart.

        Raises:
          OSError: if this save cannot begin or the one before it failed.
        """
        self.latest_step()  # removes what a killed run left
        self._settle_everywhere(tree)
        if step == self._latest:
            return
        # The manifest is written once the arrays are.
        manifest = {
            "step": step,
            "about": json.loads(json.dumps(notes or {}, default=lambda number: number.item())),
            "identity": self._identity,
            "arrays": _arrays(tree),
        }
        self._writing, self._needed = step, bytes_needed(tree)
        try:
            self._checkpointer.save(self._step(step) / STATE, tree)
        except OSError as error:
            raise self._failed(error) from error
        self._commit_result = self._executor.submit(self._commit, step, manifest)

    def leave(self, step: int, tree: Any, notes: dict[str, Any] | None = None) -> NoReturn:
        """Saves, waits until all hosts have saved, and raises `hosts.Preempted`."""
        message = "stopped before the first step"
        if step:
            self.save(step, tree, notes)
            self._settle_everywhere()
            message = f"stopped; step {step} is saved"
        self.close()
        raise hosts.Preempted(
            f"{message}, and the same command resumes the run in {self._model_dir}"
        )

    def close(self) -> None:
        """Waits for the step that is being written. May be called twice.

        Raises OSError if that step cannot be saved.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self._settle()
        finally:
            self._executor.shutdown()
            self._checkpointer.close()

    def _settle_everywhere(self, tree: Any = None) -> None:
        """Waits, on all hosts, for what is being written; then checks the space for `tree`."""

        def settle_first() -> None:
            self._settle()
            if tree is not None:
                with self._clear_errors():
                    check_space(self._directory, tree)

        if not hosts.first():
            self._settle()
        hosts.first_alone(settle_first)()

    def _settle(self) -> None:
        """Waits for this host's part of what is being written. Raises OSError if that failed."""
        if self._commit_result is None:
            return
        result, self._commit_result = self._commit_result, None
        try:
            result.result()
        except Exception as error:  # of any type, from Orbax or the file system
            raise self._failed(error) from error
        self._latest = self._writing

    def _commit(self, step: int, manifest: dict[str, Any]) -> None:
        """Makes a step whole once its arrays are written, and removes old steps. For a thread."""
        self._checkpointer.wait_until_finished()
        if not hosts.first():
            return
        write_manifest(self._step(step), manifest)
        flush_names(self._directory)
        for old in self.steps()[:-KEEP]:
            self._remove(old)
        for aside in self._directory.glob(f"*{DAMAGED}"):
            shutil.rmtree(aside)

    def _remove(self, step: int) -> None:
        # Delete the manifest first: an interrupted removal then counts as incomplete, not damaged.
        (self._step(step) / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(self._step(step))

    # --- The folder. ---

    def _step(self, step: int) -> Path:
        return self._directory / f"{step}"

    def _folders(self) -> list[int]:
        """Returns the steps that have a folder, ascending."""
        if not self._directory.is_dir():
            return []
        folders = [path for path in self._directory.iterdir() if path.name.isdecimal()]
        return sorted(int(path.name) for path in folders if path.is_dir())

    def _manifest(self, step: int) -> dict[str, Any]:
        return unsealed(self._step(step) / MANIFEST, kind=KIND)

    def _bind(self) -> None:
        """Makes this run's folder. Raises ValueError if it is another run's."""
        path = self._directory / RUN
        with self._clear_errors():
            self._directory.mkdir(parents=True, exist_ok=True)
            saved = self._saved_identity()
            if saved is not None:
                _check_identity(saved, self._identity, self._directory)
            if not path.exists() or saved is None:
                self._write_identity()

    def _saved_identity(self) -> Any:
        """Returns the identity in the newest valid manifest, else in run.json.

        Returns None if the folder has neither a state nor a model.
        """
        steps = self.steps()
        for step in reversed(steps):
            with contextlib.suppress(ValueError):
                return self._manifest(step)["identity"]
        path = self._directory / RUN
        has_old_state = any((self._step(step) / OLD_STATE).is_dir() for step in self._folders())
        if not path.exists() or not (steps or has_old_state or has_model(self._model_dir)):
            return None
        remedy = (
            ", so the run that it belongs to is unknown; choose a new MODEL_DIR, or remove that "
            "file if it is this run's"
        )
        with error_context(f"{self._directory}: ", remedy):
            return unsealed(path, digest_required=False)

    def _write_identity(self) -> None:
        write_on_disk(self._directory / RUN, sealed(self._identity))

    def _newest_whole(self) -> int:
        """Removes or sets aside what is not whole, and returns the newest whole step, 0 if none."""
        with self._clear_errors():
            self._write_identity()  # also shows that the folder can be written to

            # Steps without a manifest.
            for step in sorted(set(self._folders()) - set(self.steps())):
                folder = self._step(step)
                if (folder / OLD_STATE).is_dir():
                    raise ValueError(
                        f"{folder} is of an older version, which wrote no manifest: go on with "
                        "that version, choose a new MODEL_DIR, or remove that folder to begin anew"
                    )
                print(f"{folder} was not written to its end: removed", flush=True)
                self._remove(step)

            # Steps with a manifest, the newest first.
            for step in reversed(self.steps()):
                folder = self._step(step)
                try:
                    fault = damage(folder, self._manifest(step)["files"], more=False)
                except ValueError as error:
                    fault = str(error)
                if not fault:
                    return step
                aside = folder.with_name(folder.name + DAMAGED)
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
                print(f"{folder} is damaged: {fault}; set aside as {aside.name}", flush=True)
        return 0

    # --- Errors. ---

    def _failed(self, error: Exception) -> OSError:
        """Removes what a failed save has written, and returns its error."""
        folder, free = self._step(self._writing), "?"
        with contextlib.suppress(OSError):
            free = f"{shutil.disk_usage(self._directory).free / 1e6:.0f}"
        if hosts.first() and not (folder / MANIFEST).exists():
            shutil.rmtree(folder, ignore_errors=True)
        return OSError(
            f"step {self._writing} cannot be saved in {self._directory}: {_reason(error)}; "
            f"{self._needed / 1e6:.0f} MB needed, {free} MB free; free some, mend the folder or "
            f"choose another MODEL_DIR. {self._last_whole() or 'No step was saved.'}"
        )

    @contextlib.contextmanager
    def _clear_errors(self) -> Iterator[None]:
        """Raises a system's OSError again, with the folder, what to do and the last whole step."""
        try:
            yield
        except OSError as error:
            if error.errno is None:
                raise
            raise OSError(
                f"{self._directory} cannot be written to: {error.strerror}; mend the folder or "
                f"choose another MODEL_DIR. {self._last_whole()}".strip()
            ) from error

    def _last_whole(self) -> str:
        return f"The last whole checkpoint is that of step {self._latest}." if self._latest else ""


# --- Messages. ---


def _reason(error: Exception) -> str:
    """Returns an error as one line, in the system's words if it is the system's."""
    if code := re.search(r"os_error_code='(\d+)'", str(error)):  # in the errors of Orbax's storage
        return os.strerror(int(code[1]))
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return words.strip().splitlines()[0][:300]


def _check_identity(saved: Any, current: Any, where: Path, field: str = "") -> None:
    """Raises ValueError for the first field that differs."""
    if isinstance(saved, dict) and isinstance(current, dict):
        if changes := changed_content(saved.get(CONTENT), current.get(CONTENT)):
            raise ValueError(
                f"{where} holds a run that learned from other data: {changes}; choose a new "
                "MODEL_DIR, or put back the data that it learned from (of a set's versions the "
                "newest is read)"
            )
        for name in sorted((set(saved) | set(current)) - {CONTENT}):
            inner = f"{field}.{name}" if field else name
            _check_identity(saved.get(name), current.get(name), where, inner)
    elif saved != current:
        raise ValueError(
            f"{where} holds another run: {field} is {saved!r} there and {current!r} here; "
            "choose a new MODEL_DIR or give the old value"
        )
