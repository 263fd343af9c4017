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


class Pass(NamedTuple):
    """The outputs of a network for a rollout, and how a loss of them reaches its weights."""

    # [microbatches, b, S] each.
    outputs: Tree
    # Maps a loss of (outputs, other arrays) of a microbatch, and these arrays of all microbatches,
    # to the mean gradient and the loss's metrics.
    gradients: Callable[..., tuple[Tree, Metrics]]


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
        # One exception: XLA may fuse the gradient's forward pass differently from the anchor's. The
        # KL of some models and batches then starts at up to 1e-6 nats a clip.
        parts, rewards = jax.tree.map(self._split, (rollout, reward))
        reference = self._map(lambda part: self._reference(weights.anchor, part), parts)

        def run(weights: ComputeCopy) -> tuple[Pass, Pass | None]:
            places = shardings or RLState(*[None] * 7)
            actor = self._pass(self._scores, weights.policy, (parts, reference), places.policy)
            if not self.learns_values:
                return actor, None
            return actor, self._pass(self._values, weights.value, (parts,), places.value)

        passes = run(weights)
        advantages, metrics = self._advantage(state, passes, rollout, reward)
        advantages = jax.tree.map(self._split, advantages)

        # Update once, then again from compute copies of the moved weights.
        after, last_metrics = self._update_once(state, passes, advantages, rewards)

        def update_again(state: RLState, _: None) -> tuple[RLState, Metrics]:
            copy = self.compute_copy(state, ())
            if copy_shardings is not None:
                places = copy_shardings._replace(anchor=())
                copy = jax.lax.with_sharding_constraint(copy, places)
            return self._update_once(state, run(copy), advantages, rewards)

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
        passes: tuple[Pass, Pass | None],
        rollout: Rollout,
        reward: jax.Array,
    ) -> tuple[Advantage, Metrics]:
        """Returns the advantages of all tokens, f32 [B, S], and metrics of the rollout."""
        # Advantages are of the whole batch: baselines may look at other clips.
        actor, critic = passes
        scores, values = self._join(actor.outputs), critic and self._join(critic.outputs)
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
        passes: tuple[Pass, Pass | None],
        advantages: Advantage,
        rewards: jax.Array,
    ) -> tuple[RLState, Metrics]:
        """Moves policy and value by the gradients of all microbatches."""
        actor, critic = passes

        def actor_loss(scores: Scores, advantages: Advantage) -> tuple[jax.Array, Metrics]:
            return policy_loss(self.config.gradient, scores, advantages, state.kl_strength)

        def critic_loss(values: jax.Array, rewards: jax.Array) -> tuple[jax.Array, Metrics]:
            loss, _ = value_loss(values, rewards)
            return loss, {"value_loss": loss}

        # Update the policy.
        gradients, metrics = actor.gradients(actor_loss, advantages)
        metrics["policy_norm"] = norm = optax.tree.norm(gradients)
        policy, policy_opt = apply_gradients(
            self.policy_transform, gradients, state.policy_opt, state.policy
        )
        after = state.replace(policy=policy, policy_opt=policy_opt)

        # Update the value function.
        if critic is not None:
            gradients, value_metrics = critic.gradients(critic_loss, rewards)
            value, value_opt = apply_gradients(
                self.value_transform, gradients, state.value_opt, state.value
            )
            after = after.replace(value=value, value_opt=value_opt)
            metrics |= value_metrics
            metrics["value_norm"] = optax.tree.norm(gradients)
            norm += metrics["value_norm"]

        # Skip the update unless everything is finite.
        skipped = state.replace(skipped=state.skipped + 1)
        finite = jnp.isfinite(norm) & jnp.isfinite(rewards).all()
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

    def _values(self, value: Tree, part: Rollout) -> jax.Array:
        """Returns the values of a microbatch, f32 [b, S]."""
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

    def _pass(
        self, function: Callable[..., Tree], weights: Tree, parts: tuple[Tree, ...], places: Tree
    ) -> Pass:
        """Applies a network to all microbatches.

        The gradient of one microbatch shares this forward pass. With several ones, each runs again
        when its gradient is needed, so that only one holds its activations at a time.

        Args:
          function: of the weights and a microbatch.
          weights: of the network.
          parts: all microbatches.
          places: shardings of the gradient; None leaves them to XLA.
        """

        def forward(part: tuple[Tree, ...]) -> tuple[Tree, Callable]:
            return jax.vjp(lambda weights: function(weights, *part), weights)

        def constrain(gradients: Tree, metrics: Metrics) -> tuple[Tree, Metrics]:
            if places is not None:
                gradients = jax.lax.with_sharding_constraint(gradients, places)
            return jax.tree.map(at_least_float32, (gradients, metrics))

        def pull_back(
            loss: Callable, outputs: Tree, backward: Callable, others: Tree
        ) -> tuple[Tree, Metrics]:
            cotangents, metrics = jax.grad(loss, has_aux=True)(outputs, others)
            return constrain(*backward(cotangents), metrics)

        # One microbatch: its gradient needs no second forward pass.
        if self.config.microbatches == 1:
            outputs, backward = forward(_first(parts))
            return Pass(
                jax.tree.map(lambda x: x[None], outputs),
                lambda loss, others: pull_back(loss, outputs, backward, _first(others)),
            )

        # Several ones: their gradients are summed, from zeros.
        def gradients(loss: Callable, others: Tree) -> tuple[Tree, Metrics]:
            def of_part(part: tuple[Tree, ...], others: Tree) -> tuple[Tree, Metrics]:
                return pull_back(loss, *forward(part), others)

            def add(total: Tree, both: tuple[Tree, Tree]) -> tuple[Tree, None]:
                return constrain(*jax.tree.map(jnp.add, total, of_part(*both))), None

            shapes = jax.eval_shape(of_part, _first(parts), _first(others))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            total, _ = jax.lax.scan(add, constrain(*zeros), (parts, others))
            return jax.tree.map(lambda x: x / self.config.microbatches, total)

        return Pass(self._map(lambda *part: function(weights, *part), *parts), gradients)


def _first(parts: Tree) -> Tree:
    """Returns the first microbatch."""
    return jax.tree.map(lambda x: x[0], parts)
