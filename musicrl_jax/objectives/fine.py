"""SoundStorm: predicts the fine codec levels from the coarse ones.

Legend: T codec frames.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from musicrl_jax.losses.lm import cross_entropy
from musicrl_jax.models.soundstorm import SoundStorm, SoundStormConfig, training_mask
from musicrl_jax.objectives.objective import Batch, Loss, Variables
from musicrl_jax.objectives.token_objective import TokenObjective


@dataclasses.dataclass(frozen=True)
class FineObjective(TokenObjective):
    """Masked prediction of fine codes on the tokens that `musicrl encode` wrote."""

    model: SoundStormConfig

    def check(self, batch: Batch) -> None:
        """Raises ValueError if the tokens are of another layout."""
        self.check_layout(acoustic_levels=self.model.levels, acoustic_codes=self.model.codes)

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """Returns random variables of SoundStorm."""
        codes = batch["acoustic"]
        mask = jnp.zeros(codes.shape, bool)
        return SoundStorm(self.model).init(key, codes, mask, self.model.coarse_levels)

    def loss(self, params: Any, state: Any, frozen: Any, batch: Batch, key: jax.Array) -> Loss:
        """Returns nats per masked code of one random level for each clip."""
        codes = batch["acoustic"]
        # `hidden` has the masked codes, the level, and which of its codes are scored.
        hidden = training_mask(key, codes.shape, self.model.coarse_levels)
        logits = SoundStorm(self.model).apply(
            {"params": params}, codes, hidden.masked, hidden.level
        )
        truth = jnp.take_along_axis(codes, hidden.level[:, None, None], axis=2)[:, :, 0]  # [B, T]
        loss, metrics = cross_entropy(logits, truth, hidden.target.astype(jnp.float32))
        return loss, (state, {"loss": loss, **metrics})
