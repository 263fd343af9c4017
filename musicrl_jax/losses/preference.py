"""Losses on pairs of clips of which a listener chose one: Bradley-Terry's for a reward, DPO's for a policy.

Legend: B pairs. A vote is the share of listeners that chose the first clip: 1, 0, or between.
"""

import jax
import jax.numpy as jnp

Metrics = dict[str, jax.Array]


def bradley_terry(margin: jax.Array, vote: jax.Array) -> tuple[jax.Array, Metrics]:
    """Nats per vote, where the first clip is chosen with probability sigmoid(margin) (MusicRL 3.2).

    Args:
      margin: f32 [B], the score of the first clip less that of the second.
      vote: f32 [B] in [0, 1].

    Returns:
      (loss f32 [], metrics: loss; accuracy, over the votes that are no ties, a margin of 0 counting half; margin, its
      mean distance from 0).
    """
    loss = -(vote * jax.nn.log_sigmoid(margin) + (1 - vote) * jax.nn.log_sigmoid(-margin)).mean()
    decided = (vote != 0.5).astype(margin.dtype)
    right = 0.5 * (1 + jnp.sign(margin) * jnp.sign(vote - 0.5))
    accuracy = (decided * right).sum() / jnp.maximum(decided.sum(), 1.0)
    return loss, {"loss": loss, "accuracy": accuracy, "margin": jnp.abs(margin).mean()}


def dpo_margin(policy: jax.Array, anchor: jax.Array, beta: float) -> jax.Array:
    """The margin of the reward that a policy implies, beta log(policy / anchor) (DPO, 2305.18290, equation 7).

    Args:
      policy, anchor: f32 [B, 2], the log-probability of each clip of a pair.
      beta: the KL strength, above 0; a / (1 - a) in the terms of `policy_gradient`.

    Returns:
      f32 [B], for `bradley_terry`.
    """
    implied = beta * (policy - anchor)
    return implied[:, 0] - implied[:, 1]
