"""One supervised loop for every objective: codec, semantic, MuLan, policy, fine, quality.

The order of a run: data, state born sharded, one jitted step, metrics and checkpoints on the way, an evaluation at the
end, the finished model in `model_dir`/model.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from musicrl_jax.core import checkpoint, sharding
from musicrl_jax.core.keys import step_key
from musicrl_jax.core.metrics import MetricWriter
from musicrl_jax.core.progress import Progress
from musicrl_jax.core.state import Optimiser, TrainState, create_state, moved
from musicrl_jax.objectives.objective import Batch, Metrics, Objective


def train(
    objective: Objective,
    model_dir: str,
    steps: int,
    batch_size: int,
    optimiser: Optimiser,
    seed: int = 0,
    fsdp: int = 1,
    tensor: int = 1,
    log_every: int = 10,
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
      log_every: steps between two lines of metrics.
      save_every: steps between two checkpoints.
      evaluation_batches: validation batches at the end, if there are validation examples.

    Returns:
      The validation metrics; {} where nothing was left to do.

    Raises:
      ValueError: where model_dir holds another run.
      FloatingPointError: where the loss, its gradient or a validation metric is not finite.
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
    checkpoints = checkpoint.RunCheckpoints(directory, identity)
    if checkpoint.has_model(directory):
        print(f"{directory}: trained already")
        checkpoints.close()
        return {}

    # Data, weights and the optimiser.
    mesh = sharding.make_mesh(fsdp, tensor)
    transform = optimiser.build(steps)
    frozen = jax.device_put(objective.frozen(), sharding.replicated(mesh))
    example = sharding.put_batch(mesh, next(objective.data.batches("train", batch_size, seed)))

    def create(key: jax.Array, batch: Batch) -> TrainState:
        return create_state(objective.init(key, batch), transform)

    state, shardings = sharding.born_sharded(mesh, create, jax.random.key(seed), example)
    start = checkpoints.latest_step()
    if start:
        state = checkpoints.restore(state)
    else:
        state = state.replace(params=jax.device_put(objective.start(state.params), shardings.params))

    # One step.
    def train_step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        key = step_key(seed, state.step, stream=1)
        gradient = jax.value_and_grad(objective.loss, has_aux=True)
        (_, (other, metrics)), gradients = gradient(state.params, state.state, frozen, batch, key)
        params, opt_state = moved(transform, gradients, state.opt_state, state.params)
        metrics = {**metrics, "gradient_norm": optax.tree.norm(gradients)}
        return TrainState(state.step + 1, params, other, opt_state), metrics

    replicated = sharding.replicated(mesh)
    step_function = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, replicated))
    batches = objective.data.batches("train", batch_size, seed, start_step=start)
    progress = Progress(range(start, steps), directory.name, steps, start)
    with jax.set_mesh(mesh), MetricWriter(directory, start) as writer:
        for step in progress:
            state, metrics = step_function(state, frozen, sharding.put_batch(mesh, next(batches)))
            saved = (step + 1) % save_every == 0
            if step % log_every == 0 or step == steps - 1 or saved:
                numbers = {name: float(value) for name, value in metrics.items()}
                _stop_unless_finite(numbers, step, directory)
                writer.write(step, numbers)
                progress.note(f"loss {numbers['loss']:.3f}")
            if saved:
                checkpoints.save(step + 1, state)

        # What follows the last step, and the figures on data that was not trained on.
        def epoch() -> Iterator[dict[str, np.ndarray]]:
            total = -(-objective.data.count("train") // batch_size)
            return iter(Progress(objective.data.batches("train", batch_size, seed, epochs=1), "last pass", total))

        variables = objective.finish({"params": state.params, **state.state}, frozen, epoch)
        metrics = _validate(objective, variables, frozen, mesh, batch_size, seed, evaluation_batches)
        _stop_unless_finite(metrics, steps, directory)
        writer.write(steps, metrics, prefix="validation/")
    print(f"{directory.name:>9}  validation  " + "  ".join(f"{k} {v:.3f}" for k, v in metrics.items()), flush=True)
    checkpoints.close()
    checkpoint.save_model(directory, objective.model, variables, objective.assets())
    return metrics


def _validate(
    objective: Objective, variables: Any, frozen: Any, mesh: Any, batch_size: int, seed: int, count: int
) -> dict[str, float]:
    """Means over `count` validation batches, smaller ones where there are few examples; {} where there are none."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    available = objective.data.count("validation") if "validation" in objective.data.splits() else 0
    batch_size = min(batch_size, available // shards * shards)
    if not batch_size:
        print("too few validation examples for one batch: not validated")
        return {}
    state = dict(variables)
    params = state.pop("params")
    evaluate = jax.jit(objective.evaluate)
    batches = objective.data.batches("validation", batch_size, seed)
    found = []
    for i in range(count):
        batch = sharding.put_batch(mesh, next(batches))
        found.append(evaluate(params, state, frozen, batch, step_key(seed, i, stream=2)))
    return {name: float(np.mean([metrics[name] for metrics in found])) for name in found[0]}


def _stop_unless_finite(metrics: dict[str, float], step: int, directory: Path) -> None:
    bad = [name for name, value in metrics.items() if not np.isfinite(value)]
    if bad:
        raise FloatingPointError(
            f"{directory.name}: {bad[0]} is {metrics[bad[0]]} at step {step}; lower Optimiser.learning_rate, "
            "in a new MODEL_DIR"
        )
