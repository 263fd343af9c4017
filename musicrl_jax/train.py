"""Trains the model of any objective by supervised learning: codec, semantic, MuLan, policy, ...

Each step is one jitted function, `objectives.step.training_step`; this file does the bookkeeping.
"""

import dataclasses
from collections.abc import Callable, Iterator
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
from musicrl_jax.report.live import CLIPS, LiveCharts, loss_curves

LOG_EVERY = 10  # steps; the last step and those with a checkpoint are logged too
SHOW_EVERY = 100  # steps between two updates of the run's page and clips


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
    """Trains an objective's model, and writes it to `model_dir`; resumes an interrupted run.

    Args:
      objective: model, data and loss.
      model_dir: folder of the run, and of the trained model.
      steps: number of updates.
      batch_size: examples in a step, over all devices.
      optimiser: the optimiser.
      seed: seed of the weights, the order of data and the noise.
      fsdp: size of the mesh's axis that shards weights and batches.
      tensor: size of the mesh's axis that shards heads and inner layers.
      save_every: steps between two checkpoints.
      evaluation_batches: validation batches after training.

    Returns:
      The validation metrics; {} without validation examples, or if the run was done already.

    Raises:
      ValueError: if model_dir has another run: other sizes, settings or data.
      FloatingPointError: if losses or gradients are not finite many times in a row, or a validation
        metric is not finite.
      hosts.Preempted: if the run was told to stop; its state is saved.
    """
    # The run: a folder belongs to one, and a finished one is left as it is.
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

    # Data. The first batch gives the shapes of the model.
    mesh = sharding.make_mesh(fsdp, tensor)
    rows = sharding.own_rows(mesh, batch_size)
    frozen = objective.frozen()
    frozen = sharding.put(frozen, sharding.spread(mesh, frozen))
    first = next(objective.data.batches("train", batch_size, seed, rows=rows))
    objective.check(first)

    # Create weights and optimiser state, already sharded. Restore those of an interrupted run.
    transform = optimiser.build(steps)
    create = partial(first_state, objective, transform)
    example = sharding.put_batch(mesh, first, batch_size)
    state, shardings = sharding.create_sharded(mesh, create, jax.random.key(seed), example)
    step_function = training_step(objective, transform, seed, mesh, shardings)
    start = checkpoints.latest_step()
    state = checkpoints.restore(state) if start else _initialised(objective, state, shardings)

    # The loop.
    batches = objective.data.batches("train", batch_size, seed, start_step=start, rows=rows)
    progress = Progress(range(start, steps), directory.name, steps, start)
    with closing(checkpoints), jax.set_mesh(mesh), MetricWriter(directory, start) as writer:
        show = _shower(objective, example, writer, directory, batch_size)
        with hosts.stopping_together() as stopping:
            for step in progress:
                if stopping():
                    checkpoints.leave(step, state)

                # One update.
                batch = sharding.put_batch(mesh, next(batches), batch_size)
                state, metrics = step_function(state, frozen, batch)

                # Metrics. A run that only skips updates ends here.
                saves = (step + 1) % save_every == 0
                if step % LOG_EVERY == 0 or step == steps - 1 or saves:
                    numbers = {name: float(value) for name, value in metrics.items()}
                    if numbers["in_a_row"] >= min(MOST_SKIPPED, steps):
                        _check_finite(numbers, step, directory)
                    writer.write(step, numbers)
                    progress.note(f"loss {numbers['loss']:.3f}")
                show(step, state, step == steps - 1)
                if saves:
                    checkpoints.save(step + 1, state)

            # The work after the last step can be stopped, and then starts again from here.
            if start < steps:
                checkpoints.save(steps, state)

        # An objective may need one more pass over the data, for instance for k-means.
        def epoch() -> Iterator[dict[str, np.ndarray]]:
            batches = objective.data.batches("train", batch_size, seed, epochs=1)
            total = -(-objective.data.count("train") // batch_size)
            return iter(Progress(batches, "last pass", total))

        variables = objective.finish({"params": state.params, **state.state}, frozen, epoch)

        # Validation.
        # Metrics that are not finite end the run before its model is saved.
        metrics = _validate(
            objective, variables, frozen, mesh, batch_size, seed, evaluation_batches
        )
        _check_finite(metrics, steps, directory)
        writer.write(steps, metrics, prefix="validation/")

    # The model marks the run as complete.
    figures = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
    print(f"{directory.name:>9}  validation  {figures}", flush=True)
    checkpoint.save_model(directory, objective.model, variables, objective.assets())
    return metrics


def _shower(
    objective: Objective, batch: Any, writer: MetricWriter, directory: Path, batch_size: int
) -> Callable[[int, TrainState, bool], None]:
    """Returns a function that shows a step, its state, and whether it is the last."""
    # Clips need all devices, while files are the first host's.
    make = jax.jit(objective.clips)
    charts = LiveCharts(
        writer,
        directory,
        batch_size,
        getattr(objective.model, "sample_rate_hz", 0),
        [f"training clip {number}" for number in range(1, min(CLIPS, batch_size) + 1)],
        "Clips of the first training batch.",
        loss_curves,
    )

    def show(step: int, state: TrainState, last: bool) -> None:
        charts.end_step(step)
        if last or (step + 1) % SHOW_EVERY == 0:
            clips = sharding.fetch(make({"params": state.params, **state.state}, batch))
            charts.show(step, {name: wavs[:CLIPS] for name, wavs in clips.items()})

    return show


def _initialised(objective: Objective, state: TrainState, shardings: TrainState) -> TrainState:
    """Returns the state with the weights that the objective starts from."""
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
    """Averages metrics over validation batches; {} if there are too few examples for one.

    If there are fewer examples than `batch_size`, batches are smaller. A metric that needs more
    examples in a batch is left out with a message.
    """
    # The size of a batch.
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    available = objective.data.count("validation") if "validation" in objective.data.splits() else 0
    batch_size = min(batch_size, available // shards * shards)
    if not batch_size:
        print("too few validation examples for one batch: not validated")
        return {}

    # Metrics.
    params = variables["params"]
    state = {name: tree for name, tree in variables.items() if name != "params"}
    evaluate = jax.jit(objective.evaluate)
    rows = sharding.own_rows(mesh, batch_size)
    batches = objective.data.batches("validation", batch_size, seed, rows=rows)
    parts = []
    for number in range(count):
        hosts.stop_point()
        batch = sharding.put_batch(mesh, next(batches), batch_size)
        key = step_key(seed, number, Stream.VALIDATION)
        parts.append(evaluate(params, state, frozen, batch, key))
    means = {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}

    # Leave out metrics of too few examples, but not those that end the run.
    for name, least in objective.LEAST_EXAMPLES.items():
        message = too_small(batch_size, least)
        if message and np.isfinite(means.get(name, np.nan)):
            del means[name]
            print(f"validation {name}: {message}, clips or votes in a batch", flush=True)
    return means


def _check_finite(metrics: dict[str, float], step: int, directory: Path) -> None:
    """Raises FloatingPointError if a metric is not finite."""
    for name, value in metrics.items():
        if not np.isfinite(value):
            raise FloatingPointError(
                f"{directory.name}: {name} is {value} at step {step}; lower "
                "Optimiser.learning_rate, in a new MODEL_DIR"
            )
