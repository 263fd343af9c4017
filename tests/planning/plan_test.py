"""Checks what the verb `plan` compiles, prints and refuses, and the budgets of the base size."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import gin
from musicrl_jax import cli, plan
from musicrl_jax.core import sharding
from musicrl_jax.planning import slices
from musicrl_jax.planning.chips import CHIPS

ROOT = Path(__file__).parents[2]
BUDGETS = ROOT / "tests/plan_budgets.json"  # by version of jax: what the base size takes on v5e:4x4
FUNCTION = {"name": "step", "clips": 8, "once": False, "fits": True, "seconds": 2.0, "needed": 1}
# A run of two stages. Their folders, data and tokenizers do not exist.
RUN = """
plan.stages = ({'codec': @codec/train, 'policy': @policy/train},)
plan.clip_seconds = 1.0
codec/train.objective = @CodecObjective()
codec/train.model_dir = %CODEC
CodecObjective.model = @SoundStreamConfig()
SoundStreamConfig.sample_rate_hz = %SAMPLE_RATE_HZ
CodecObjective.data = @Clips()
Clips.datasets = %DATASETS
Clips.data_dir = %DATA_DIR
Clips.sample_rate_hz = %SAMPLE_RATE_HZ
policy/train.objective = @PolicyObjective()
policy/train.model_dir = 'policy'
PolicyObjective.model = @MusicLMConfig()
PolicyObjective.data = @Tokens()
Tokens.directory = 'tokens'
Tokens.models = %TOKENIZERS
TOKENIZERS = {'codec': @codec_hash/model_hash()}
codec_hash/model_hash.directory = %CODEC
CODEC = 'codec'
SAMPLE_RATE_HZ = 24000
train.steps = 2
train.batch_size = 8
train.optimiser = @Optimiser()
Optimiser.learning_rate = 0.1
"""


@pytest.fixture
def planned(monkeypatch):
    """Plans without a compiler; yields (stage, batch size) of each plan."""
    calls = []

    def plan_stage(models, name, stage, mesh_of, chip):
        size = stage.settings["batch_size"]
        calls.append((name, size))
        return [{**FUNCTION, "stage": name, "fits": size < 32}]

    monkeypatch.setattr(slices, "describe", lambda *_: (sharding.make_mesh, CHIPS["v5e"]))
    monkeypatch.setattr(plan, "_plan_stage", plan_stage)
    return calls


def described(stages):
    """Returns stages as gin passes them."""
    return [{name: lambda describe, stage=stage: stage for name, stage in stages.items()}]


def test_every_stage_that_computes_is_planned_or_only_those_named(stages, planned, tmp_path):
    plan.plan(described(stages), 1.0, "v5e:4x4", json_file=str(tmp_path / "plan.json"))
    assert [name for name, _ in planned] == [
        name for name in stages if name not in ("tokenizer", "encode", "base")
    ]
    file = json.loads((tmp_path / "plan.json").read_text())
    assert file["topology"] == "v5e:4x4" and len(file["functions"]) == len(planned)
    planned.clear()
    plan.plan(described(stages), 1.0, "v5e:4x4", only="votes,r")
    assert [name for name, _ in planned] == ["r", "votes"]
    with pytest.raises(ValueError, match=r"plan\.only: 'x' is none of the stages codec, "):
        plan.plan(described(stages), 1.0, "v5e:4x4", only="x")


def test_a_search_doubles_the_batch_until_it_does_not_fit(stages, planned, capsys):
    plan.plan(described(stages), 1.0, "v5e:4x4", only="r,codec", search=True)
    assert planned == [(name, size) for name in ("codec", "r") for size in (8, 16, 32)]
    assert "r: the largest doubled batch that fits is 16" in capsys.readouterr().out


def test_a_function_that_does_not_fit_is_an_error(stages, planned):
    large = {"codec": stages["codec"].with_batch(32)}
    with pytest.raises(ValueError, match=r"codec/step need more than the 15\.75 GiB of a chip"):
        plan.plan(described(large), 1.0, "v5e:4x4")


def test_a_summary_has_the_time_of_a_stage(stages):
    rows = [{**FUNCTION, "name": "compute copy", "once": True}, {**FUNCTION, "clips": 8}]
    summary = plan._summary("votes", stages["votes"], rows, chips=4)
    assert summary == (
        "votes: 2.00 s a step of 8 clips, 4.00 clips a second, 3600 a chip-hour, if nothing "
        "overlaps; 20 pairs in 0.00 hours\n"
    )


def test_gin_files_are_planned_without_models_and_data(planned, tmp_path, monkeypatch):
    """This holds although the tokens name hashes of models that are not trained yet."""
    monkeypatch.chdir(tmp_path)
    Path("run.gin").write_text(RUN)
    assert cli.main(("plan", "--gin_file=run.gin", "--topology=v5e:2x4")) == 0
    gin.clear_config()
    assert planned == [("codec", 8), ("policy", 8)]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra 'plan'")
def test_the_base_size_stays_within_its_budget_on_sixteen_chips(tmp_path, processes):
    """Memory, bytes sent and the compiler's cycles stay within 5 % of plan_budgets.json."""
    budget = json.loads(BUDGETS.read_text()).get(jax.__version__)
    if budget is None:
        pytest.skip(f"plan_budgets.json has none for the compiler of jax {jax.__version__}")
    command = [sys.executable, "-m", "musicrl_jax.cli", "plan", "--topology=v5e:4x4", "--only=r"]
    file = tmp_path / "plan.json"
    files = ["--gin_file=gin/experiments/musicrl_ru.gin", f"--json_file={file}"]
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = processes.run([*command, *files], cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = {row["name"]: row for row in json.loads(file.read_text())["functions"]}
    assert sum(rows["sample"]["wire"].values()) < 0.01e9
    for name, figures in budget.items():
        gib, milliseconds = rows[name]["needed"] / 2**30, 1e3 * rows[name]["compiler_seconds"]
        assert gib == pytest.approx(figures["gib"], rel=0.05), name
        assert milliseconds == pytest.approx(figures["compiler_ms"], rel=0.05), name
    assert not any(row["unknown_loops"] for row in rows.values())
    assert np.all([row["fits"] for row in rows.values()])
