"""The learner: turns a rollout and its rewards into the next policy, as one pure step.

Legend: B clips, b clips of a microbatch, S tokens of a clip in sampling order.
"""

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from musicrl_jax.core.precision import at_least_float32, in_dtype
from musicrl_jax.losses.optimiser import apply_gradients
from musicrl_jax.losses.policy_gradient import (
    Advantage,
    Scores,
    adapted_strength,
    advantage,
    policy_loss,
    value_loss,
)
from musicrl_jax.rl.config import RLConfig
from musicrl_jax.systems.system import MusicSystem, Rollout, Tree

Metrics = dict[str, jax.Array]  # f32 [] each


@flax.struct.dataclass
class RLState:
    """Everything an update reads and writes.

    Attributes:
      step: int32 [], number of rollouts learned from.
      skipped: int32 [], rollouts with an update that a non-finite reward or gradient prevented.
      kl_strength: f32 [], a in J = (1 - a) E[R] - a KL.
      policy: weights of the policy.
      value: weights of the value function; {} for the other baselines.
      policy_opt: the policy optimiser's moments.
      value_opt: the value optimiser's moments.
    """

    step: jax.Array
    skipped: jax.Array
    kl_strength: jax.Array
    policy: Tree
    value: Tree
    policy_opt: Tree
    value_opt: Tree


class ComputeCopy(NamedTuple):
    """The weights that an update computes with, in the config's dtype."""

    policy: Tree
    anchor: Tree
    value: Tree


class Batch(NamedTuple):
    """A scored rollout; in microbatches, each array is [microbatches, b, ...]."""

    rollout: Rollout
    reference: Tree  # the anchor's scores, as the system keeps them
    advantage: Advantage
    reward: jax.Array


@dataclasses.dataclass(frozen=True)
class Learner:
    """A KL-anchored policy gradient as one pure step.

    Attributes:
      system: the system whose policy is trained.
      config: the settings. The number of microbatches does not change the update. Gradients are
        summed over devices in `config.dtype`, and over microbatches in float32.
    """

    system: MusicSystem
    config: RLConfig

    @property
    def learns_values(self) -> bool:
        """Whether the baseline is a value function."""
        return self.config.gradient.baseline == "value"

    @cached_property
    def policy_transform(self) -> optax.GradientTransformation:
        """The policy's optimiser."""
        return self.config.policy_optimiser.build(self.config.steps * self.config.updates)

    @cached_property
    def value_transform(self) -> optax.GradientTransformation:
        """The value function's optimiser."""
        return self.config.value_optimiser.build(self.config.steps * self.config.updates)

    # --- the state before the first update ---

    def create(self, key: jax.Array) -> RLState:
        """Returns a state with random weights; `start_from` replaces them by the base's."""
        # Values are random too, until `start_from` and `with_baseline` set them.
        policy = self.system.init(key)
        value = self.system.init_values(key) if self.learns_values else {}
        moments = self.policy_transform.init(policy), self.value_transform.init(value)
        zero = jnp.zeros((), jnp.int32)
        return RLState(zero, zero, jnp.float32(self.config.kl_strength), policy, value, *moments)

    def start_from(self, state: RLState, base: Tree) -> RLState:
        """Returns the state with the base's weights in policy and value (MusicRL 3.3)."""
        state = state.replace(policy=jax.tree.map(jnp.copy, base))
        if not self.learns_values:
            return state
        return state.replace(value=self.system.start_values(state.value, base))

    def with_baseline(self, state: RLState, reward: jax.Array) -> RLState:
        """Starts the value function at the mean of the first rollout's finite rewards, f32 [B].

        A value function that starts at 0 would reinforce every token of the first rollouts.
        """
        if not self.learns_values:
            return state
        # Without a finite reward the mean is 0, and the update is skipped.
        finite = jnp.isfinite(reward)
        count = jnp.maximum(finite.sum(dtype=jnp.float32), 1.0)
        mean = jnp.where(finite, reward, 0.0).sum() / count
        return state.replace(value=self.system.centre_values(state.value, mean))

    def compute_copy(self, state: RLState, anchor: Tree) -> ComputeCopy:
        """Returns the weights that `update` computes with."""
        return in_dtype(ComputeCopy(state.policy, anchor, state.value), self.config.dtype)

    # --- the update ---

    def update(
        self,
        state: RLState,
        weights: ComputeCopy,
        rollout: Rollout,
        reward: jax.Array,
        shardings: RLState | None = None,
        copy_shardings: ComputeCopy | None = None,
    ) -> tuple[RLState, Metrics]:
        """Makes the config's number of updates with one rollout.

        A non-finite reward or gradient leaves policy, value and moments unchanged.

        Args:
          state: the state before.
          weights: `compute_copy` of the state and the anchor, for the first update.
          rollout: B clips, sampled by the state's policy.
          reward: f32 [B].
          shardings: shardings of the state; gradients are summed over microbatches in these.
          copy_shardings: shardings of the compute copies of later updates.

        Returns:
          (the next state, metrics of the last update).
        """
        # Score the rollout with the policy that sampled it, the anchor and the value function.
        # The same operations score policy and anchor, so with equal weights the KL is exactly 0.
        # One exception: on jax 0.12, XLA at its default effort may fuse the gradient's forward pass
        # differently from the anchor's. Tiny random models then start at 4e-8 nats a clip, trained
        # ones still at 0.
        parts, rewards = jax.tree.map(self._split, (rollout, reward))
        reference = self._map(lambda part: self._reference(weights.anchor, part), parts)
        advantages, metrics = self._advantage(state, weights, parts, reference, rollout, reward)
        batch = Batch(parts, reference, jax.tree.map(self._split, advantages), rewards)

        # Update once, then again from compute copies of the moved weights.
        after, last_metrics = self._update_once(state, weights, batch, shardings)

        def update_again(state: RLState, _: None) -> tuple[RLState, Metrics]:
            copy = self.compute_copy(state, ())
            if copy_shardings is not None:
                places = copy_shardings._replace(anchor=())
                copy = jax.lax.with_sharding_constraint(copy, places)
            return self._update_once(state, copy, batch, shardings)

        if self.config.updates > 1:
            after, history = jax.lax.scan(update_again, after, length=self.config.updates - 1)
            last_metrics = jax.tree.map(lambda x: x[-1], history)

        # A rollout counts once, however many of its updates were skipped.
        skips = after.skipped > state.skipped
        after = after.replace(step=state.step + 1, skipped=state.skipped + skips.astype(jnp.int32))
        metrics |= last_metrics
        metrics |= {"kl_strength": state.kl_strength, "skipped": after.skipped.astype(jnp.float32)}
        if self.config.kl_target_per_second is not None:
            target = self.config.kl_target_per_second * self.config.clip_seconds  # nats a clip
            strength = adapted_strength(state.kl_strength, metrics["kl"], target)
            after = after.replace(kl_strength=jnp.where(skips, state.kl_strength, strength))
        return after, metrics

    def _advantage(
        self,
        state: RLState,
        weights: ComputeCopy,
        parts: Rollout,
        reference: Tree,
        rollout: Rollout,
        reward: jax.Array,
    ) -> tuple[Advantage, Metrics]:
        """Returns the advantages of all tokens, f32 [B, S], and metrics of the rollout."""
        # Advantages are of the whole batch: baselines may look at other clips.
        scores = self._map(lambda *part: self._scores(weights.policy, *part), parts, reference)
        values = self._map(lambda part: self._values(weights.value, part), parts)
        scores, values = self._join(scores), self._join(values)
        strength = state.kl_strength
        advantages, metrics = advantage(self.config.gradient, scores, reward, values, strength)
        # How far the learner's log-probs are from the sampler's: rounding, or a bug.
        drift = scores.log_probs - rollout.sampled.log_probs
        metrics |= {
            "sampler_drift": jnp.abs(drift).max(),
            "sampler_drift_clip": jnp.abs(drift.sum(axis=1)).max(),
        }
        if values is not None:
            metrics |= value_loss(values, reward)[1]
        return advantages, metrics

    def _update_once(
        self,
        state: RLState,
        weights: ComputeCopy,
        batch: Batch,
        shardings: RLState | None,
    ) -> tuple[RLState, Metrics]:
        """Moves policy and value by the gradients of all microbatches."""

        def actor_loss(policy: Tree, part: Batch) -> tuple[jax.Array, Metrics]:
            scores = self._scores(policy, part.rollout, part.reference)
            return policy_loss(self.config.gradient, scores, part.advantage, state.kl_strength)

        def critic_loss(value: Tree, part: Batch) -> tuple[jax.Array, Metrics]:
            loss, _ = value_loss(self._values(value, part.rollout), part.reward)
            return loss, {"value_loss": loss}

        # Update the policy.
        gradients, metrics = self._gradients(
            actor_loss, weights.policy, batch, shardings and shardings.policy
        )
        metrics["policy_norm"] = norm = optax.tree.norm(gradients)
        policy, policy_opt = apply_gradients(
            self.policy_transform, gradients, state.policy_opt, state.policy
        )
        after = state.replace(policy=policy, policy_opt=policy_opt)

        # Update the value function.
        if self.learns_values:
            gradients, value_metrics = self._gradients(
                critic_loss, weights.value, batch, shardings and shardings.value
            )
            value, value_opt = apply_gradients(
                self.value_transform, gradients, state.value_opt, state.value
            )
            after = after.replace(value=value, value_opt=value_opt)
            metrics |= value_metrics
            metrics["value_norm"] = optax.tree.norm(gradients)
            norm += metrics["value_norm"]

        # Skip the update unless everything is finite.
        skipped = state.replace(skipped=state.skipped + 1)
        finite = jnp.isfinite(norm) & jnp.isfinite(batch.reward).all()
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, skipped), metrics

    # --- the system's functions on a microbatch ---

    def _reference(self, anchor: Tree, part: Rollout) -> Tree:
        """Returns the anchor's scores of a microbatch."""
        return self.system.reference(anchor, part.condition, part.sampled, self.config.sampling)

    def _scores(self, policy: Tree, part: Rollout, reference: Tree) -> Scores:
        """Returns log-probs and KL of a microbatch, f32 [b, S]."""
        return self.system.scores(
            policy, reference, part.condition, part.sampled, self.config.sampling
        )

    def _values(self, value: Tree, part: Rollout) -> jax.Array | None:
        """Returns the values of a microbatch, f32 [b, S]; None without a value function."""
        if not self.learns_values:
            return None
        return self.system.values(value, part.condition, part.sampled.tokens)

    # --- microbatches ---

    def _split(self, x: jax.Array) -> jax.Array:
        """Reshapes [B, ...] to [microbatches, b, ...]; a microbatch has clips of every device."""
        return x.reshape(-1, self.config.microbatches, *x.shape[1:]).swapaxes(0, 1)

    def _join(self, tree: Tree) -> Tree:
        """Inverts `_split`."""
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)

    def _map(self, function: Callable[..., Tree], *parts: Tree) -> Tree:
        """Returns function(part) of every microbatch, stacked."""
        if self.config.microbatches == 1:  # XLA's CPU matrix products are slower inside a loop
            return jax.tree.map(lambda x: x[None], function(*_first(parts)))
        return jax.lax.map(lambda part: function(*part), parts)

    def _gradients(
        self,
        loss: Callable[[Tree, Batch], tuple[jax.Array, Metrics]],
        weights: Tree,
        batch: Batch,
        shardings: Tree | None,
    ) -> tuple[Tree, Metrics]:
        """Averages gradients and metrics of a loss over microbatches, in float32.

        Holds the sum and one microbatch's gradients at a time.
        """

        def constrain(gradients: Tree, metrics: Metrics) -> tuple[Tree, Metrics]:
            if shardings is not None:
                gradients = jax.lax.with_sharding_constraint(gradients, shardings)
            return jax.tree.map(at_least_float32, (gradients, metrics))

        def part_gradients(part: Batch) -> tuple[Tree, Metrics]:
            return constrain(*jax.grad(loss, has_aux=True)(weights, part))

        if self.config.microbatches == 1:
            return part_gradients(_first(batch))

        def add(total: tuple[Tree, Metrics], part: Batch) -> tuple[tuple[Tree, Metrics], None]:
            return constrain(*jax.tree.map(jnp.add, total, part_gradients(part))), None

        # The sum starts at zeros of the gradients' shapes.
        shapes = jax.eval_shape(part_gradients, _first(batch))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(add, constrain(*zeros), batch)
        return jax.tree.map(lambda x: x / self.config.microbatches, total)


def _first(parts: Tree) -> Tree:
    """Returns the first microbatch."""
    return jax.tree.map(lambda x: x[0], parts)
