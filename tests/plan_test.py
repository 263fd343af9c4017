"""Runs planned: every function of a run as it would be compiled, and what is said of it."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import gin
from musicrl_jax import cli, plan
from musicrl_jax.core import checkpoint, sharding
from musicrl_jax.core.calls import recordable, recorded
from musicrl_jax.models.musiclm import MusicLMConfig
from musicrl_jax.planning import estimate
from musicrl_jax.planning.chips import CHIPS

ROOT = Path(__file__).parents[1]
BUDGETS = ROOT / "tests/plan_budgets.json"  # by version of jax: what the base size takes on v5e:4x4

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra 'plan'")


@pytest.fixture(scope="module")
def calls():
    """The stages of the tiny run, as `musicrl plan` sees them."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_topology", lambda topology, slices: (sharding.make_mesh, CHIPS["v5e"]))
        patch.setattr(plan, "_stage", lambda calls, name, *rest: found.update(calls) or [])
        assert cli.main(("plan", f"--gin_file={ROOT}/gin/runs/tiny.gin", "--topology=v5e:2x4")) == 0
    gin.clear_config()
    return found


def test_every_function_of_a_run_lowers_on_a_mesh(calls, monkeypatch):
    """All that train, without data, vocabulary or checkpoints; their arguments' shapes fit and are where they say."""
    mesh = sharding.make_mesh(2, 2)
    planned = plan.Planned(calls, 1.0, mesh)
    monkeypatch.setattr(checkpoint, "load_model", planned.load_model)
    names = {}
    for name, call in calls.items():
        if call.verb not in ("train", "train_rl"):
            continue
        described = plan._supervised if call.verb == "train" else plan._reinforced
        for program in described(planned, name, mesh):
            lowered = program.function.trace(*program.arguments).lower()
            assert lowered.as_text().startswith("module")
            names.setdefault(name, []).append(program.name)
    rollout = ("gather", "read", "draw", "fill", "sound")
    steps = ("codec", "semantic", "mulan", "quality", "policy", "fine", "preference")
    assert names == {
        **{name: ["step"] for name in steps},
        **{name: [*rollout, "gather scorers", "reward", "gather learner", "update"] for name in ("r", "ru")},
    }


def test_what_is_not_trained_in_the_run_is_named(calls):
    mesh = sharding.make_mesh()
    planned = plan.Planned({"r": calls["r"]}, 1.0, mesh)
    with pytest.raises(ValueError, match=r"no stage of the run trains a MusicLMConfig in .*policy"):
        planned.load_model(calls["r"].arguments["base"], MusicLMConfig)


@pytest.mark.parametrize("topology", ["v5e", "v7x:4x4", "v5e:4", "v5e:4x4x4x4", "v5e:axb"])
def test_a_topology_that_is_none_is_refused(topology):
    with pytest.raises(ValueError, match=r"plan\.topology=.*give one such as v5e:4x4"):
        plan._topology(topology, 1)


def test_a_verb_is_recorded_only_while_a_run_is_planned():
    verb = recordable(lambda a, b=2: a + b)
    assert verb(1) == 3
    with recorded():
        assert verb(1).arguments == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("message", "bytes_"),
    [
        ("Ran out of memory in memory space hbm. Used 20.17G of 15.75G hbm.", 20.17 * 2**30),
        ("the total memory required for HLO temporaries (15.79G) exceeds available HBM (15.75G).", 15.79 * 2**30),
    ],
)
def test_a_refusal_of_the_compiler_says_how_much_was_needed(message, bytes_):
    found = estimate.refused(RuntimeError(f"RESOURCE_EXHAUSTED: {message}"), CHIPS["v5e"], beside=7)
    assert found.needed == int(bytes_) + 7 and not found.fits
    with pytest.raises(RuntimeError, match="another mistake"):
        estimate.refused(RuntimeError("another mistake"), CHIPS["v5e"], 0)


def test_an_estimate_adds_up():
    found = estimate.Estimate(
        1, 2, 3, 4, 5, memory=15, matrix_seconds=0.2, memory_seconds=0.5, network_seconds=0.1, compiler_seconds=0.4
    )
    assert found.needed == 15 and found.fits and found.limit == "memory" and found.seconds == pytest.approx(0.6)
    mesh = sharding.make_mesh(2, 2)
    both = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    tree = {
        "split": jax.ShapeDtypeStruct((8, 6), jnp.bfloat16, sharding=both),
        "whole": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=sharding.replicated(mesh)),
    }
    assert estimate.bytes_a_chip(tree) == 4 * 3 * 2 + 3 * 4


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "slices", "chips"),
    [("v5e:4x4", 1, 16), ("v5e:16x16", 1, 256), ("v5e:16x16", 2, 512), ("v5p:4x4x4", 1, 64), ("v6e:8x8", 1, 64)],
)
def test_four_chips_of_any_slice_share_a_weight(topology, slices, chips, processes):
    """As the base size asks; the four are next to each other, in one slice."""
    code = f"""
import json
from musicrl_jax import plan
mesh = plan._topology({topology!r}, {slices})[0](4, 1)
near = [[(getattr(d, "slice_index", 0), d.coords) for d in group.flat] for group in mesh.devices[:, :, 0]]
print("RESULT", json.dumps([dict(mesh.shape), near]))
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = processes.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    shape, near = json.loads(done.stdout.partition("RESULT ")[2])
    assert shape == {"data": chips // 4, "fsdp": 4, "tensor": 1}
    for group in near:
        assert len({place for place, _ in group}) == 1
        spans = np.ptp([coords for _, coords in group], axis=0)
        assert spans.sum() <= 3


@pytest.mark.slow
@needs_libtpu
def test_the_base_size_keeps_its_budget_on_sixteen_chips(tmp_path, processes):
    """Memory, traffic of the decoding and the compiler's cycles, within 5 % of what stands in plan_budgets.json."""
    budget = json.loads(BUDGETS.read_text()).get(jax.__version__)
    if budget is None:
        pytest.skip(f"plan_budgets.json has none for the compiler of jax {jax.__version__}")
    command = [sys.executable, "-m", "musicrl_jax.cli", "plan", "--topology=v5e:4x4", "--only=r"]
    files = ["--gin_file=gin/experiments/musicrl_ru.gin", f"--json_file={tmp_path / 'plan.json'}"]
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = processes.run([*command, *files], cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = {row["name"]: row for row in json.loads((tmp_path / "plan.json").read_text())["functions"]}
    assert sum(rows["draw"]["wire"].values()) < 0.01e9
    for name, figures in budget.items():
        found = told(rows)[name]
        for figure, value in figures.items():
            assert found[figure] == pytest.approx(value, rel=0.05), (name, figure)
    assert not any(row["unknown_loops"] for row in rows.values())
    assert np.all([row["fits"] for row in rows.values()])


def told(rows):
    """What a budget holds."""
    return {
        name: {"gib": round(row["needed"] / 2**30, 2), "compiler_ms": round(1e3 * row["compiler_seconds"], 1)}
        for name, row in rows.items()
    }
