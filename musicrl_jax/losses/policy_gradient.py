"""KL-anchored REINFORCE with a learned baseline (MusicRL 3.3), with the exact gradient of its KL term.

The objective, for clips of S tokens and a KL strength a:

    J = (1 - a) E[R] - a KL(pi || anchor),    KL = E[sum_t KL_t],
    KL_t = sum_v pi(v | s_t) log(pi(v | s_t) / anchor(v | s_t))

Differentiating KL_t alone along sampled paths leaves out that earlier tokens choose the states in which later KL is
paid. The exact gradient adds sum_t grad log pi(a_t | s_t) * (KL still to come), with sum_{t' > t} KL_t' as its weight.
That weight is large early in a clip and much the same in all clips, so it has a baseline: the other clips' mean.

Legend: B clips, S tokens of a clip in the order in which they are drawn, V codes.
"""

import jax
import jax.numpy as jnp


def full_kl(log_policy: jax.Array, log_anchor: jax.Array) -> jax.Array:
    """KL_t over the full vocabulary: log-distributions f32 [B, S, V] -> f32 [B, S], at least 0, exactly 0 where equal.

    A code that the policy never draws (log-probability -inf, whatever the anchor's) adds nothing, to the gradient too.
    """
    drawn = log_policy > -jnp.inf
    ratio = jnp.where(drawn, log_policy, 0.0) - jnp.where(drawn, log_anchor, 0.0)
    return jnp.sum(jnp.exp(log_policy) * ratio, axis=-1)


def still_to_come(per_token: jax.Array) -> jax.Array:
    """Sum over the tokens after each token, the token itself left out: f32 [B, S] -> f32 [B, S]."""
    inclusive = jnp.flip(jnp.cumsum(jnp.flip(per_token, axis=1), axis=1), axis=1)
    return inclusive - per_token


def other_clips_mean(x: jax.Array) -> jax.Array:
    """For each clip the mean over the other clips, position by position: f32 [B, S] -> f32 [B, S], 0 where B is 1.

    The other clips are independent of this one, so as a baseline it leaves the expected gradient as it is.
    """
    return (x.sum(axis=0, keepdims=True) - x) / max(len(x) - 1, 1)


def policy_loss(
    log_policy: jax.Array,
    log_anchor: jax.Array,
    tokens: jax.Array,
    rewards: jax.Array,
    values: jax.Array,
    kl_strength: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A scalar whose gradient is minus an unbiased estimate of grad J; its value means nothing by itself.

    Args:
      log_policy: f32 [B, S, V], at the temperature that the tokens were drawn at. Gradients flow here alone.
      log_anchor: f32 [B, S, V], at the same temperature.
      tokens: int32 [B, S].
      rewards: f32 [B], one a clip; no discount.
      values: f32 [B, S], the baseline, which must not have seen the token that it judges.
      kl_strength: a in [0, 1).

    Returns:
      (loss f32 [], metrics: kl in nats a clip, log_prob of the tokens, advantage's spread).
    """
    log_probs = jnp.take_along_axis(log_policy, tokens[..., None], axis=-1)[..., 0]  # [B, S]
    kl = full_kl(log_policy, log_anchor)  # [B, S]
    reward_advantage = rewards[:, None] - values
    kl_to_come = still_to_come(kl)
    kl_advantage = kl_to_come - other_clips_mean(kl_to_come)
    advantage = (1 - kl_strength) * reward_advantage - kl_strength * kl_advantage
    surrogate = log_probs * jax.lax.stop_gradient(advantage) - kl_strength * kl
    metrics = {
        "kl": kl.sum(axis=1).mean(),
        "log_prob": log_probs.mean(),
        "advantage_std": reward_advantage.std(),
    }
    return -surrogate.sum(axis=1).mean(), metrics


def value_loss(values: jax.Array, rewards: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Least squares of every prefix's value on the clip's reward: f32 [B, S], f32 [B] -> (f32 [], metrics).

    The metric `explained_variance` is 1 - Var(R - V) / Var(R) over all tokens of the batch.
    """
    errors = rewards[:, None] - values
    explained = 1 - errors.var() / jnp.maximum(rewards.var(), 1e-12)
    return jnp.square(errors).mean(), {"explained_variance": explained, "value": values.mean()}
