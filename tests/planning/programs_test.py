"""Checks the functions of a run, without data, vocabulary or checkpoints."""

import dataclasses

import jax
import pytest

from musicrl_jax.core import sharding
from musicrl_jax.planning.programs import VERBS, amount, programs
from musicrl_jax.planning.stages import Stage

ROLLOUT = ["compute copy", "condition", "sample", "codes", "decode"]
REWARD = ["gather scorers", "reward"]
FUNCTIONS = {
    "train": ["step"],
    "train_rl": [*ROLLOUT, *REWARD, "learner's compute copy", "update"],
    "collect": [*ROLLOUT, "features"],
    "evaluate": [*ROLLOUT, *REWARD, "kl", "features"],
}


def test_every_function_of_a_run_lowers_on_a_mesh(stages, models):
    """`ru` has the functions of `r` too."""
    mesh, planned, lowered = sharding.make_mesh(2, 2), {}, set()
    for name, stage in stages.items():
        if stage.verb in VERBS and name != "r":
            planned[name] = programs(models, stage, mesh)
    for name, functions in planned.items():
        assert [program.name for program in functions] == FUNCTIONS[stages[name].verb], name
        for program in functions:
            assert {x.sharding.mesh for x in jax.tree.leaves(program.beside)} <= {mesh}
            # Verbs share the functions of a rollout and its reward: those of one verb are lowered.
            key = program.name if program.name in ROLLOUT + REWARD else (name, program.name)
            if key not in lowered:
                program.function.trace(*program.arguments).lower()
                lowered.add(key)
    clips = {name: functions[0].clips for name, functions in planned.items()}
    assert (clips["votes"], clips["evaluate"], clips["ru"]) == (16, 8, 8)


def test_arrays_in_memory_during_a_rollout_are_beside_it(stages, models):
    """While sampling, memory holds the training state, the frozen parts and their copies."""
    functions = programs(models, stages["r"], sharding.make_mesh(2, 1))
    by_name = {program.name: program for program in functions}
    (state, anchor, frozen, scorers), copies = by_name["sample"].beside
    assert set(frozen) == set(copies) == {"soundstorm", "soundstream", "mulan"}
    assert jax.tree.structure(anchor) == jax.tree.structure(state.policy)
    assert set(scorers) == {"text_adherence", "acoustic_quality"}
    idle = by_name["codes"].beside[2]
    assert set(idle) == {"soundstream", "mulan"}
    assert by_name["update"].arguments[0] == state


def test_the_amount_of_a_stage_is_its_batches(stages):
    assert amount(stages["votes"], 16) == (1 + 2, "20 pairs")  # 8 of validation, 12 of train
    assert amount(stages["votes"], 8) == (2 + 3, "20 pairs")
    assert amount(stages["evaluate"], 8) == (10, "5 x 16 clips")  # 3 systems and 2 candidates
    assert amount(stages["r"], 8) == (3, "3 steps")
    larger = stages["r"].with_batch(16), stages["policy"].with_batch(16)
    assert [stage.settings["batch_size"] for stage in larger] == [16, 16]


def test_data_without_shapes_are_refused_by_name(stages, models):
    objective = dataclasses.replace(stages["codec"].arguments["objective"], data=object())
    stage = Stage("train", {**stages["codec"].arguments, "objective": objective})
    with pytest.raises(ValueError, match="object does not have the shapes of its batches"):
        programs(models, stage, sharding.make_mesh())
