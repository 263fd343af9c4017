"""Trains the semantic encoder by masked prediction (BEST-RQ), then clusters its features into tokens.

Legend: B clips, N samples, F policy frames (25 Hz), D width, P frames of many clips.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from musicrl_jax.core import sharding
from musicrl_jax.models import kmeans, rvq, semantic
from musicrl_jax.objectives.objective import Batch, Data, Metrics, Objective

POINTS_PER_CODE = 256  # frames that k-means looks at
KMEANS_ITERATIONS = 100  # at most; about 40 suffice
LEAST_STD = 1e-3  # of a feature


@dataclasses.dataclass(frozen=True)
class SemanticObjective(Objective):
    """Cross-entropy of the random codes of masked frames; batches {'audio': f32 [B, N]}."""

    model: semantic.SemanticConfig
    data: Data

    def check(self, batch: Batch) -> None:
        """Raises ValueError if the training set has fewer frames than there are codes."""
        frames = self.data.count("train") * _frames(self.model, batch["audio"])
        if frames < self.model.codes:
            raise ValueError(
                f"SemanticConfig.codes = {self.model.codes}, but the training clips have {frames} frames: lower it, or "
                "give more audio"
            )

    def init(self, key: jax.Array, batch: Batch) -> dict[str, Any]:
        """Draws variables whose mel statistics are those of `batch`; k-means is still all zeros."""
        module = semantic.SemanticEncoder(self.model)
        variables = dict(
            module.init(key, batch["audio"], *_masking(key, self.model, batch["audio"]))
        )
        mels = module.apply(variables, batch["audio"], method=semantic.SemanticEncoder.log_mels)
        std = jnp.maximum(jnp.std(mels, axis=(0, 1)), semantic.LEAST_STD)
        return variables | {"statistics": {"mean": jnp.mean(mels, axis=(0, 1)), "std": std}}

    def loss(
        self, params: Any, state: Any, frozen: Any, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        """Mean nats over the masked frames; metrics: loss, accuracy of the first guess, perplexity of the targets."""
        module = semantic.SemanticEncoder(self.model)
        mask, noise = _masking(key, self.model, batch["audio"])
        logits, targets = module.apply({"params": params, **state}, batch["audio"], mask, noise)
        weight = mask.astype(jnp.float32) / jnp.maximum(jnp.sum(mask), 1).astype(
            jnp.float32
        )  # [B, F]
        nats = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
        hit = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
        loss = jnp.sum(weight * nats)
        metrics = {
            "loss": loss,
            "accuracy": jnp.sum(weight * hit),
            "target_perplexity": rvq.perplexity(targets[..., None], self.model.targets)[0],
        }
        return loss, (state, metrics)

    def evaluate(
        self, params: Any, state: Any, frozen: Any, batch: Batch, key: jax.Array
    ) -> Metrics:
        """The loss's metrics; token_perplexity, how many tokens this batch uses in effect; and kmeans_*, how well the
        centroids fit the training clips (`kmeans.Fit.usage`), the same for every batch.
        """
        variables = {"params": params, **state}
        module = semantic.SemanticEncoder(self.model)
        tokens = module.apply(variables, batch["audio"], method=semantic.SemanticEncoder.tokens)
        fit = kmeans.Fit(**{name: state["kmeans"][name] for name in kmeans.Fit._fields})
        return {
            **super().evaluate(params, state, frozen, batch, key),
            "token_perplexity": rvq.perplexity(tokens[..., None], self.model.codes)[0],
            **{f"kmeans_{name}": figure for name, figure in fit.usage().items()},
        }

    def finish(
        self,
        variables: dict[str, Any],
        frozen: Any,
        batches: Callable[[], Iterator[dict[str, np.ndarray]]],
    ) -> dict[str, Any]:
        """Fills 'kmeans': standardises the features of training clips per dimension and clusters them.

        Looks at 256 frames a code, the first that come in the shuffled order. Prints how well the centroids are used.
        """
        features = self._features(variables, batches())  # [P, D]
        mean, std = features.mean(axis=0), np.maximum(features.std(axis=0), LEAST_STD)
        fit = kmeans.fit(
            jax.random.key(0), (features - mean) / std, self.model.codes, KMEANS_ITERATIONS
        )
        usage = "  ".join(f"{name} {float(figure):.4g}" for name, figure in fit.usage().items())
        print(
            f"k-means of {len(features)} frames in {self.model.codes} codes:  {usage}", flush=True
        )
        fitted = {"mean": jnp.asarray(mean), "std": jnp.asarray(std), **fit._asdict()}
        return variables | {"kmeans": fitted}

    def _features(
        self, variables: dict[str, Any], batches: Iterator[dict[str, np.ndarray]]
    ) -> np.ndarray:
        """[P, D] float32, P = 256 * codes or all there are; each batch is split over the mesh that is set."""
        module = semantic.SemanticEncoder(self.model)
        method = semantic.SemanticEncoder.features
        features = jax.jit(lambda variables, wav: module.apply(variables, wav, method=method))
        mesh = jax.sharding.get_mesh()
        wanted = POINTS_PER_CODE * self.model.codes
        parts, found, clips = [], 0, 0
        for batch in batches:
            wav = batch["audio"]
            clips = clips or len(wav)
            filled = {
                "audio": np.pad(wav, ((0, clips - len(wav)), (0, 0)))
            }  # the last batch may be smaller
            placed = filled if mesh.empty else sharding.put_batch(mesh, filled)
            part = sharding.fetch(features(variables, placed["audio"]))[: len(wav)]
            parts.append(part.reshape(-1, part.shape[-1]))
            found += len(parts[-1])
            if found >= wanted:
                break
        return np.concatenate(parts)[:wanted]


def _frames(config: semantic.SemanticConfig, wav: jax.Array) -> int:
    """Returns F of wav [B, N]."""
    return wav.shape[1] * semantic.FRAME_RATE_HZ // (semantic.STACK * config.sample_rate_hz)


def _masking(
    key: jax.Array, config: semantic.SemanticConfig, wav: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(mask [B, F] bool, noise [B, F, 4M] standard normal) for wav [B, N]."""
    mask_key, noise_key = jax.random.split(key)
    clips, frames = wav.shape[0], _frames(config, wav)
    noise = jax.random.normal(noise_key, (clips, frames, semantic.STACK * config.mels))
    return semantic.draw_mask(mask_key, clips, frames), noise
