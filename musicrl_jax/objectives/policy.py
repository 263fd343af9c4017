"""The base policy: next-token prediction of interleaved tokens, given MuLan's audio tokens.

See MusicLM, section 3.2.
"""

import dataclasses
from typing import Any

import jax

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
        loss, metrics = cross_entropy(logits, tokens)
        return loss, (state, {"loss": loss, **metrics})

    def evaluate(
        self, params: Any, state: Any, frozen: Any, batch: Batch, key: jax.Array
    ) -> Metrics:
        """Returns nats per token without dropout: of all, semantic and coarse tokens."""
        tokens = policy_tokens(batch, self.model)
        logits = MusicLM(self.model).apply({"params": params}, tokens, batch["mulan"])
        loss, metrics = cross_entropy(logits, tokens)
        # The first code of a frame is semantic, the others are coarse.
        semantic = cross_entropy(logits[:, :, 0], tokens[:, :, 0])[0]
        coarse = cross_entropy(logits[:, :, 1:], tokens[:, :, 1:])[0]
        return {"loss": loss, "semantic": semantic, "coarse": coarse, **metrics}
