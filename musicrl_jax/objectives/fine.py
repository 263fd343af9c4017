"""SoundStorm on the fine codec levels."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp

from musicrl_jax.inputs.tokens import Tokens, read_manifest
from musicrl_jax.losses.lm import cross_entropy
from musicrl_jax.models.soundstorm import SoundStorm, SoundStormConfig, training_mask
from musicrl_jax.objectives.objective import Batch, Metrics, Objective


@dataclasses.dataclass(frozen=True)
class FineObjective(Objective):
    """Masked prediction of fine codes on the tokens that `musicrl encode` wrote."""

    model: SoundStormConfig
    data: Tokens

    def init(self, key: jax.Array, batch: Batch) -> dict[str, Any]:
        """Variables of SoundStorm."""
        codes = batch["acoustic"]
        return SoundStorm(self.model).init(key, codes, jnp.zeros(codes.shape, bool), self.model.coarse_levels)

    def loss(
        self, params: Any, state: Any, frozen: Any, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        """Nats per hidden code of the level that is drawn for each clip."""
        codes = batch["acoustic"]
        hidden = training_mask(key, codes.shape, self.model.coarse_levels)
        logits = SoundStorm(self.model).apply({"params": params}, codes, hidden.masked, hidden.level)
        truth = jnp.take_along_axis(codes, hidden.level[:, None, None], axis=2)[:, :, 0]  # [B, T]
        loss, metrics = cross_entropy(logits, truth, hidden.target.astype(jnp.float32))
        return loss, (state, {"loss": loss, **metrics})

    def assets(self) -> dict[str, bytes]:
        """tokens.json: the hashes of the models whose tokens this one speaks."""
        return {"tokens.json": json.dumps(read_manifest(self.data.directory)["models"]).encode()}
