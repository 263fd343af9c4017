"""The base policy: next-token prediction of interleaved tokens, conditioned on MuLan audio tokens (MusicLM 3.2)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from musicrl_jax.core.tokens import interleave
from musicrl_jax.losses.lm import cross_entropy
from musicrl_jax.models.musiclm import MusicLM, MusicLMConfig
from musicrl_jax.objectives.objective import Batch, Metrics
from musicrl_jax.objectives.token_objective import TokenObjective


@dataclasses.dataclass(frozen=True)
class PolicyObjective(TokenObjective):
    """Cross-entropy on the tokens that `musicrl encode` wrote."""

    model: MusicLMConfig

    def init(self, key: jax.Array, batch: Batch) -> dict[str, Any]:
        """Variables of MusicLM; ValueError where the tokens are of another layout."""
        self.check_layout(
            acoustic_codes=self.model.layout.acoustic_codes,
            semantic_codes=self.model.layout.semantic_codes,
            mulan_levels=self.model.mulan_levels,
            mulan_codes=self.model.mulan_codes,
        )
        return MusicLM(self.model).init(key, self._tokens(batch), batch["mulan"])

    def loss(
        self, params: Any, state: Any, frozen: Any, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        """Nats per token, with dropout."""
        tokens = self._tokens(batch)
        logits = MusicLM(self.model).apply(
            {"params": params}, tokens, batch["mulan"], deterministic=False, rngs={"dropout": key}
        )
        loss, metrics = cross_entropy(logits, tokens)
        return loss, (state, {"loss": loss, **metrics})

    def evaluate(self, params: Any, state: Any, frozen: Any, batch: Batch, key: jax.Array) -> Metrics:
        """Nats per token without dropout: all, semantic alone, coarse alone."""
        tokens = self._tokens(batch)
        logits = MusicLM(self.model).apply({"params": params}, tokens, batch["mulan"])
        loss, metrics = cross_entropy(logits, tokens)
        semantic = cross_entropy(logits[:, :, 0], tokens[:, :, 0])[0]
        coarse = cross_entropy(logits[:, :, 1:], tokens[:, :, 1:])[0]
        return {"loss": loss, "semantic": semantic, "coarse": coarse, **metrics}

    def _tokens(self, batch: Batch) -> jax.Array:
        """int32 [B, F, K]."""
        coarse = batch["acoustic"][:, :, : self.model.layout.coarse_levels]
        return interleave(batch["semantic"], jnp.asarray(coarse))
