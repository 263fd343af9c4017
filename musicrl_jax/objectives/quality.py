"""Trains the quality regressor, on people's ratings or on the pseudo-MOS of damaged clips.

Legend: B clips, N samples, T codec frames, Q codec levels.
"""

import dataclasses
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp

from musicrl_jax.core import checkpoint
from musicrl_jax.core.statistics import LEAST_INTERVAL
from musicrl_jax.models.rewards import Quality, QualityConfig
from musicrl_jax.models.soundstream import SoundStream, SoundStreamConfig
from musicrl_jax.objectives import degradations
from musicrl_jax.objectives.objective import Batch, Data, Loss, Metrics, Objective, Variables


@flax.struct.dataclass
class Codec:
    """A frozen SoundStream: its weights, and the config that rebuilds it."""

    variables: Any
    config: SoundStreamConfig = flax.struct.field(pytree_node=False)

    def reconstruct(self, wav: jax.Array, strength: jax.Array) -> jax.Array:
        """Encodes wav [B, N], and decodes it from fewer levels at a higher strength [B]."""
        # -1 marks a code that the decoder ignores.
        module, levels = SoundStream(self.config), self.config.levels
        codes = module.apply(self.variables, wav, method=SoundStream.encode)  # [B, T, Q]
        count = degradations.remaining_levels(strength, levels)
        remains = jnp.arange(levels)[None, None, :] < count[:, None, None]  # [B, 1, Q]
        codes = jnp.where(remains, codes, -1)
        return module.apply(self.variables, codes, method=SoundStream.decode)


@dataclasses.dataclass(frozen=True)
class QualityObjective(Objective):
    """Mean squared error of the score.

    Batches are {'audio': f32 [B, N], 'score': f32 [B] in [1, 5]}, as from `inputs.Ratings`. Clips
    of batches without 'score' are damaged, and their score is the pseudo-MOS of `degradations`.

    Attributes:
      codec: folder of the codec that damages clips; unused with ratings.
    """

    model: QualityConfig
    data: Data
    codec: str = dataclasses.field(default="", metadata=checkpoint.PATH)

    LEAST_EXAMPLES: ClassVar = {"order": LEAST_INTERVAL, "clean_first": LEAST_INTERVAL}

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """Returns random variables; ValueError without both ratings and a codec."""
        if "score" not in batch and not self.codec:
            raise ValueError(
                "codec = '': pseudo-MOS needs a codec checkpoint; set it, or use inputs.Ratings as "
                "data"
            )
        return dict(Quality(self.model).init(key, batch["audio"][:1]))

    def frozen(self, read: checkpoint.Reader = checkpoint.load_model) -> Codec | dict[str, Any]:
        """Returns the codec, or {} without one; ValueError if its sample rate is another."""
        if not self.codec:
            return {}
        codec = read(self.codec, SoundStreamConfig)
        if codec.config.sample_rate_hz != self.model.sample_rate_hz:
            raise ValueError(
                f"codec = {self.codec!r} has {codec.config.sample_rate_hz} Hz, and "
                f"QualityConfig.sample_rate_hz = {self.model.sample_rate_hz}: make them equal"
            )
        return Codec(codec.variables, codec.config)

    def loss(self, params: Any, state: Any, frozen: Any, batch: Batch, key: jax.Array) -> Loss:
        """Returns the squared error, with the metrics mae and `order`."""
        wav, score = self._labelled(frozen, batch, key)
        metrics = _metrics(Quality(self.model).apply({"params": params, **state}, wav), score)
        return metrics["loss"], (state, metrics)

    def evaluate(
        self, params: Any, state: Any, frozen: Any, batch: Batch, key: jax.Array
    ) -> Metrics:
        """Returns the loss's metrics and, with pseudo-MOS, `clean_first`.

        That is the share of damaged clips that score less than their clean version.
        """
        wav, score = self._labelled(frozen, batch, key)
        module, variables = Quality(self.model), {"params": params, **state}
        prediction = module.apply(variables, wav)
        metrics = _metrics(prediction, score)
        if "score" in batch:
            return metrics
        # A strength near 0 may leave a clip unchanged.
        damaged = jnp.any(wav != batch["audio"], axis=1)
        above = module.apply(variables, batch["audio"]) > prediction
        return metrics | {"clean_first": _share(above & damaged, damaged)}

    def _labelled(self, frozen: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns (clips [B, N], scores [B]), rated or damaged."""
        if "score" in batch:
            return batch["audio"], batch["score"]
        # Damage by a random strength.
        wav, rate = batch["audio"], self.model.sample_rate_hz
        damage_key, strength_key = jax.random.split(key)
        strength = jax.random.uniform(strength_key, (wav.shape[0],))
        damaged = degradations.degrade(damage_key, wav, strength, rate, frozen.reconstruct)
        # All clips in RL come out of the codec, so half of the training clips do as well.
        half = len(wav) // 2
        decoded = frozen.reconstruct(damaged[half:], jnp.zeros(len(wav) - half))
        damaged = damaged.at[half:].set(decoded)
        return damaged, degradations.pseudo_mos(wav, damaged, rate)


def _metrics(prediction: jax.Array, score: jax.Array) -> Metrics:
    """Returns loss, mae and order of predictions [B] and scores [B]."""
    error = prediction - score
    return {
        "loss": jnp.mean(jnp.square(error)),
        "mae": jnp.mean(jnp.abs(error)),
        "order": order(prediction, score),
    }


def order(prediction: jax.Array, score: jax.Array) -> jax.Array:
    """Returns the share of pairs with different scores [B] that predictions [B] order alike.

    Chance is 0.5.
    """
    higher = score[:, None] > score[None, :]
    return _share(higher & (prediction[:, None] > prediction[None, :]), higher)


def _share(some: jax.Array, among: jax.Array) -> jax.Array:
    """Returns the number of true entries over that of another array, at least 1; f32 []."""
    return jnp.sum(some).astype(jnp.float32) / jnp.maximum(jnp.sum(among), 1).astype(jnp.float32)
