"""KL-regularised policy gradients: MusicRL, RLOO, GRPO, PPO and expert iteration.

They differ in three choices, which `PolicyGradient` names.

The objective, for clips of S tokens and a KL strength a (MusicRL, section 3.3):

    J = (1 - a) E[R] - a KL(pi || anchor),    KL = E[sum_t KL_t],
    KL_t = sum_v pi(v | s_t) log(pi(v | s_t) / anchor(v | s_t))

Its gradient is an expectation over clips that the policy samples:

    E[sum_t ((1 - a) (R - b_t) - a C_t) grad log pi(a_t | s_t)  -  a grad KL_t],
    C_t = sum_{t' > t} KL_t'

It holds for any baseline b_t that does not depend on the token a_t. C_t is the future KL: earlier
tokens decide in which states later KL is paid. Differentiating KL_t along sampled paths leaves C_t
out. C_t is large early in a clip and similar in all clips, so it has a baseline of its own: the
mean of the other clips.

Legend: B clips, S tokens of a clip in sampling order, V codes, G clips of one prompt (a group).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

BASELINES = ("value", "leave_one_out", "group", "group_std", "best")
SURROGATES = ("reinforce", "clipped")
KLS = ("exact", "local", "sampled")
# Added to the standard deviation of a group's rewards before dividing by it.
LEAST_STD = 1e-4

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class PolicyGradient:
    """The choice of a policy gradient; by default MusicRL's, with the exact gradient of its KL.

    Attributes:
      baseline: subtracted from the reward.
        'value': a learned value of the prefix before each token (MusicRL).
        'leave_one_out': the mean of the prompt's other clips (RLOO, 2402.14740).
        'group': the mean of all the prompt's clips. It includes the clip's own reward, which
          shrinks the reward's gradient by (G - 1) / G (GRPO without the std, 2503.20783).
        'group_std': as 'group', then divided by the group's standard deviation, so that all prompts
          count alike. Not the gradient of J (GRPO, 2402.03300).
        'best': none; each prompt's best clip has advantage 1, the others 0. Not the gradient of J,
          but of the likelihood of the best of G (expert iteration; RAFT, 2304.06767).
      surrogate: multiplied by the advantage.
        'reinforce': log pi(a_t | s_t), for one update per rollout.
        'clipped': the clipped ratio to the probability at sampling (PPO, 1707.06347), for several
          updates per rollout. The first equals REINFORCE's. Later ones keep the states and the
          future KL of the policy that sampled.
      kl: estimate of the KL's gradient.
        'exact': over the full vocabulary, with the future KL. Unbiased.
        'local': over the full vocabulary in the sampled states, without the future KL. Biased.
        'sampled': the log ratio of this and all later tokens, in the reward. Unbiased, noisier.
      clip: largest distance of a ratio from 1.
      group: G, the clips of a prompt in a batch, next to each other. Unused with baseline 'value'.
    """

    baseline: str = "value"
    surrogate: str = "reinforce"
    kl: str = "exact"
    clip: float = 0.2
    group: int = 4

    def __post_init__(self) -> None:
        for name, options in (("baseline", BASELINES), ("surrogate", SURROGATES), ("kl", KLS)):
            if (value := getattr(self, name)) not in options:
                raise ValueError(f"PolicyGradient.{name} = {value!r} must be one of {options}")
        if not 0 < self.clip < 1:
            raise ValueError(f"PolicyGradient.clip = {self.clip} must be between 0 and 1")
        if self.group < 2:
            raise ValueError(
                f"PolicyGradient.group = {self.group} must be 2 or more: clips are compared"
            )

    @property
    def clips_per_prompt(self) -> int:
        """The clips of a prompt: 1 with a learned value, else G."""
        return 1 if self.baseline == "value" else self.group


# --- tokens ---


class Scores(NamedTuple):
    """The scores of a rollout's tokens by policy and anchor, f32 [B, S] each."""

    # Log-probability under the policy.
    log_probs: jax.Array
    # Log-probability under the anchor.
    anchor: jax.Array
    # KL_t, over the full vocabulary.
    kl: jax.Array


def full_kl(log_policy: jax.Array, log_anchor: jax.Array) -> jax.Array:
    """Computes KL_t over the full vocabulary: f32 [B, S, V] twice -> f32 [B, S].

    It is exactly 0 where policy and anchor are equal. A code of probability 0 under the policy adds
    nothing to the value or the gradient, whatever its probability under the anchor.
    """
    # The anchor's -inf would give NaN gradients even where it is multiplied by 0.
    possible = log_policy > -jnp.inf
    ratio = jnp.where(possible, log_policy, 0.0) - jnp.where(possible, log_anchor, 0.0)
    return jnp.sum(jnp.exp(log_policy) * ratio, axis=-1)


def token_log_probs(log_distribution: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns each token's log-probability: f32 [..., V], int32 [...] -> f32 [...]."""
    return jnp.take_along_axis(log_distribution, tokens[..., None], axis=-1)[..., 0]


def scores(log_policy: jax.Array, log_anchor: jax.Array, tokens: jax.Array) -> Scores:
    """Evaluates tokens int32 [B, S] under two log-distributions f32 [B, S, V].

    Both must be at the sampling temperature.
    """
    policy, anchor = (token_log_probs(x, tokens) for x in (log_policy, log_anchor))
    return Scores(policy, anchor, full_kl(log_policy, log_anchor))


def sum_from_here(per_token: jax.Array) -> jax.Array:
    """Sums each token and all later ones: f32 [B, S] -> f32 [B, S]."""
    return jnp.flip(jnp.cumsum(jnp.flip(per_token, axis=1), axis=1), axis=1)


def future_sum(per_token: jax.Array) -> jax.Array:
    """Sums all later tokens, without the token itself: f32 [B, S] -> f32 [B, S]."""
    return sum_from_here(per_token) - per_token


def other_clips_mean(x: jax.Array) -> jax.Array:
    """Averages the other clips at each position: f32 [B, ...] -> f32 [B, ...]; 0 if B is 1.

    As a baseline it leaves the expected gradient unchanged: other clips are independent.
    """
    return (x.sum(axis=0, keepdims=True) - x) / max(len(x) - 1, 1)


# --- advantages ---


class Advantage(NamedTuple):
    """The advantages of a rollout's tokens before any update; no gradient flows through them."""

    # f32 [B, S], the factor of each token's surrogate.
    weight: jax.Array
    # f32 [B, S], log-probability under the policy that sampled the tokens.
    log_probs: jax.Array


def reward_advantage(
    choice: PolicyGradient, rewards: jax.Array, values: jax.Array | None
) -> jax.Array:
    """Subtracts the baseline from the rewards.

    Args:
      choice: the policy gradient.
      rewards: f32 [B].
      values: f32 [B, S] with baseline 'value', else None.

    Returns:
      f32 [B, S] with baseline 'value', else [B, 1].

    Raises:
      ValueError: if B is not a multiple of the group.
    """
    # One clip per prompt.
    if choice.baseline == "value":
        return rewards[:, None] - values
    if len(rewards) % choice.group:
        raise ValueError(
            f"a batch of {len(rewards)} clips is not a whole number of groups of {choice.group}"
        )

    # Groups of G clips.
    groups = rewards.reshape(-1, choice.group)
    if choice.baseline == "leave_one_out":
        advantage = groups - jax.vmap(other_clips_mean)(groups)
    elif choice.baseline == "best":
        best = (groups == groups.max(axis=1, keepdims=True)).astype(groups.dtype)
        advantage = best / best.sum(axis=1, keepdims=True)  # equal clips share the 1
    else:
        advantage = groups - groups.mean(axis=1, keepdims=True)
    if choice.baseline == "group_std":
        advantage = advantage / (groups.std(axis=1, keepdims=True) + LEAST_STD)
    return advantage.reshape(-1, 1)


def advantage(
    choice: PolicyGradient,
    sampled: Scores,
    rewards: jax.Array,
    values: jax.Array | None,
    kl_strength: jax.Array | float,
) -> tuple[Advantage, Metrics]:
    """Computes the advantages of a rollout.

    Args:
      choice: the policy gradient.
      sampled: scores of all clips of the rollout by the policy that sampled them.
      rewards: f32 [B], one per clip, not discounted.
      values: f32 [B, S]; each must not depend on its own token. None unless baseline is 'value'.
      kl_strength: a in [0, 1), f32 [].

    Returns:
      The advantages, and metrics: kl, in nats per clip; advantage_std, of the rewards alone.
    """
    # The reward.
    reward = reward_advantage(choice, rewards, values)
    weight = jnp.broadcast_to((1 - kl_strength) * reward, sampled.log_probs.shape)

    # The KL that this token's choice causes.
    if choice.kl != "local":
        if choice.kl == "sampled":
            cost = sum_from_here(sampled.log_probs - sampled.anchor)
        else:
            cost = future_sum(sampled.kl)
        weight = weight - kl_strength * (cost - other_clips_mean(cost))
    metrics = {"kl": sampled.kl.sum(axis=1).mean(), "advantage_std": reward.std()}
    return jax.lax.stop_gradient(Advantage(weight, sampled.log_probs)), metrics


# --- losses ---


def policy_loss(
    choice: PolicyGradient,
    current: Scores,
    advantage: Advantage,
    kl_strength: jax.Array | float,
) -> tuple[jax.Array, Metrics]:
    """Returns a scalar whose gradient estimates -grad J. Its value has no meaning.

    The estimate of the first update after a rollout is unbiased where `choice` says so.

    Args:
      choice: the policy gradient.
      current: scores by the policy being updated. Gradients flow through log_probs and kl.
      advantage: of the rollout.
      kl_strength: a in [0, 1), f32 [].

    Returns:
      The loss f32 [], and metrics: log_prob, the tokens' mean; clipped, the share of tokens whose
      ratio is outside 1 -+ clip.
    """
    # The surrogate objective: REINFORCE, or PPO's clipped one.
    ratio = jnp.exp(current.log_probs - advantage.log_probs)
    near = jnp.clip(ratio, 1 - choice.clip, 1 + choice.clip)
    if choice.surrogate == "reinforce":
        surrogate = current.log_probs * advantage.weight
    else:
        surrogate = jnp.minimum(ratio * advantage.weight, near * advantage.weight)

    # The KL; 'sampled' has it in the advantage.
    if choice.kl != "sampled":
        surrogate -= kl_strength * current.kl
    clipped = jnp.mean(ratio != near, dtype=jnp.float32)
    metrics = {"log_prob": current.log_probs.mean(), "clipped": clipped}
    return -surrogate.sum(axis=1).mean(), metrics


def value_loss(values: jax.Array, rewards: jax.Array) -> tuple[jax.Array, Metrics]:
    """Fits the value of each prefix to the clip's reward by least squares.

    Args:
      values: f32 [B, S].
      rewards: f32 [B].

    Returns:
      The loss f32 [], and metrics: explained_variance, 1 - Var(R - V) / Var(R) over all tokens;
      value, the mean.
    """
    errors = rewards[:, None] - values
    explained = 1 - errors.var() / jnp.maximum(rewards.var(), 1e-12)
    return jnp.square(errors).mean(), {"explained_variance": explained, "value": values.mean()}


def adapted_strength(
    strength: jax.Array, kl: jax.Array, target: float, rate: float = 0.1
) -> jax.Array:
    """Adapts the KL strength to a KL target (the controller of 1909.08593).

    Args:
      strength: f32 [].
      kl: of the last update, f32 [].
      target: in the unit of `kl`.
      rate: speed; one step changes the strength by at most a fifth of it.

    Returns:
      f32 [] in (0, 0.5]: larger than `strength` if the KL is above the target, else smaller.
    """
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return jnp.clip(strength * (1.0 + rate * error), 1e-8, 0.5)
