"""The learner: everything between a rollout with its rewards and the next policy, as one pure step.

Legend: B clips, b clips of a part of the batch, S = F K tokens of a clip in the order in which they are drawn, V codes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from musicrl_jax.losses.optimiser import in_dtype, moved
from musicrl_jax.losses.policy_gradient import (
    Advantage,
    PolicyGradient,
    adapted_strength,
    advantage,
    policy_loss,
    scores,
    value_loss,
)
from musicrl_jax.models.layers import stacked, unstacked
from musicrl_jax.models.musiclm import MusicLM, Value
from musicrl_jax.models.transformer import at_least_float32
from musicrl_jax.rl.rollout import Rollout
from musicrl_jax.rl.sample import Sampling, log_probs, values


@flax.struct.dataclass
class RLState:
    """Everything an update reads and writes.

    Attributes:
      step: int32 [], the updates done.
      skipped: int32 [], the rollouts of which an update was left out because a reward or a gradient was not finite.
      kl_strength: f32 [], a in J = (1 - a) E[R] - a KL.
      policy, value: weights; the value's are {} where the baseline is none.
      policy_opt, value_opt: the optimisers' moments.
    """

    step: jax.Array
    skipped: jax.Array
    kl_strength: jax.Array
    policy: Any
    value: Any
    policy_opt: Any
    value_opt: Any


class AtHand(NamedTuple):
    """The weights of policy, anchor and value as they compute: in the learner's dtype, and where that is quick."""

    policy: Any
    anchor: Any
    value: Any


@dataclasses.dataclass(frozen=True)
class Learner:
    """A KL-anchored policy gradient as one pure step.

    Attributes:
      policy, value: the modules.
      policy_transform, value_transform: how the weights of each move.
      gradient: which policy gradient.
      kl_strength: a in J = (1 - a) E[R] - a KL; where it starts if there is a target.
      sampling: the policy's distribution, the same in sampling and here.
      updates: of each rollout; more than 1 only with the clipped surrogate.
      kl_target: KL in nats a clip that the strength is adapted to, or None.
      microbatches: parts of a batch that are scored and differentiated one after the other, to save memory; the
        update is the same.
      dtype: of products with the weights, as in `losses.optimiser.in_dtype`, and so of gradients while they are added over
        devices; over microbatches they are in float32.
    """

    policy: MusicLM
    value: Value
    policy_transform: optax.GradientTransformation
    value_transform: optax.GradientTransformation
    gradient: PolicyGradient
    kl_strength: float
    sampling: Sampling
    updates: int = 1
    kl_target: float | None = None
    microbatches: int = 1
    dtype: str = "float32"

    @property
    def learns_values(self) -> bool:
        """Whether there is a value at all."""
        return self.gradient.baseline == "value"

    def create(self, key: jax.Array) -> RLState:
        """A state of the right shapes, its weights and moments `stacked`; `started` puts the base's weights into it."""
        config = self.policy.config
        tokens = jnp.zeros((1, 1, config.layout.depth), jnp.int32)
        mulan = jnp.zeros((1, config.mulan_levels), jnp.int32)
        policy = stacked(self.policy.init(key, tokens, mulan)["params"])
        value = stacked(self.value.init(key, tokens, mulan)["params"]) if self.learns_values else {}
        moments = self.policy_transform.init(policy), self.value_transform.init(value)
        zero = jnp.zeros((), jnp.int32)
        return RLState(zero, zero, jnp.float32(self.kl_strength), policy, value, *moments)

    def started(self, state: RLState, base: Any) -> RLState:
        """Policy and the value's trunk with the base's weights, `stacked` (MusicRL 3.3)."""
        state = state.replace(policy=jax.tree.map(jnp.copy, base))
        if not self.learns_values:
            return state
        return state.replace(value={**state.value, "trunk": jax.tree.map(jnp.copy, base["trunk"])})

    def with_baseline(self, state: RLState, reward: jax.Array) -> RLState:
        """V starts at the first rollout's mean reward f32 [B]; from 0, all that was drawn first would be pushed up."""
        if not self.learns_values:
            return state
        finite = jnp.isfinite(reward)
        mean = jnp.where(finite, reward, 0.0).sum() / jnp.maximum(finite.sum(dtype=jnp.float32), 1.0)
        return state.replace(value={**state.value, "offset": mean})

    def at_hand(self, state: RLState, anchor: Any) -> AtHand:
        """What `update` computes with."""
        return in_dtype(AtHand(state.policy, anchor, state.value), self.dtype)

    def update(
        self,
        state: RLState,
        weights: AtHand,
        rollout: Rollout,
        reward: jax.Array,
        layout: RLState | None = None,
        gathered: RLState | None = None,
    ) -> tuple[RLState, dict[str, jax.Array]]:
        """All updates of a rollout: reward f32 [B] -> (the next state, metrics f32 [] each, of the last update).

        The first is by `weights`, those of the state at hand, and of its anchor. With a `layout`, the state's
        shardings, gradients are summed over microbatches as the weights lie; with `gathered`, shardings too, later
        updates bring their weights there. Where a reward or a gradient is not finite nothing moves, and the rollout is
        counted in `skipped`, once.
        """
        parts = jax.tree.map(self._split, rollout)
        rewards = self._split(reward)

        # What the rollout is worth to the policy that drew it. The anchor is scored by the very operations that score
        # the policy: as long as their weights are equal so are the log-probs, and the KL is 0 to the bit.
        log_anchor = self._map(lambda part: self._scored(weights.anchor, part), parts)
        drawn = self._joined(
            self._map(
                lambda part, log_anchor: scores(self._scored(weights.policy, part), log_anchor, _by_clip(part.tokens)),
                parts,
                log_anchor,
            )
        )
        judged = self._joined(self._map(lambda part: self._judged(weights.value, part), parts))
        worth, metrics = advantage(self.gradient, drawn, reward, judged, state.kl_strength)
        drift = drawn.log_probs - _by_clip(rollout.log_probs)
        metrics |= {"sampler_drift": jnp.abs(drift).max(), "sampler_drift_clip": jnp.abs(drift.sum(axis=1)).max()}
        if judged is not None:
            metrics |= value_loss(judged, reward)[1]
        worth = jax.tree.map(self._split, worth)

        def actor(policy: Any, part: Rollout, log_anchor: jax.Array, worth: Advantage) -> Any:
            tokens = _by_clip(part.tokens)
            return policy_loss(self.gradient, self._scored(policy, part), log_anchor, tokens, worth, state.kl_strength)

        def critic(value: Any, part: Rollout, reward: jax.Array) -> jax.Array:
            return value_loss(self._judged(value, part), reward)[0]

        def once(state: RLState, weights: AtHand) -> tuple[RLState, dict[str, jax.Array]]:
            """One update."""
            slopes = jax.grad(actor, has_aux=True)
            gradients, found = self._mean(
                lambda *part: slopes(weights.policy, *part),
                (parts, log_anchor, worth),
                layout and (layout.policy, None),
            )
            found["policy_norm"] = norm = optax.tree.norm(gradients)
            policy, policy_opt = moved(self.policy_transform, gradients, state.policy_opt, state.policy)
            taken = state.replace(policy=policy, policy_opt=policy_opt)
            if self.learns_values:
                slopes = jax.value_and_grad(critic)
                found["value_loss"], gradients = self._mean(
                    lambda *part: slopes(weights.value, *part), (parts, rewards), layout and (None, layout.value)
                )
                value, value_opt = moved(self.value_transform, gradients, state.value_opt, state.value)
                taken = taken.replace(value=value, value_opt=value_opt)
                found["value_norm"] = optax.tree.norm(gradients)
                norm += found["value_norm"]
            left_out = state.replace(skipped=state.skipped + 1)
            finite = jnp.isfinite(norm) & jnp.isfinite(reward).all()
            return jax.tree.map(lambda new, old: jnp.where(finite, new, old), taken, left_out), found

        def again(state: RLState, _: None) -> tuple[RLState, dict[str, jax.Array]]:
            fetched = self.at_hand(state, ())
            if gathered is not None:
                fetched = jax.lax.with_sharding_constraint(fetched, AtHand(gathered.policy, (), gathered.value))
            return once(state, fetched)

        after, found = once(state, weights)
        if self.updates > 1:
            after, found = jax.lax.scan(again, after, None, length=self.updates - 1)
            found = jax.tree.map(lambda x: x[-1], found)
        metrics |= found
        skips = after.skipped > state.skipped
        after = after.replace(skipped=state.skipped + skips.astype(jnp.int32))
        if self.kl_target is not None:
            strength = adapted_strength(state.kl_strength, metrics["kl"], self.kl_target)
            after = after.replace(kl_strength=jnp.where(skips, state.kl_strength, strength))
        metrics |= {"kl_strength": state.kl_strength, "skipped": after.skipped.astype(jnp.float32)}
        return after.replace(step=state.step + 1), metrics

    def _scored(self, weights: Any, part: Rollout) -> jax.Array:
        """The policy's log-distributions f32 [b, S, V]."""
        weights = self._laid(weights)
        return _by_clip(log_probs(self.policy, weights, part.tokens, part.mulan, self.sampling, part.allowed))

    def _judged(self, weights: Any, part: Rollout) -> jax.Array | None:
        """The values f32 [b, S], if there are any."""
        if not self.learns_values:
            return None
        return _by_clip(values(self.value, self._laid(weights), part.tokens, part.mulan))

    def _laid(self, weights: Any) -> Any:
        """The layers in a loop where remat needs one, else in a row, which CPUs go through a quarter faster."""
        return weights if self.policy.remat else unstacked(weights)

    def _split(self, x: jax.Array) -> jax.Array:
        """[B, ...] -> [microbatches, B / microbatches, ...]; every part has clips of every device."""
        return x.reshape(-1, self.microbatches, *x.shape[1:]).swapaxes(0, 1)

    def _joined(self, tree: Any) -> Any:
        """The inverse of `_split`."""
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)

    def _map(self, function: Callable, *parts: Any) -> Any:
        """function(part) of every part, stacked."""
        if self.microbatches == 1:  # no loop around it: XLA's CPU products are slower inside
            return jax.tree.map(lambda x: x[None], function(*jax.tree.map(lambda x: x[0], parts)))
        return jax.lax.map(lambda part: function(*part), parts)

    def _mean(self, function: Callable, parts: tuple[Any, ...], layout: tuple[Any, Any] | None) -> Any:
        """The mean of function(part), a pair, over the parts, in float32 at least; of their results one is kept at a
        time, and their sum."""

        def laid_out(pair: Any) -> Any:
            where = layout or (None, None)
            pair = tuple(
                side if at is None else jax.lax.with_sharding_constraint(side, at)
                for side, at in zip(pair, where, strict=True)
            )
            return jax.tree.map(at_least_float32, pair)

        if self.microbatches == 1:
            return laid_out(function(*jax.tree.map(lambda x: x[0], parts)))
        first = jax.eval_shape(lambda *part: laid_out(function(*part)), *jax.tree.map(lambda x: x[0], parts))
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return laid_out(jax.tree.map(jnp.add, total, laid_out(function(*part)))), None

        return jax.tree.map(lambda x: x / self.microbatches, jax.lax.scan(add, laid_out(nothing), parts)[0])


def _by_clip(x: jax.Array) -> jax.Array:
    """[B, F, K, ...] -> [B, S, ...]."""
    return x.reshape(len(x), -1, *x.shape[3:])
