"""The base policy: next-token prediction of interleaved tokens, given MuLan's audio tokens.

See MusicLM, section 3.2.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from musicrl_jax.core import checkpoint
from musicrl_jax.core.precision import in_dtype
from musicrl_jax.losses.lm import cross_entropy
from musicrl_jax.models.musiclm import MusicLM, MusicLMConfig
from musicrl_jax.objectives.objective import Batch, Loss, Metrics, Variables
from musicrl_jax.objectives.token_objective import TokenObjective, policy_tokens


@dataclasses.dataclass(frozen=True)
class PolicyObjective(TokenObjective):
    """Cross-entropy on the tokens that `musicrl encode` wrote.

    Attributes:
      remat: recomputes activations in the backward pass, to save memory.
      dtype: of matrix products in training, see `core.precision.in_dtype`; evaluation is in
        float32.
    """

    model: MusicLMConfig
    remat: bool = dataclasses.field(default=False, metadata=checkpoint.NO_IDENTITY)
    dtype: str = "float32"

    def __post_init__(self) -> None:
        in_dtype({}, self.dtype)  # raises for any other dtype

    def check(self, batch: Batch) -> None:
        """Raises ValueError if the tokens are of another layout."""
        self.check_policy(self.model)

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """Returns random variables of MusicLM."""
        return MusicLM(self.model).init(key, policy_tokens(batch, self.model), batch["mulan"])

    def loss(self, params: Any, state: Any, frozen: Any, batch: Batch, key: jax.Array) -> Loss:
        """Returns nats per token, with dropout."""
        tokens = policy_tokens(batch, self.model)
        logits = MusicLM(self.model, self.remat).apply(
            {"params": in_dtype(params, self.dtype)},
            tokens,
            batch["mulan"],
            deterministic=False,
            rngs={"dropout": key},
        )
        losses, accuracies = _places(logits, tokens)
        loss = losses.mean()
        return loss, (state, {"loss": loss, "accuracy": accuracies.mean()})

    def evaluate(
        self, params: Any, state: Any, frozen: Any, batch: Batch, key: jax.Array
    ) -> Metrics:
        """Returns nats per token without dropout: of all, semantic and coarse tokens."""
        tokens = policy_tokens(batch, self.model)
        logits = MusicLM(self.model).apply({"params": params}, tokens, batch["mulan"])
        losses, accuracies = _places(logits, tokens)
        # The first code of a frame is semantic, the others are coarse.
        return {
            "loss": losses.mean(),
            "semantic": losses[0],
            "coarse": losses[1:].mean(),
            "accuracy": accuracies.mean(),
        }


def _places(logits: tuple[jax.Array, ...], tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns nats per token and accuracy of each place, f32 [K] twice.

    Args:
      logits: f32 [B, F, V_k] for each place k.
      tokens: int32 [B, F, K].
    """
    places = [cross_entropy(each, tokens[:, :, place]) for place, each in enumerate(logits)]
    losses, metrics = zip(*places, strict=True)
    return jnp.stack(losses), jnp.stack([each["accuracy"] for each in metrics])
