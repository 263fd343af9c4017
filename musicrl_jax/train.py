"""One supervised loop for every objective: codec, semantic, MuLan, policy, fine, quality.

The order of a run: data, state born sharded, one jitted step, metrics and checkpoints on the way, an evaluation at the
end, the finished model in `model_dir`/model.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from musicrl_jax.core import checkpoint, hosts, lock, sharding
from musicrl_jax.core.keys import Stream, step_key
from musicrl_jax.core.metrics import MetricWriter
from musicrl_jax.core.progress import Progress
from musicrl_jax.core.run_checkpoints import RunCheckpoints
from musicrl_jax.core.statistics import too_small
from musicrl_jax.losses.optimiser import MOST_SKIPPED, Optimiser, TrainState
from musicrl_jax.objectives.objective import Objective
from musicrl_jax.objectives.step import first_state, training_step

LOG_EVERY = (
    10  # steps between two lines of metrics; the last step and the saved ones have a line too
)


@lock.holds("model_dir")
def train(
    objective: Objective,
    model_dir: str,
    steps: int,
    batch_size: int,
    optimiser: Optimiser,
    seed: int = 0,
    fsdp: int = 1,
    tensor: int = 1,
    save_every: int = 1000,
    evaluation_batches: int = 2,
) -> dict[str, float]:
    """Trains an objective and writes `model_dir`/model; goes on from the newest checkpoint there, if any.

    A run that is done already is left as it is; one with other sizes, settings or data is refused.

    Args:
      objective: what is trained.
      model_dir: the run's folder.
      steps: updates in all.
      batch_size: clips a step, over all devices.
      optimiser: how weights move.
      seed: of the weights, the order of data and the noise.
      fsdp, tensor: sizes of the mesh's axes; data takes the other devices.
      save_every: steps between two checkpoints.
      evaluation_batches: validation batches at the end, if there are validation examples.

    Returns:
      The validation metrics; {} where nothing was left to do.

    Raises:
      ValueError: where model_dir holds another run.
      FloatingPointError: where the loss or its gradient is not finite many times in a row, or a validation metric is.
      hosts.Preempted: where the run was told to stop; its state is saved.
    """
    directory = Path(model_dir)
    identity = {
        "objective": type(objective).__name__,
        **checkpoint.describe(objective),
        "batch_size": batch_size,
        "optimiser": dataclasses.asdict(optimiser),
        "seed": seed,
        "steps": steps,
    }
    checkpoints = RunCheckpoints(directory, identity)
    if checkpoint.has_model(directory):
        print(f"{directory}: trained already")
        checkpoints.close()
        return {}

    # Data, weights and the optimiser.
    mesh = sharding.make_mesh(fsdp, tensor)
    rows = sharding.own_rows(mesh, batch_size)
    frozen = objective.frozen()
    frozen = sharding.put(frozen, sharding.spread(mesh, frozen))
    first = next(objective.data.batches("train", batch_size, seed, rows=rows))
    objective.check(first)
    example = sharding.put_batch(mesh, first, batch_size)
    transform = optimiser.build(steps)
    create = partial(first_state, objective, transform)
    state, shardings = sharding.create_sharded(mesh, create, jax.random.key(seed), example)
    step_function = training_step(objective, transform, seed, mesh, shardings)
    start = checkpoints.latest_step()
    state = checkpoints.restore(state) if start else _started(objective, state, shardings)

    # The loop.
    batches = objective.data.batches("train", batch_size, seed, start_step=start, rows=rows)
    progress = Progress(range(start, steps), directory.name, steps, start)
    with closing(checkpoints), jax.set_mesh(mesh), MetricWriter(directory, start) as writer:
        with hosts.stopping_together() as stopping:
            for step in progress:
                if stopping():
                    checkpoints.leave(step, state)
                state, metrics = step_function(
                    state, frozen, sharding.put_batch(mesh, next(batches), batch_size)
                )
                saved = (step + 1) % save_every == 0
                if step % LOG_EVERY == 0 or step == steps - 1 or saved:
                    numbers = {name: float(value) for name, value in metrics.items()}
                    if numbers["in_a_row"] >= min(MOST_SKIPPED, steps):
                        _stop_unless_finite(numbers, step, directory)
                    writer.write(step, numbers)
                    progress.note(f"loss {numbers['loss']:.3f}")
                if saved:
                    checkpoints.save(step + 1, state)

            if start < steps:  # what follows may be stopped, and takes no state with it
                checkpoints.save(steps, state)

        # What follows the last step, and the figures on data that was not trained on.
        def epoch() -> Iterator[dict[str, np.ndarray]]:
            total = -(-objective.data.count("train") // batch_size)
            return iter(
                Progress(
                    objective.data.batches("train", batch_size, seed, epochs=1), "last pass", total
                )
            )

        variables = objective.finish({"params": state.params, **state.state}, frozen, epoch)
        metrics = _validate(
            objective, variables, frozen, mesh, batch_size, seed, evaluation_batches
        )
        _stop_unless_finite(metrics, steps, directory)
        writer.write(steps, metrics, prefix="validation/")
    print(
        f"{directory.name:>9}  validation  "
        + "  ".join(f"{k} {v:.3f}" for k, v in metrics.items()),
        flush=True,
    )
    checkpoint.save_model(directory, objective.model, variables, objective.assets())
    return metrics


def _started(objective: Objective, state: TrainState, shardings: TrainState) -> TrainState:
    """Returns the state before the first step, with the weights that the objective starts from."""
    params = objective.start(state.params)
    if params is state.params:
        return state
    return state.replace(params=sharding.put(params, shardings.params))


def _validate(
    objective: Objective,
    variables: Any,
    frozen: Any,
    mesh: Mesh,
    batch_size: int,
    seed: int,
    count: int,
) -> dict[str, float]:
    """Returns means over `count` validation batches, smaller ones of few examples; {} if there are none.

    What says nothing of batches of so few examples is left out, and named.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    available = objective.data.count("validation") if "validation" in objective.data.splits() else 0
    batch_size = min(batch_size, available // shards * shards)
    if not batch_size:
        print("too few validation examples for one batch: not validated")
        return {}
    state = dict(variables)
    params = state.pop("params")
    evaluate = jax.jit(objective.evaluate)
    batches = objective.data.batches(
        "validation", batch_size, seed, rows=sharding.own_rows(mesh, batch_size)
    )
    parts = []
    for i in range(count):
        hosts.stop_point()
        batch = sharding.put_batch(mesh, next(batches), batch_size)
        parts.append(evaluate(params, state, frozen, batch, step_key(seed, i, Stream.VALIDATION)))
    means = {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}
    for name, least in objective.LEAST_EXAMPLES.items():
        words = too_small(batch_size, least)
        if words and np.isfinite(means.get(name, np.nan)):  # what is not finite stops the run
            del means[name]
            print(f"validation {name}: {words}, clips or votes in a batch", flush=True)
    return means


def _stop_unless_finite(metrics: dict[str, float], step: int, directory: Path) -> None:
    bad = [name for name, value in metrics.items() if not np.isfinite(value)]
    if bad:
        raise FloatingPointError(
            f"{directory.name}: {bad[0]} is {metrics[bad[0]]} at step {step}; lower Optimiser.learning_rate, "
            "in a new MODEL_DIR"
        )
