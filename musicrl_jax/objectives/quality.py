"""Trains the quality regressor, on people's ratings or on the pseudo-MOS of clips damaged in known ways.

Legend: B clips, N samples, T codec frames, Q codec levels.
"""

import dataclasses
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp

from musicrl_jax.core import checkpoint
from musicrl_jax.core.statistics import LEAST_INTERVAL
from musicrl_jax.models import rewards, soundstream
from musicrl_jax.objectives import degradations
from musicrl_jax.objectives.objective import Batch, Data, Metrics, Objective


@flax.struct.dataclass
class Codec:
    """A frozen SoundStream: its weights, and the config that rebuilds it."""

    variables: Any
    config: soundstream.SoundStreamConfig = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class QualityObjective(Objective):
    """Mean squared error of the score.

    Batches {'audio': f32 [B, N], 'score': f32 [B] in [1, 5]} (`inputs.Ratings`) are taken as they are. Batches without
    'score' are damaged on the way, and the score is the pseudo-MOS of `degradations`.

    Attributes:
        codec: folder of the codec that clips are sent through; needed for pseudo-MOS only.
    """

    model: rewards.QualityConfig
    data: Data
    codec: str = dataclasses.field(default="", metadata=checkpoint.PATH)

    LEAST_EXAMPLES: ClassVar = dict.fromkeys(("order", "clean_first"), LEAST_INTERVAL)

    def init(self, key: jax.Array, batch: Batch) -> dict[str, Any]:
        """The variables; ValueError where there are neither ratings nor a codec to make pseudo-MOS with."""
        if "score" not in batch and not self.codec:
            raise ValueError(
                "codec = '': pseudo-MOS needs a codec checkpoint; set it, or take inputs.Ratings as data"
            )
        return dict(rewards.Quality(self.model).init(key, batch["audio"][:1]))

    def frozen(self, read: checkpoint.Reader = checkpoint.load_model) -> Codec | dict[str, Any]:
        """Returns the codec, or {} where none is given. ValueError where it is of another sample rate."""
        if not self.codec:
            return {}
        codec = read(self.codec, soundstream.SoundStreamConfig)
        if codec.config.sample_rate_hz != self.model.sample_rate_hz:
            raise ValueError(
                f"codec = {self.codec!r} is of {codec.config.sample_rate_hz} Hz, QualityConfig.sample_rate_hz = "
                f"{self.model.sample_rate_hz}: make them equal"
            )
        return Codec(codec.variables, codec.config)

    def loss(
        self, params: Any, state: Any, frozen: Any, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        """Squared error; metrics: loss, mae, and `order`, the share of pairs ordered as labelled."""
        wav, score = self._labelled(frozen, batch, key)
        metrics = _metrics(
            rewards.Quality(self.model).apply({"params": params, **state}, wav), score
        )
        return metrics["loss"], (state, metrics)

    def evaluate(
        self, params: Any, state: Any, frozen: Any, batch: Batch, key: jax.Array
    ) -> Metrics:
        """The loss's metrics; with pseudo-MOS also `clean_first`, the share of damaged clips rated under their clean
        selves.
        """
        wav, score = self._labelled(frozen, batch, key)
        module, variables = rewards.Quality(self.model), {"params": params, **state}
        guess = module.apply(variables, wav)
        if "score" in batch:
            return _metrics(guess, score)
        damaged = jnp.any(wav != batch["audio"], axis=1)
        above = module.apply(variables, batch["audio"]) > guess
        return _metrics(guess, score) | {"clean_first": _share(above & damaged, damaged)}

    def _labelled(self, frozen: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(clips [B, N], scores [B]); of pseudo-MOS clips the second half goes through the codec after its damage.

        All that RL will score has come out of the codec: the regressor must tell good from bad there too.
        """
        if "score" in batch:
            return batch["audio"], batch["score"]
        wav, rate = batch["audio"], self.model.sample_rate_hz
        damage_key, strength_key = jax.random.split(key)
        strength = jax.random.uniform(strength_key, (wav.shape[0],))
        send = through(frozen)
        damaged = degradations.degrade(damage_key, wav, strength, rate, send)
        half = len(wav) // 2
        damaged = damaged.at[half:].set(send(damaged[half:], jnp.zeros(len(wav) - half)))
        return damaged, degradations.pseudo_mos(wav, damaged, rate)


def through(codec: Codec) -> degradations.Codec:
    """A function (wav [B, N], strength [B]) -> wav: encoded, and decoded from as many levels as the strength leaves."""

    def send(wav: jax.Array, strength: jax.Array) -> jax.Array:
        module, config = soundstream.SoundStream(codec.config), codec.config
        codes = module.apply(
            codec.variables, wav, method=soundstream.SoundStream.encode
        )  # [B, T, Q]
        kept = degradations.kept_levels(strength, config.levels)
        heard = jnp.arange(config.levels)[None, None, :] < kept[:, None, None]  # [B, 1, Q]
        return module.apply(
            codec.variables, jnp.where(heard, codes, -1), method=soundstream.SoundStream.decode
        )

    return send


def _metrics(guess: jax.Array, score: jax.Array) -> Metrics:
    gap = guess - score  # [B]
    return {
        "loss": jnp.mean(jnp.square(gap)),
        "mae": jnp.mean(jnp.abs(gap)),
        "order": order(guess, score),
    }


def order(guess: jax.Array, score: jax.Array) -> jax.Array:
    """Share of the pairs with different scores [B] whose guesses [B] differ in the same direction: 0.5 is chance."""
    truth = score[:, None] > score[None, :]
    return _share(truth & (guess[:, None] > guess[None, :]), truth)


def _share(some: jax.Array, among: jax.Array) -> jax.Array:
    return jnp.sum(some).astype(jnp.float32) / jnp.maximum(jnp.sum(among), 1).astype(jnp.float32)
