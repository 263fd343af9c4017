"""A run goes on from its newest whole checkpoint: whatever bit flips, whenever it is killed, whatever the disk does."""

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
from musicrl_jax.models.tokens import TokenLayout

IDENTITY = {"model": {"width": 8}, "data": "ab12", "seed": 0}
FLIPS = 200


def state(step):
    """A state of several kinds of arrays, another one at each step."""
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


def about(step):
    return {"anchor": "cd34", "units": {"quality": [0.1 + 0.2, 1 / 3]}, "cursor": step}


def bits(tree):
    def raw(x):
        x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        return str(x.dtype), x.shape, np.asarray(x).tobytes()

    return [raw(leaf) for leaf in jax.tree.leaves(tree)], jax.tree.structure(tree)


def saved(folder, *steps, keep=2):
    run = RunCheckpoints(folder, IDENTITY, keep)
    for step in steps:
        run.save(step, state(step), about(step))
    run.close()
    return folder


def opened(folder):
    """(newest step, the run), checked to be what was saved at that step."""
    run = RunCheckpoints(folder, IDENTITY)
    step = run.latest_step()
    if step:
        assert bits(run.restore(state(0))) == bits(state(step))
        assert run.notes() == about(step)
    return step, run


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("template"), 1, 2)


@pytest.fixture
def folder(template, tmp_path):
    """Checkpoints of steps 1 and 2, to be damaged."""
    return Path(shutil.copytree(template, tmp_path / "run"))


def test_state_and_what_was_told_come_back_bit_equal(folder):
    step, run = opened(folder)
    run.close()
    assert (step, run.steps()) == (2, [1, 2])


def test_a_step_without_anything_told_says_nothing(tmp_path):
    run = RunCheckpoints(tmp_path, IDENTITY)
    assert (run.latest_step(), run.notes(), run.steps()) == (0, {}, [])
    with pytest.raises(ValueError, match="checkpoints holds no step"):
        run.restore(state(0))
    run.save(1, state(1))
    run.close()
    assert (run.latest_step(), run.notes()) == (1, {})


def test_numbers_of_arrays_are_told_as_numbers(tmp_path):
    run = RunCheckpoints(tmp_path, IDENTITY)
    run.save(1, state(1), {"unit": (np.float32(0.1), jnp.float32(0.5), 3)})
    run.close()
    assert run.notes() == {"unit": [float(np.float32(0.1)), 0.5, 3]}


def test_every_flipped_bit_is_noticed_and_the_step_before_is_used(template, tmp_path, capsys):
    random = np.random.default_rng(0)
    names = [path.relative_to(template) for path in files_of(template / "checkpoints/2")]
    assert {"manifest.json", "_METADATA", "manifest.ocdbt"} <= {name.name for name in names}
    chosen = names + [names[i] for i in random.integers(len(names), size=FLIPS - len(names))]
    for number, name in enumerate(chosen):
        copy = Path(shutil.copytree(template, tmp_path / f"{number}"))
        content = bytearray((copy / name).read_bytes())
        content[random.integers(len(content))] ^= 1 << random.integers(8)
        (copy / name).write_bytes(content)
        run = RunCheckpoints(copy, IDENTITY)
        assert run.latest_step() == 1, name
        told = capsys.readouterr().out
        assert "checkpoints/2 is damaged" in told and name.name in told
        if number < len(names):
            assert bits(run.restore(state(0))) == bits(state(1))
        run.close()
        shutil.rmtree(copy)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def add(path):
    (path.parent / "more").write_text("")


@pytest.mark.parametrize(
    ("name", "harm", "told"),
    [
        ("state/_METADATA", cut, r"state/_METADATA has \d+ bytes, not \d+"),
        ("state/_METADATA", Path.unlink, "state/_METADATA is missing"),
        ("state/_METADATA", add, "state/more does not belong to it"),
        ("manifest.json", cut, "manifest.json does not have the digest"),
        ("manifest.json", lambda path: path.write_bytes(b""), "manifest.json is not JSON"),
        (
            "manifest.json",
            lambda path: path.write_text("{}"),
            "manifest.json does not have the digest",
        ),
    ],
)
def test_what_is_wrong_is_said_and_the_run_goes_on(folder, capfd, name, harm, told):
    harm(folder / "checkpoints/2" / name)
    step, run = opened(folder)
    said = capfd.readouterr().out
    assert step == 1
    assert len(said.splitlines()) == 1
    assert re.search(rf"checkpoints/2 is damaged: {told}.*; set aside as 2.damaged", said)
    assert (folder / "checkpoints/2.damaged").is_dir()
    run.save(2, state(2), about(2))  # the steps are done again
    run.close()
    step, run = opened(folder)
    run.close()
    assert (step, run.steps()) == (2, [1, 2])
    assert not (folder / "checkpoints/2.damaged").exists()


def test_where_all_are_damaged_the_run_begins_anew(folder, capsys):
    for step in (1, 2):
        cut(folder / f"checkpoints/{step}/state/_METADATA")
    step, run = opened(folder)
    run.close()
    assert (step, run.steps(), run.notes()) == (0, [], {})
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("field", ["files", "about", "identity", "arrays"])
def test_a_manifest_without_a_field_is_damaged(folder, field, capsys):
    """Sealed as it is: what another version or a script left out is no KeyError."""
    path = folder / "checkpoints/2/manifest.json"
    content = json.loads(path.read_text())
    del content["sha256"], content[field]
    path.write_text(manifest.sealed(content))
    step, run = opened(folder)
    run.close()
    assert (step, run.steps()) == (1, [1])
    assert (
        f"is damaged: manifest.json: {field} is missing; set aside as 2.damaged"
        in capsys.readouterr().out
    )


def test_a_leftover_without_a_manifest_is_removed(folder, capsys):
    (folder / "checkpoints/2/manifest.json").unlink()
    (folder / "checkpoints/3/state.orbax-checkpoint-tmp-0").mkdir(parents=True)
    step, run = opened(folder)
    run.close()
    assert (step, run.steps()) == (1, [1])
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["1", "run.json"]
    assert capsys.readouterr().out.count("was not written to its end: removed") == 2


def test_the_newest_are_kept(tmp_path):
    for keep, kept in ((1, ["4"]), (2, ["3", "4"])):
        folder = saved(tmp_path / f"{keep}", 1, 2, 3, 4, keep=keep) / "checkpoints"
        assert sorted(path.name for path in folder.iterdir()) == [*kept, "run.json"]
    with pytest.raises(ValueError, match="keep=0 must be 1 or more"):
        RunCheckpoints(tmp_path, IDENTITY, keep=0)


def test_saving_does_not_wait_and_the_old_step_stays_until_the_new_one_is_whole(
    tmp_path, monkeypatch
):
    go_on, inner = threading.Event(), run_checkpoints.described_files

    def slow(folder):
        assert go_on.wait(60)
        return inner(folder)

    saved(tmp_path, 1)
    monkeypatch.setattr(run_checkpoints, "described_files", slow)
    run = RunCheckpoints(tmp_path, IDENTITY, keep=1)
    run.save(2, state(2), about(2))  # returns while its files are not yet hashed
    assert (run.steps(), run.latest_step()) == ([1], 1)
    assert bits(run.restore(state(0))) == bits(state(1))
    go_on.set()
    run.close()
    assert (run.steps(), run.latest_step()) == ([2], 2)


def test_the_state_may_be_donated_while_it_is_written(tmp_path):
    update = jax.jit(lambda x: x + 1.0, donate_argnums=0)
    x = jnp.zeros((512, 512))
    run = RunCheckpoints(tmp_path, IDENTITY, keep=20)
    for step in range(1, 6):
        x = update(x)
        run.save(step, {"x": x})
        for _ in range(3):
            x = update(x)
    run.close()
    for step in range(1, 6):
        run = RunCheckpoints(tmp_path, IDENTITY, keep=20)
        run._latest = step
        np.testing.assert_array_equal(run.restore({"x": x})["x"], 4.0 * step - 3)
        run.close()


def test_a_step_that_is_there_is_not_written_again(folder):
    before = (folder / "checkpoints/2/manifest.json").stat()
    run = RunCheckpoints(folder, IDENTITY)
    run.save(2, state(2), about(2))
    run.close()
    after = (folder / "checkpoints/2/manifest.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_who_is_told_to_stop_leaves_its_state(tmp_path):
    run = RunCheckpoints(tmp_path, IDENTITY)
    with pytest.raises(hosts.Preempted, match="before the first step"):
        run.leave(0, state(0))
    run = RunCheckpoints(tmp_path, IDENTITY)
    with pytest.raises(hosts.Preempted, match="step 3 is saved"):
        run.leave(3, state(3), about(3))
    run.close()  # as a `with closing(run)` does
    step, run = opened(tmp_path)
    run.close()
    assert step == 3


def mesh(*sizes):
    count = int(np.prod(sizes))
    return Mesh(np.array(jax.devices()[:count]).reshape(sizes), ("data", "fsdp"))


@pytest.mark.parametrize("sizes", [(1, 1), (2, 2), (4, 2), (1, 4)])
def test_another_mesh_reads_the_same_state(tmp_path, sizes):
    def laid(array, *of):
        return jax.device_put(array, NamedSharding(mesh(*of), PartitionSpec("fsdp", "data")))

    array = jax.random.normal(jax.random.key(1), (16, 8))
    run = RunCheckpoints(tmp_path, IDENTITY)
    run.save(1, {"w": laid(array, 2, 4)})
    run.close()
    run = RunCheckpoints(tmp_path, IDENTITY)
    found = run.restore({"w": laid(jnp.zeros_like(array), *sizes)})["w"]
    run.close()
    assert found.sharding == laid(array, *sizes).sharding
    np.testing.assert_array_equal(found, array)


def test_a_state_of_other_arrays_is_refused(folder):
    run = RunCheckpoints(folder, IDENTITY)
    other = state(0)
    other["policy"]["w"] = jnp.zeros((6, 5))
    told = r"checkpoints/2 holds another state: \['policy'\]\['w'\] is float32 \[6, 4\] there and float32 \[6, 5\] here"
    with pytest.raises(ValueError, match=told):
        run.restore(other)
    with pytest.raises(ValueError, match=r"\['more'\] is None there and bfloat16 \[2\] here"):
        run.restore({**state(0), "more": jnp.zeros(2, jnp.bfloat16)})
    run.close()


def test_another_run_is_refused_and_nothing_of_this_one_is_touched(folder):
    (folder / "checkpoints/3").mkdir()  # a leftover
    before = files_of(folder)
    with pytest.raises(ValueError, match=r"holds another run: model\.width is 8 there and 16 here"):
        RunCheckpoints(folder, {**IDENTITY, "model": {"width": 16}})
    assert files_of(folder) == before and (folder / "checkpoints/3").exists()


def test_a_run_of_another_size_names_the_field_and_binds_nobody_before_its_first_state(tmp_path):
    identity, other = (
        {"model": dataclasses.asdict(layout)}
        for layout in (TokenLayout(), TokenLayout(semantic_codes=8))
    )
    RunCheckpoints(tmp_path, other).close()
    run = RunCheckpoints(tmp_path, identity)
    run.save(1, state(1))
    run.close()
    with pytest.raises(ValueError, match=r"model\.semantic_codes is 1024 there and 8 here"):
        RunCheckpoints(tmp_path, other)


def test_the_manifest_knows_the_run_where_run_json_is_damaged(folder):
    path = folder / "checkpoints/run.json"
    whole = path.read_text()
    for damaged in ("", whole.replace("ab12", "ab13")):
        path.write_text(damaged)
        with pytest.raises(ValueError, match="holds another run: seed is 0 there and 1 here"):
            RunCheckpoints(folder, {**IDENTITY, "seed": 1})
        step, run = opened(folder)
        run.close()
        assert step == 2
        assert path.read_text() == whole
    path.write_text(whole.replace("ab12", "ab13"))
    for step in (1, 2):
        (folder / f"checkpoints/{step}/manifest.json").write_text("")
    with pytest.raises(ValueError, match=r"run.json does not have the digest .* remove that file"):
        RunCheckpoints(folder, IDENTITY)


def test_run_json_of_an_older_version_binds(tmp_path):
    checkpoint.save_model(tmp_path, TokenLayout(), state(0)["policy"])
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


def test_a_full_disk_is_said_before_anything_is_written(folder, monkeypatch):
    step, run = opened(folder)
    before = files_of(folder)
    monkeypatch.setattr(run_checkpoints.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(OSError, match=r"no space to save in .*checkpoints: 0 MB needed"):
        run.save(3, state(3))
    run.close()
    assert files_of(folder) == before
    assert run.latest_step() == step == 2


def test_an_error_in_the_background_is_raised_at_the_next_call(folder, monkeypatch):
    def broken(_):
        raise OSError(5, "Input/output error")

    for then in ("save", "close"):
        run = RunCheckpoints(folder, IDENTITY)
        with monkeypatch.context() as patch:
            patch.setattr(run_checkpoints, "described_files", broken)
            run.save(3, state(3))
            with pytest.raises(
                OSError,
                match=r"step 3 cannot be saved in .*: Input/output error; .*that of step 2\.",
            ):
                run.save(4, state(4)) if then == "save" else run.close()
        run.close()
        assert run.steps() == [1, 2]
        assert not (folder / "checkpoints/3").exists()
    run = RunCheckpoints(folder, IDENTITY)
    run.save(3, state(3), about(3))
    run.close()
    step, run = opened(folder)
    run.close()
    assert step == 3


@pytest.fixture
def small_disk(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", path], capture_output=True
    ).returncode:
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
    run.latest_step()
    with monkeypatch.context() as patch:  # another process takes the space in the meantime
        patch.setattr(run_checkpoints.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 40))
        run.save(2, {"x": jax.random.normal(jax.random.key(1), (1 << 20,))})
        patch.setattr(run_checkpoints.shutil, "disk_usage", usage)
        with pytest.raises(
            OSError, match=r"step 2 .* in .*: No space left on device; 5 MB needed, .* step 1\."
        ):
            run.close()
    assert not capfd.readouterr().err  # one error, not what is below it as well
    run = RunCheckpoints(small_disk, IDENTITY)
    assert run.latest_step() == 1
    np.testing.assert_array_equal(run.restore({"x": noise})["x"], noise)
    run.save(2, {"x": noise})
    run.close()
    assert run.steps() == [1, 2]


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError, match=r"file/run/checkpoints cannot be written to: Not a directory; mend"
    ):
        RunCheckpoints(tmp_path / "file/run", IDENTITY)


def test_a_folder_that_is_gone_is_named(folder):
    run = RunCheckpoints(folder, IDENTITY)
    assert run.latest_step() == 2
    shutil.move(folder, folder.with_name("elsewhere"))
    with pytest.raises(
        OSError, match=r"checkpoints cannot be written to: No such file .* that of step 2\."
    ):
        run.save(3, state(3))
    run.close()
    assert not folder.exists()


WORKER = """
import sys
from run_checkpoints_test import RunCheckpoints, IDENTITY, state, about
run = RunCheckpoints(sys.argv[1], IDENTITY)
step = run.latest_step()
while True:
    step += 1
    run.save(step, state(step), about(step))
    print(step, flush=True)
"""


def test_a_killed_run_goes_on_from_a_whole_step(tmp_path, processes):
    """Kill -9 at any time: of the steps whose save has begun, the newest or the one before is whole."""
    random = np.random.default_rng(0)
    paths = os.pathsep.join(
        str(path) for path in (Path(__file__).parent, Path(__file__).parents[2])
    )
    settings = {"env": {**os.environ, "PYTHONPATH": paths}, "stdout": subprocess.PIPE, "text": True}
    before = 0
    for _ in range(4):
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
        step, run = opened(tmp_path)
        run.close()
        assert step >= begun[-1] - 1
        before = step
