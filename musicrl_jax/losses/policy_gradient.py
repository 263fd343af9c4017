"""KL-anchored policy gradients: MusicRL's (3.3), RLOO, GRPO, PPO and expert iteration, from three choices.

The objective, for clips of S tokens and a KL strength a:

    J = (1 - a) E[R] - a KL(pi || anchor),    KL = E[sum_t KL_t],
    KL_t = sum_v pi(v | s_t) log(pi(v | s_t) / anchor(v | s_t))

Its gradient is an expectation over clips that the policy draws:

    E[sum_t ((1 - a) (R - b_t) - a C_t) grad log pi(a_t | s_t)  -  a grad KL_t],    C_t = sum_{t' > t} KL_t'

for any baseline b_t that has not seen the token a_t. C_t, the KL still to come, is what differentiating KL_t
along sampled paths leaves out: earlier tokens choose the states in which later KL is paid. It is large early in a clip
and much the same in all clips, so it has a baseline of its own: the other clips' mean.

Legend: B clips, S tokens of a clip in the order in which they are drawn, V codes, G clips of a group: of one prompt.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

BASELINES = ("value", "leave_one_out", "group", "group_std", "best")
SURROGATES = ("reinforce", "clipped")
KLS = ("exact", "local", "sampled")
LEAST_STD = 1e-4  # of a group's rewards, where they are divided by it


@dataclasses.dataclass(frozen=True)
class PolicyGradient:
    """Which policy gradient. The defaults are MusicRL's algorithm, with the exact gradient of its KL.

    Attributes:
      baseline: what is taken off the reward.
        'value': a learned value of the prefix before each token (MusicRL).
        'leave_one_out': the mean of the other clips of the prompt (RLOO, 2402.14740).
        'group': the mean of all clips of the prompt; their own reward in it shrinks the reward's gradient by
          (G - 1) / G (GRPO without the std, 2503.20783).
        'group_std': the same, divided by their standard deviation: prompts count alike, whatever is at stake in them.
          Not the gradient of J (GRPO, 2402.03300).
        'best': none; the best clip of each prompt counts 1, the others nothing. Not the gradient of J, but the
          likelihood of what best-of-G would choose (expert iteration; RAFT, 2304.06767).
      surrogate: what the advantage weighs.
        'reinforce': log pi(a_t | s_t); one update a rollout.
        'clipped': the ratio to the probability at sampling, clipped (PPO, 1707.06347); several updates a rollout. The
          first is REINFORCE's; in later ones, states and the KL still to come are those of the policy that drew.
      kl: how its gradient is taken.
        'exact': over the full vocabulary, and the KL still to come. Unbiased.
        'local': over the full vocabulary in the states that were drawn. Biased: leaves out the KL still to come.
        'sampled': the sampled log ratio of this token and those still to come, in the reward. Unbiased, noisier.
      clip: of the ratio, as a distance from 1.
      group: G, clips of each prompt in a batch, next to each other; one clip where the baseline is 'value'.
    """

    baseline: str = "value"
    surrogate: str = "reinforce"
    kl: str = "exact"
    clip: float = 0.2
    group: int = 4

    def __post_init__(self) -> None:
        for name, known in (("baseline", BASELINES), ("surrogate", SURROGATES), ("kl", KLS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"PolicyGradient.{name} = {getattr(self, name)!r} is none of {known}"
                )
        if not 0 < self.clip < 1:
            raise ValueError(f"PolicyGradient.clip = {self.clip} must lie between 0 and 1")
        if self.group < 2:
            raise ValueError(
                f"PolicyGradient.group = {self.group}: a clip is compared with others: 2 or more"
            )

    @property
    def clips_per_prompt(self) -> int:
        """G, or 1 where the baseline is a value."""
        return 1 if self.baseline == "value" else self.group


def full_kl(log_policy: jax.Array, log_anchor: jax.Array) -> jax.Array:
    """KL_t over the full vocabulary: log-distributions f32 [B, S, V] -> f32 [B, S], at least 0, exactly 0 where equal.

    A code that the policy never draws (log-probability -inf, whatever the anchor's) adds nothing, to the gradient too.
    """
    drawn = log_policy > -jnp.inf
    ratio = jnp.where(drawn, log_policy, 0.0) - jnp.where(drawn, log_anchor, 0.0)
    return jnp.sum(jnp.exp(log_policy) * ratio, axis=-1)


def from_here_on(per_token: jax.Array) -> jax.Array:
    """Sum over each token and those after it: f32 [B, S] -> f32 [B, S]."""
    return jnp.flip(jnp.cumsum(jnp.flip(per_token, axis=1), axis=1), axis=1)


def still_to_come(per_token: jax.Array) -> jax.Array:
    """Sum over the tokens after each token, the token itself left out: f32 [B, S] -> f32 [B, S]."""
    return from_here_on(per_token) - per_token


def other_clips_mean(x: jax.Array) -> jax.Array:
    """For each clip the mean over the other clips, position by position: f32 [B, ...] -> the same, 0 where B is 1.

    The other clips are independent of this one, so as a baseline it leaves the expected gradient as it is.
    """
    return (x.sum(axis=0, keepdims=True) - x) / max(len(x) - 1, 1)


def token_log_probs(log_distribution: jax.Array, tokens: jax.Array) -> jax.Array:
    """The log-probability of each token: f32 [..., V], int32 [...] -> f32 [...]."""
    return jnp.take_along_axis(log_distribution, tokens[..., None], axis=-1)[..., 0]


def reward_advantage(
    choice: PolicyGradient, rewards: jax.Array, values: jax.Array | None
) -> jax.Array:
    """The rewards less their baseline: f32 [B], and f32 [B, S] where the baseline is 'value' -> f32 [B, S] or [B, 1].

    ValueError where B is no multiple of the group.
    """
    if choice.baseline == "value":
        return rewards[:, None] - values
    if len(rewards) % choice.group:
        raise ValueError(
            f"a batch of {len(rewards)} clips is no whole number of groups of {choice.group}"
        )
    groups = rewards.reshape(-1, choice.group)
    if choice.baseline == "leave_one_out":
        advantage = groups - jax.vmap(other_clips_mean)(groups)
    elif choice.baseline == "best":
        best = (groups == groups.max(axis=1, keepdims=True)).astype(groups.dtype)
        advantage = best / best.sum(axis=1, keepdims=True)  # equals share
    else:
        advantage = groups - groups.mean(axis=1, keepdims=True)
    if choice.baseline == "group_std":
        advantage = advantage / (groups.std(axis=1, keepdims=True) + LEAST_STD)
    return advantage.reshape(-1, 1)


class Scores(NamedTuple):
    """What policy and anchor say about each token of a rollout, f32 [B, S] all."""

    log_probs: jax.Array  # of the tokens, under the policy that drew them
    anchor: jax.Array  # of the tokens, under the anchor
    kl: jax.Array  # KL_t


def scores(log_policy: jax.Array, log_anchor: jax.Array, tokens: jax.Array) -> Scores:
    """Log-distributions f32 [B, S, V] of both at the temperature of sampling, and tokens int32 [B, S]."""
    of_tokens = token_log_probs(log_policy, tokens), token_log_probs(log_anchor, tokens)
    return Scores(*of_tokens, full_kl(log_policy, log_anchor))


class Advantage(NamedTuple):
    """What a rollout is worth, token by token, before anything has moved; no gradient flows through it."""

    weight: jax.Array  # f32 [B, S], of each token's surrogate
    log_probs: jax.Array  # f32 [B, S], of the tokens under the policy that drew them


def advantage(
    choice: PolicyGradient,
    drawn: Scores,
    rewards: jax.Array,
    values: jax.Array | None,
    kl_strength: jax.Array | float,
) -> tuple[Advantage, dict[str, jax.Array]]:
    """The weights of a rollout's tokens.

    Args:
      choice: which policy gradient.
      drawn: of all clips of the rollout: baselines may look at other clips.
      rewards: f32 [B], one a clip; no discount.
      values: f32 [B, S], which must not have seen the token that they judge; None where the baseline is no value.
      kl_strength: a in [0, 1), f32 [].

    Returns:
      (the advantages, metrics: kl, in nats a clip; advantage_std, of rewards alone).
    """
    reward = reward_advantage(choice, rewards, values)
    weight = jnp.broadcast_to((1 - kl_strength) * reward, drawn.log_probs.shape)
    if choice.kl != "local":
        sampled = choice.kl == "sampled"
        cost = from_here_on(drawn.log_probs - drawn.anchor) if sampled else still_to_come(drawn.kl)
        weight = weight - kl_strength * (cost - other_clips_mean(cost))
    found = jax.lax.stop_gradient(Advantage(weight, drawn.log_probs))
    return found, {"kl": drawn.kl.sum(axis=1).mean(), "advantage_std": reward.std()}


def policy_loss(
    choice: PolicyGradient,
    current: Scores,
    advantage: Advantage,
    kl_strength: jax.Array | float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns a scalar whose gradient is minus an estimate of grad J; its value means nothing.

    The estimate is unbiased in the first update after a rollout where `choice` says so.

    Args:
      choice: which policy gradient.
      current: scores by the policy that is updated. Gradients flow through its log_probs and kl.
      advantage: of the rollout.
      kl_strength: a in [0, 1), f32 [].

    Returns:
      (loss f32 [], metrics: log_prob of the tokens; clipped, the share of tokens whose ratio left
      1 -+ clip).
    """
    ratio = jnp.exp(current.log_probs - advantage.log_probs)
    near = jnp.clip(ratio, 1 - choice.clip, 1 + choice.clip)
    if choice.surrogate == "reinforce":
        surrogate = current.log_probs * advantage.weight
    else:
        surrogate = jnp.minimum(ratio * advantage.weight, near * advantage.weight)
    if choice.kl != "sampled":
        surrogate -= kl_strength * current.kl
    clipped = jnp.mean(ratio != near, dtype=jnp.float32)
    metrics = {"log_prob": current.log_probs.mean(), "clipped": clipped}
    return -surrogate.sum(axis=1).mean(), metrics


def value_loss(values: jax.Array, rewards: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Least squares of every prefix's value on the clip's reward: f32 [B, S], f32 [B] -> (f32 [], metrics).

    The metric `explained_variance` is 1 - Var(R - V) / Var(R) over all tokens of the batch.
    """
    errors = rewards[:, None] - values
    explained = 1 - errors.var() / jnp.maximum(rewards.var(), 1e-12)
    return jnp.square(errors).mean(), {"explained_variance": explained, "value": values.mean()}


def adapted_strength(
    strength: jax.Array, kl: jax.Array, target: float, rate: float = 0.1
) -> jax.Array:
    """The KL strength after an update whose KL was `kl`: raised where that is above `target`, in the same unit, lowered
    where it is below (the controller of 1909.08593): f32 [] -> f32 [], in (0, 0.5].

    A step moves it by at most a fifth of `rate`.
    """
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return jnp.clip(strength * (1.0 + rate * error), 1e-8, 0.5)
