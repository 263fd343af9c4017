"""One jitted step of supervised training: `train` runs it, and `musicrl plan` compiles it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from musicrl_jax.core import sharding
from musicrl_jax.core.keys import Stream, step_key
from musicrl_jax.losses.optimiser import TrainState, apply_gradients, create_state
from musicrl_jax.objectives.objective import Batch, Metrics, Objective


def first_state(
    objective: Objective, transform: optax.GradientTransformation, key: jax.Array, batch: Batch
) -> TrainState:
    """Returns the state before the first step."""
    return create_state(objective.init(key, batch), transform)


def training_step(
    objective: Objective,
    transform: optax.GradientTransformation,
    seed: int,
    mesh: Mesh,
    shardings: Any,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]:
    """Returns the jitted function (state, frozen, batch) -> (state, metrics); donates the state.

    A non-finite loss or gradient changes nothing but the counts of skipped batches.
    """

    def step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        # The gradient and the update.
        key = step_key(seed, state.step, Stream.TRAINING)
        gradient = jax.value_and_grad(objective.loss, has_aux=True)
        (loss, (collections, metrics)), gradients = gradient(
            state.params, state.state, frozen, batch, key
        )
        params, opt_state = apply_gradients(transform, gradients, state.opt_state, state.params)
        norm = optax.tree.norm(gradients)
        updated = state.replace(
            params=params,
            state=collections,
            opt_state=opt_state,
            in_a_row=jnp.zeros_like(state.in_a_row),
        )

        # Skip the update unless everything is finite.
        skipped = state.replace(skipped=state.skipped + 1, in_a_row=state.in_a_row + 1)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, skipped)
        metrics = {**metrics, "gradient_norm": norm}
        for name in ("skipped", "in_a_row"):
            metrics[name] = getattr(after, name).astype(jnp.float32)
        return after.replace(step=state.step + 1), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)))
