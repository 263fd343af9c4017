"""The learner: everything between a rollout with its rewards and the next policy, as one pure step.

Legend: B clips, b clips of a microbatch, S tokens of a clip in the order of sampling.
"""

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

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


@flax.struct.dataclass
class RLState:
    """Everything an update reads and writes.

    Attributes:
      step: int32 [], number of updates done.
      skipped: int32 [], rollouts whose update was left out, as a reward or gradient was not finite.
      kl_strength: f32 [], a in J = (1 - a) E[R] - a KL.
      policy: weights of the policy.
      value: weights of the value function; {} if the baseline is another.
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
    """The weights of policy, anchor and value as an update computes with them: in its dtype."""

    policy: Tree
    anchor: Tree
    value: Tree


@dataclasses.dataclass(frozen=True)
class Learner:
    """A KL-anchored policy gradient as one pure step.

    Attributes:
      system: whose policy is trained.
      config: the settings; microbatches are scored and differentiated one after the other, and the
        update is the same. Gradients are summed over devices in `config.dtype`, and over
        microbatches in float32.
    """

    system: MusicSystem
    config: RLConfig

    @property
    def learns_values(self) -> bool:
        """Whether the baseline is a value function."""
        return self.config.gradient.baseline == "value"

    @cached_property
    def policy_transform(self) -> optax.GradientTransformation:
        """How the policy moves."""
        return self.config.policy_optimiser.build(self.config.steps * self.config.updates)

    @cached_property
    def value_transform(self) -> optax.GradientTransformation:
        """How the value function moves."""
        return self.config.value_optimiser.build(self.config.steps * self.config.updates)

    # --- the state before the first update ---

    def create(self, key: jax.Array) -> RLState:
        """Returns a state of the right shapes; `started` puts the base's weights into it."""
        policy = self.system.init(key)
        value = self.system.init_values(key) if self.learns_values else {}
        moments = self.policy_transform.init(policy), self.value_transform.init(value)
        zero = jnp.zeros((), jnp.int32)
        return RLState(zero, zero, jnp.float32(self.config.kl_strength), policy, value, *moments)

    def started(self, state: RLState, base: Tree) -> RLState:
        """Returns the state with the base's weights in policy and value (MusicRL 3.3)."""
        state = state.replace(policy=jax.tree.map(jnp.copy, base))
        if not self.learns_values:
            return state
        return state.replace(value=self.system.start_values(state.value, base))

    def with_baseline(self, state: RLState, reward: jax.Array) -> RLState:
        """Starts the value at the mean reward f32 [B] of the first rollout.

        From 0, all that was sampled first would be reinforced.
        """
        if not self.learns_values:
            return state
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
        layout: RLState | None = None,
        gathered: RLState | None = None,
    ) -> tuple[RLState, dict[str, jax.Array]]:
        """Makes all updates of a rollout.

        If a reward or a gradient is not finite nothing moves, and the rollout is counted once in
        `skipped`.

        Args:
          state: the state before.
          weights: the `compute_copy` of the state and its anchor, for the first update.
          rollout: B clips, drawn by the state's policy.
          reward: f32 [B].
          layout: shardings of the state; gradients are then summed over microbatches so sharded.
          gathered: shardings of the weights that later updates compute with.

        Returns:
          (the next state, metrics f32 [] each, of the last update).
        """
        config = self.config
        parts, rewards = jax.tree.map(self._split, (rollout, reward))
        # Policy and anchor are scored by the very same operations: as long as their weights are
        # equal so are the log-probs, and the KL is 0 to the bit.
        reference = self._map(lambda part: self._reference(weights.anchor, part), parts)
        worth, metrics = self._worth(state, weights, parts, reference, rollout, reward)
        batch = parts, reference, jax.tree.map(self._split, worth), rewards

        def again(state: RLState, _: None) -> tuple[RLState, dict[str, jax.Array]]:
            copy = self.compute_copy(state, ())
            if gathered is not None:
                shardings = ComputeCopy(gathered.policy, (), gathered.value)
                copy = jax.lax.with_sharding_constraint(copy, shardings)
            return self._update_once(state, copy, batch, reward, layout)

        after, found = self._update_once(state, weights, batch, reward, layout)
        if config.updates > 1:
            after, found = jax.lax.scan(again, after, None, length=config.updates - 1)
            found = jax.tree.map(lambda x: x[-1], found)
        metrics |= found

        # A rollout counts once, however many of its updates were left out.
        skips = after.skipped > state.skipped
        after = after.replace(skipped=state.skipped + skips.astype(jnp.int32))
        if config.kl_target_per_second is not None:
            target = config.kl_target_per_second * config.clip_seconds  # nats a clip, as the KL
            strength = adapted_strength(state.kl_strength, metrics["kl"], target)
            after = after.replace(kl_strength=jnp.where(skips, state.kl_strength, strength))
        metrics |= {
            "kl_strength": state.kl_strength,
            "skipped": after.skipped.astype(jnp.float32),
        }
        return after.replace(step=state.step + 1), metrics

    def _worth(
        self,
        state: RLState,
        weights: ComputeCopy,
        parts: Rollout,
        reference: Tree,
        rollout: Rollout,
        reward: jax.Array,
    ) -> tuple[Advantage, dict[str, jax.Array]]:
        """Returns what the rollout is worth to the policy that drew it, and metrics of that."""
        before = self._joined(
            self._map(
                lambda part, reference: self._scored(weights.policy, reference, part),
                parts,
                reference,
            )
        )
        values = self._joined(self._map(lambda part: self._valued(weights.value, part), parts))
        worth, metrics = advantage(self.config.gradient, before, reward, values, state.kl_strength)
        drift = before.log_probs - rollout.sampled.log_probs
        metrics |= {
            "sampler_drift": jnp.abs(drift).max(),
            "sampler_drift_clip": jnp.abs(drift.sum(axis=1)).max(),
        }
        if values is not None:
            metrics |= value_loss(values, reward)[1]
        return worth, metrics

    def _update_once(
        self,
        state: RLState,
        weights: ComputeCopy,
        batch: tuple[Rollout, Tree, Advantage, jax.Array],
        reward: jax.Array,
        layout: RLState | None,
    ) -> tuple[RLState, dict[str, jax.Array]]:
        """Moves policy and value once, by the gradients of all microbatches."""
        gradient, strength = self.config.gradient, state.kl_strength
        parts, reference, worth, rewards = batch

        def actor(policy: Tree, part: Rollout, reference: Tree, worth: Advantage) -> Any:
            return policy_loss(gradient, self._scored(policy, reference, part), worth, strength)

        def critic(value: Tree, part: Rollout, reward: jax.Array) -> jax.Array:
            return value_loss(self._valued(value, part), reward)[0]

        # The policy.
        slopes = jax.grad(actor, has_aux=True)
        gradients, metrics = self._mean(
            lambda *part: slopes(weights.policy, *part),
            (parts, reference, worth),
            layout and (layout.policy, None),
        )
        metrics["policy_norm"] = norm = optax.tree.norm(gradients)
        policy, policy_opt = apply_gradients(
            self.policy_transform, gradients, state.policy_opt, state.policy
        )
        taken = state.replace(policy=policy, policy_opt=policy_opt)

        # The value.
        if self.learns_values:
            slopes = jax.value_and_grad(critic)
            metrics["value_loss"], gradients = self._mean(
                lambda *part: slopes(weights.value, *part),
                (parts, rewards),
                layout and (None, layout.value),
            )
            value, value_opt = apply_gradients(
                self.value_transform, gradients, state.value_opt, state.value
            )
            taken = taken.replace(value=value, value_opt=value_opt)
            metrics["value_norm"] = optax.tree.norm(gradients)
            norm += metrics["value_norm"]

        # Nothing moves unless everything is finite.
        left_out = state.replace(skipped=state.skipped + 1)
        finite = jnp.isfinite(norm) & jnp.isfinite(reward).all()
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), taken, left_out), metrics

    # --- the system's functions on a microbatch ---

    def _reference(self, anchor: Tree, part: Rollout) -> Tree:
        return self.system.reference(anchor, part.condition, part.sampled, self.config.sampling)

    def _scored(self, policy: Tree, reference: Tree, part: Rollout) -> Scores:
        """Returns log-probs and KL of a microbatch, f32 [b, S]."""
        return self.system.scores(
            policy, reference, part.condition, part.sampled, self.config.sampling
        )

    def _valued(self, value: Tree, part: Rollout) -> jax.Array | None:
        """Returns the values f32 [b, S], if there are any."""
        if not self.learns_values:
            return None
        return self.system.values(value, part.condition, part.sampled.tokens)

    # --- microbatches ---

    def _split(self, x: jax.Array) -> jax.Array:
        """[B, ...] -> [microbatches, b, ...]; each microbatch has clips of every device."""
        count = self.config.microbatches
        return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)

    def _joined(self, tree: Tree) -> Tree:
        """Inverts `_split`."""
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)

    def _map(self, function: Callable, *parts: Tree) -> Tree:
        """Returns function(part) of every microbatch, stacked."""
        if self.config.microbatches == 1:  # without a loop, in which XLA's CPU products are slower
            return jax.tree.map(lambda x: x[None], function(*jax.tree.map(lambda x: x[0], parts)))
        return jax.lax.map(lambda part: function(*part), parts)

    def _mean(
        self, function: Callable, parts: tuple[Tree, ...], layout: tuple[Tree, Tree] | None
    ) -> Any:
        """Averages function(part), a pair, over microbatches in float32.

        One microbatch's result is held at a time, and the sum. `layout` has the sharding of each
        half of the pair, or None.
        """

        def laid_out(pair: Any) -> Any:
            where = layout or (None, None)
            pair = tuple(
                side if at is None else jax.lax.with_sharding_constraint(side, at)
                for side, at in zip(pair, where, strict=True)
            )
            return jax.tree.map(at_least_float32, pair)

        if self.config.microbatches == 1:
            return laid_out(function(*jax.tree.map(lambda x: x[0], parts)))
        first = jax.eval_shape(
            lambda *part: laid_out(function(*part)), *jax.tree.map(lambda x: x[0], parts)
        )
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return laid_out(jax.tree.map(jnp.add, total, laid_out(function(*part)))), None

        total = jax.lax.scan(add, laid_out(nothing), parts)[0]
        return jax.tree.map(lambda x: x / self.config.microbatches, total)
