"""A run resumes from its newest whole state: after any flipped bit, kill or disk error."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from musicrl_jax.core import checkpoint, hosts, manifest, run_checkpoints
from musicrl_jax.core.run_checkpoints import RunCheckpoints

IDENTITY = {"model": {"width": 8}, "data": "ab12", "seed": 0}
FLIPS = 200


def state(step):
    """Returns a state with several kinds of arrays, different at each step."""
    key = jax.random.fold_in(jax.random.key(0), step)
    return {
        "policy": {
            "w": jax.random.normal(key, (6, 4)),
            "half": jnp.full(5, step, jnp.bfloat16) / 3,
        },
        "value": (jnp.zeros((), jnp.float32), jnp.arange(3) + step),
        "key": key,
        "step": jnp.int32(step),
    }


def notes(step):
    return {"anchor": "cd34", "units": {"quality": [0.1 + 0.2, 1 / 3]}, "cursor": step}


def bits(tree):
    def raw(x):
        x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        return str(x.dtype), x.shape, np.asarray(x).tobytes()

    return [raw(leaf) for leaf in jax.tree.leaves(tree)], jax.tree.structure(tree)


def save(folder, *steps):
    run = RunCheckpoints(folder, IDENTITY)
    for step in steps:
        run.save(step, state(step), notes(step))
    run.close()
    return folder


def check_latest(folder, latest, steps):
    """Asserts that a run resumes from the step `latest`, with its state and notes."""
    run = RunCheckpoints(folder, IDENTITY)
    assert (run.latest_step(), run.steps()) == (latest, steps)
    assert run.notes() == (notes(latest) if latest else {})
    if latest:
        assert bits(run.restore(state(0))) == bits(state(latest))
    run.close()


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return save(tmp_path_factory.mktemp("template"), 1, 2)


@pytest.fixture
def folder(template, tmp_path):
    """Returns a folder with steps 1 and 2, which the test may damage."""
    return Path(shutil.copytree(template, tmp_path / "run"))


# --- States come back. ---


def test_a_state_and_its_notes_come_back_bit_equal(template):
    check_latest(template, 2, [1, 2])


def test_notes_are_optional_and_hold_numbers_of_arrays(tmp_path):
    run = RunCheckpoints(tmp_path, IDENTITY)
    assert (run.latest_step(), run.notes(), run.steps()) == (0, {}, [])
    with pytest.raises(ValueError, match="checkpoints holds no step"):
        run.restore(state(0))
    run.save(1, state(1))
    run.save(2, state(2), {"unit": (np.float32(0.1), jnp.float32(0.5), 3)})
    assert (run.latest_step(), run.notes()) == (1, {})
    run.close()
    assert run.notes() == {"unit": [float(np.float32(0.1)), 0.5, 3]}


def test_another_mesh_reads_the_same_state(tmp_path):
    def put(array, *sizes):
        devices = np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes)
        spec = PartitionSpec("fsdp", "data")
        return jax.device_put(array, NamedSharding(Mesh(devices, ("data", "fsdp")), spec))

    array = jax.random.normal(jax.random.key(1), (16, 8))
    run = RunCheckpoints(tmp_path, IDENTITY)
    run.save(1, {"w": put(array, 2, 4)})
    run.close()
    run = RunCheckpoints(tmp_path, IDENTITY)
    for sizes in ((1, 1), (2, 2), (4, 2), (1, 4)):
        restored = run.restore({"w": put(jnp.zeros_like(array), *sizes)})["w"]
        assert restored.sharding == put(array, *sizes).sharding
        np.testing.assert_array_equal(restored, array)
    run.close()


def test_a_state_with_other_arrays_is_refused(template):
    run = RunCheckpoints(template, IDENTITY)
    other = state(0)
    other["policy"]["w"] = jnp.zeros((6, 5))
    words = (
        r"checkpoints/2 holds another state: \['policy'\]\['w'\] is float32 \[6, 4\] there and "
        r"float32 \[6, 5\] here"
    )
    with pytest.raises(ValueError, match=words):
        run.restore(other)
    with pytest.raises(ValueError, match=r"\['more'\] is None there and bfloat16 \[2\] here"):
        run.restore({**state(0), "more": jnp.zeros(2, jnp.bfloat16)})
    run.close()


# --- Saving. ---


def test_only_the_newest_states_remain(tmp_path):
    folder = save(tmp_path, 1, 2, 3, 4) / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["3", "4", "run.json"]


def test_a_save_does_not_wait_and_the_old_step_stays_until_the_new_one_is_whole(
    tmp_path, monkeypatch
):
    go_on, described_files = threading.Event(), manifest.described_files

    def slow(folder):
        assert go_on.wait(60)
        return described_files(folder)

    save(tmp_path, 1)
    monkeypatch.setattr(manifest, "described_files", slow)
    monkeypatch.setattr(run_checkpoints, "KEEP", 1)
    run = RunCheckpoints(tmp_path, IDENTITY)
    run.save(2, state(2), notes(2))  # returns before its files are hashed
    assert (run.steps(), run.latest_step()) == ([1], 1)
    assert bits(run.restore(state(0))) == bits(state(1))
    go_on.set()
    run.close()
    assert (run.steps(), run.latest_step()) == ([2], 2)


def test_a_state_may_be_donated_while_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(run_checkpoints, "KEEP", 9)
    update = jax.jit(lambda x: x + 1.0, donate_argnums=0)
    x = jnp.zeros((512, 512))
    run = RunCheckpoints(tmp_path, IDENTITY)
    for step in range(1, 4):
        x = update(x)
        run.save(step, {"x": x})
        for _ in range(3):
            x = update(x)
    run.close()
    run = RunCheckpoints(tmp_path, IDENTITY)
    for step in range(1, 4):
        run._latest = step
        np.testing.assert_array_equal(run.restore({"x": x})["x"], 4.0 * step - 3)
    run.close()


def test_a_step_is_not_written_twice(template):
    path = template / "checkpoints/2/manifest.json"
    before = path.stat()
    save(template, 2)
    assert (before.st_ino, before.st_mtime_ns) == (path.stat().st_ino, path.stat().st_mtime_ns)


def test_a_run_that_stops_saves_its_state(tmp_path):
    run = RunCheckpoints(tmp_path, IDENTITY)
    with pytest.raises(hosts.Preempted, match="before the first step"):
        run.leave(0, state(0))
    run = RunCheckpoints(tmp_path, IDENTITY)
    with pytest.raises(hosts.Preempted, match="step 3 is saved"):
        run.leave(3, state(3), notes(3))
    run.close()  # as `with closing(run)` does
    check_latest(tmp_path, 3, [3])


# --- Damage. ---


def flip(path, random):
    content = bytearray(path.read_bytes())
    content[random.integers(len(content))] ^= 1 << random.integers(8)
    path.write_bytes(content)


def test_the_step_before_replaces_one_with_a_flipped_bit(template, tmp_path, capsys):
    """In the first flip of each file the run resumes; the other flips are only detected."""
    random = np.random.default_rng(0)
    names = [path.relative_to(template) for path in files_of(template / "checkpoints/2")]
    assert {"manifest.json", "_METADATA", "manifest.ocdbt"} <= {name.name for name in names}
    for number, name in enumerate(names):
        copy = Path(shutil.copytree(template, tmp_path / f"{number}"))
        flip(copy / name, random)
        run = RunCheckpoints(copy, IDENTITY)
        assert run.latest_step() == 1, name
        out = capsys.readouterr().out
        assert "checkpoints/2 is damaged" in out and name.name in out
        run.close()
    check_latest(copy, 1, [1])
    step = Path(shutil.copytree(template / "checkpoints/2", tmp_path / "step"))
    for choice in random.integers(len(names), size=FLIPS - len(names)):
        path = step / names[choice].relative_to("checkpoints/2")
        whole = path.read_bytes()
        flip(path, random)
        try:
            content = manifest.unsealed(step / "manifest.json", kind=run_checkpoints.KIND)
            fault = manifest.damage(step, content["files"], more=False)
        except ValueError as error:
            fault = str(error)
        assert path.name in fault
        path.write_bytes(whole)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def add(path):
    (path.parent / "more").write_text("")


def drop(*fields):
    """Returns a function that seals a manifest again without some fields."""

    def harm(path):
        content = json.loads(path.read_text())
        content = {name: content[name] for name in content if name not in ("sha256", *fields)}
        path.write_text(manifest.sealed(content))

    return harm


@pytest.mark.parametrize(
    ("name", "harm", "words"),
    [
        ("state/_METADATA", cut, r"state/_METADATA has \d+ bytes, not \d+"),
        ("state/_METADATA", Path.unlink, "state/_METADATA is missing"),
        ("state/_METADATA", add, "state/more does not belong to it"),
        ("manifest.json", cut, "manifest.json does not have the digest"),
        ("manifest.json", lambda path: path.write_bytes(b""), "manifest.json is not JSON"),
        ("manifest.json", lambda path: path.write_text("{}"), "manifest.json does not have the"),
        *(
            ("manifest.json", drop(field), f"manifest.json: {field} is missing")
            for field in ("files", "about", "identity", "arrays")
        ),
    ],
)
def test_a_damaged_step_is_reported_and_set_aside(folder, capfd, name, harm, words):
    harm(folder / "checkpoints/2" / name)
    run = RunCheckpoints(folder, IDENTITY)
    assert run.latest_step() == 1
    run.close()
    (line,) = capfd.readouterr().out.splitlines()
    assert re.search(rf"checkpoints/2 is damaged: {words}.*; set aside as 2.damaged", line)
    assert (folder / "checkpoints/2.damaged").is_dir()


def test_a_damaged_step_is_removed_once_the_next_is_whole(folder):
    cut(folder / "checkpoints/2/manifest.json")
    check_latest(folder, 1, [1])
    save(folder, 2)
    check_latest(folder, 2, [1, 2])
    assert not (folder / "checkpoints/2.damaged").exists()


def test_a_run_begins_anew_if_all_steps_are_damaged(folder, capsys):
    for step in (1, 2):
        cut(folder / f"checkpoints/{step}/state/_METADATA")
    check_latest(folder, 0, [])
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_step_without_a_manifest_is_removed(folder, capsys):
    (folder / "checkpoints/2/manifest.json").unlink()
    (folder / "checkpoints/3/state.orbax-checkpoint-tmp-0").mkdir(parents=True)
    check_latest(folder, 1, [1])
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["1", "run.json"]
    assert capsys.readouterr().out.count("was not written to its end: removed") == 2


# --- The identity of a run. ---


def test_another_run_is_refused_and_changes_nothing(folder):
    (folder / "checkpoints/3").mkdir()  # incomplete
    before = files_of(folder)
    with pytest.raises(ValueError, match=r"holds another run: model\.width is 8 there and 16 here"):
        RunCheckpoints(folder, {**IDENTITY, "model": {"width": 16}})
    assert files_of(folder) == before and (folder / "checkpoints/3").exists()


def test_a_run_without_a_state_does_not_reserve_its_folder(tmp_path):
    other = {**IDENTITY, "seed": 1}
    RunCheckpoints(tmp_path, other).close()
    save(tmp_path, 1)
    with pytest.raises(ValueError, match="seed is 0 there and 1 here"):
        RunCheckpoints(tmp_path, other)


def test_the_manifests_identify_the_run_if_run_json_is_damaged(folder):
    path = folder / "checkpoints/run.json"
    whole = path.read_text()
    for damaged in ("", whole.replace("ab12", "ab13")):
        path.write_text(damaged)
        with pytest.raises(ValueError, match="holds another run: seed is 0 there and 1 here"):
            RunCheckpoints(folder, {**IDENTITY, "seed": 1})
        check_latest(folder, 2, [1, 2])
        assert path.read_text() == whole
    path.write_text(whole.replace("ab12", "ab13"))
    for step in (1, 2):
        (folder / f"checkpoints/{step}/manifest.json").write_text("")
    with pytest.raises(ValueError, match=r"run.json does not have the digest .* remove that file"):
        RunCheckpoints(folder, IDENTITY)


@dataclasses.dataclass(frozen=True)
class Config:
    """The config of a model."""


def test_run_json_of_an_older_version_identifies_the_run(tmp_path):
    checkpoint.save_model(tmp_path, Config(), state(0)["policy"])
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/run.json").write_text(json.dumps(IDENTITY, indent=1) + "\n")
    RunCheckpoints(tmp_path, IDENTITY).close()
    with pytest.raises(ValueError, match="seed is 0 there and 1 here"):
        RunCheckpoints(tmp_path, {**IDENTITY, "seed": 1})


def test_a_state_of_an_older_version_is_not_removed(tmp_path):
    (tmp_path / "checkpoints/7/default").mkdir(parents=True)
    (tmp_path / "checkpoints/run.json").write_text(json.dumps(IDENTITY))
    with pytest.raises(ValueError, match="holds another run: seed is 0 there and 1 here"):
        RunCheckpoints(tmp_path, {**IDENTITY, "seed": 1})
    run = RunCheckpoints(tmp_path, IDENTITY)
    with pytest.raises(ValueError, match="checkpoints/7 is of an older version"):
        run.latest_step()
    run.close()
    assert (tmp_path / "checkpoints/7/default").is_dir()


# --- Errors of the disk. ---


def test_a_full_disk_is_reported_before_the_save(template, monkeypatch):
    before = files_of(template)
    run = RunCheckpoints(template, IDENTITY)
    monkeypatch.setattr(run_checkpoints.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(OSError, match=r"no space to save in .*checkpoints: 0 MB needed"):
        run.save(3, state(3))
    run.close()
    assert files_of(template) == before
    assert run.latest_step() == 2


@pytest.mark.parametrize("call", ["save", "close"])
def test_an_error_in_the_background_is_raised_at_the_next_call(folder, monkeypatch, call):
    def broken(_):
        raise OSError(5, "Input/output error")

    run = RunCheckpoints(folder, IDENTITY)
    words = r"step 3 cannot be saved in .*: Input/output error; .*that of step 2\."
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "described_files", broken)
        run.save(3, state(3))
        with pytest.raises(OSError, match=words):
            run.save(4, state(4)) if call == "save" else run.close()
    run.close()
    assert run.steps() == [1, 2]
    assert not (folder / "checkpoints/3").exists()
    save(folder, 3)
    check_latest(folder, 3, [2, 3])


@pytest.fixture
def small_disk(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", path]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_disk_that_fills_up_leaves_the_last_step(small_disk, monkeypatch, capfd):
    run = RunCheckpoints(small_disk, IDENTITY)
    noise = jax.random.normal(jax.random.key(0), (1 << 17,))  # 0.5 MB that do not compress
    run.save(1, {"x": noise})
    run.close()
    run = RunCheckpoints(small_disk, IDENTITY)
    with pytest.raises(OSError, match="no space to save"):
        run.save(2, {"x": jnp.zeros(1 << 20)})
    usage = shutil.disk_usage
    with monkeypatch.context() as patch:  # another process takes the space in the meantime
        patch.setattr(run_checkpoints.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 40))
        run.save(2, {"x": jax.random.normal(jax.random.key(1), (1 << 20,))})
        patch.setattr(run_checkpoints.shutil, "disk_usage", usage)
        words = r"step 2 .* in .*: No space left on device; 5 MB needed, .* step 1\."
        with pytest.raises(OSError, match=words):
            run.close()
    assert not capfd.readouterr().err  # one error, without Orbax's log
    run = RunCheckpoints(small_disk, IDENTITY)
    assert run.latest_step() == 1
    np.testing.assert_array_equal(run.restore({"x": noise})["x"], noise)
    run.save(2, {"x": noise})
    run.close()
    assert run.steps() == [1, 2]


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    words = r"file/run/checkpoints cannot be written to: Not a directory; mend"
    with pytest.raises(OSError, match=words):
        RunCheckpoints(tmp_path / "file/run", IDENTITY)


def test_a_deleted_folder_is_named(folder):
    run = RunCheckpoints(folder, IDENTITY)
    assert run.latest_step() == 2
    shutil.move(folder, folder.with_name("elsewhere"))
    words = r"checkpoints cannot be written to: No such file .* that of step 2\."
    with pytest.raises(OSError, match=words):
        run.save(3, state(3))
    run.close()
    assert not folder.exists()


WORKER = """
import sys
from run_checkpoints_test import RunCheckpoints, IDENTITY, state, notes
run = RunCheckpoints(sys.argv[1], IDENTITY)
step = run.latest_step()
while True:
    step += 1
    run.save(step, state(step), notes(step))
    print(step, flush=True)
"""


def test_a_killed_run_resumes_from_a_whole_step(tmp_path, processes):
    """After SIGKILL, the newest step whose save has begun is whole, or the one before."""
    random = np.random.default_rng(0)
    paths = f"{Path(__file__).parent}{os.pathsep}{Path(__file__).parents[2]}"
    settings = {"env": {**os.environ, "PYTHONPATH": paths}, "stdout": subprocess.PIPE, "text": True}
    before = 0
    for _ in range(2):
        with processes.start([sys.executable, "-c", WORKER, tmp_path], **settings) as worker:
            timer = threading.Timer(60, worker.kill)
            timer.start()
            begun = [before]
            while len(begun) < 4 and (line := worker.stdout.readline()):
                begun += [int(line)] if line.strip().isdecimal() else []
            threading.Event().wait(random.uniform(0, 0.2))
            worker.send_signal(signal.SIGKILL)
            begun += [int(line) for line in worker.stdout.read().split("\n") if line.isdecimal()]
            timer.cancel()
        assert begun[-1] >= before + 3
        run = RunCheckpoints(tmp_path, IDENTITY)
        before = run.latest_step()
        assert before >= begun[-1] - 1
        assert bits(run.restore(state(0))) == bits(state(before)) and run.notes() == notes(before)
        run.close()
