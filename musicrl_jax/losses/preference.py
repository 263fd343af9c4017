"""Losses on pairs of clips: Bradley-Terry for a reward model, DPO for a policy.

Legend: B pairs. A vote is the share of listeners who chose the first clip, in [0, 1].
"""

import jax
import jax.numpy as jnp

Metrics = dict[str, jax.Array]


def bradley_terry(margin: jax.Array, vote: jax.Array) -> tuple[jax.Array, Metrics]:
    """Averages nats per vote; the first clip is chosen with probability sigmoid(margin).

    This is the reward model's loss in MusicRL, section 3.2.

    Args:
      margin: f32 [B], the first clip's score minus the second's.
      vote: f32 [B] in [0, 1].

    Returns:
      The loss f32 [], and metrics: loss; accuracy over votes that are not ties (a margin of 0
      counts half); margin, the mean absolute margin.
    """
    loss = -(vote * jax.nn.log_sigmoid(margin) + (1 - vote) * jax.nn.log_sigmoid(-margin)).mean()
    # Ties do not count.
    decided = (vote != 0.5).astype(margin.dtype)
    right = 0.5 * (1 + jnp.sign(margin) * jnp.sign(vote - 0.5))
    accuracy = (decided * right).sum() / jnp.maximum(decided.sum(), 1.0)
    return loss, {"loss": loss, "accuracy": accuracy, "margin": jnp.abs(margin).mean()}


def dpo_margin(policy: jax.Array, anchor: jax.Array, beta: float) -> jax.Array:
    """Computes the margin of a policy's implied reward beta log(policy / anchor).

    This is DPO (2305.18290, equation 7).

    Args:
      policy: f32 [B, 2], log-probabilities of both clips of each pair.
      anchor: f32 [B, 2], the same under the anchor.
      beta: the KL strength, above 0; a / (1 - a) in the terms of `policy_gradient`.

    Returns:
      f32 [B], for `bradley_terry`.
    """
    implied = beta * (policy - anchor)
    return implied[:, 0] - implied[:, 1]
