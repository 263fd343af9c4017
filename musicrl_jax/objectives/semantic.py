"""Trains the semantic encoder by masked prediction (BEST-RQ), then clusters its features to tokens.

Legend: B clips, N samples, F policy frames (25 Hz), M mel bands, D width, P frames of many clips.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from musicrl_jax.core import sharding
from musicrl_jax.models import kmeans, rvq, semantic
from musicrl_jax.models.semantic import SemanticConfig, SemanticEncoder
from musicrl_jax.objectives.objective import (
    Batch,
    Data,
    Epoch,
    Loss,
    Metrics,
    Objective,
    Variables,
    collect_points,
)

POINTS_PER_CODE = 256  # frames that k-means reads
KMEANS_ITERATIONS = 100  # at most; about 40 suffice
LEAST_STD = 1e-3  # of a feature


@dataclasses.dataclass(frozen=True)
class SemanticObjective(Objective):
    """Masked prediction as in BEST-RQ: predicts the codes of masked frames.

    A fixed random projection and codebook give the codes. Batches are {'audio': f32 [B, N]}.
    """

    model: SemanticConfig
    data: Data

    def check(self, batch: Batch) -> None:
        """Raises ValueError if the training set has fewer frames than there are codes."""
        frames = self.data.count("train") * _frames(self.model, batch["audio"])
        if frames < self.model.codes:
            raise ValueError(
                f"SemanticConfig.codes = {self.model.codes}, but the training clips have {frames} "
                "frames: lower it, or give more audio"
            )

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """Returns random variables with the mel statistics of `batch`; 'kmeans' is all zeros."""
        module, wav = SemanticEncoder(self.model), batch["audio"]
        variables = dict(module.init(key, wav, *_masking(key, self.model, wav)))
        mels = module.apply(variables, wav, method=SemanticEncoder.log_mels)
        std = jnp.maximum(jnp.std(mels, axis=(0, 1)), semantic.LEAST_STD)
        return variables | {"statistics": {"mean": jnp.mean(mels, axis=(0, 1)), "std": std}}

    def loss(self, params: Any, state: Any, frozen: Any, batch: Batch, key: jax.Array) -> Loss:
        """Returns mean nats over the masked frames.

        Metrics: loss, accuracy of the likeliest code, perplexity of the targets.
        """
        mask, noise = _masking(key, self.model, batch["audio"])
        variables = {"params": params, **state}
        logits, targets = SemanticEncoder(self.model).apply(variables, batch["audio"], mask, noise)
        # The mean over the masked frames of the whole batch.
        count = jnp.maximum(jnp.sum(mask), 1).astype(jnp.float32)
        weight = mask.astype(jnp.float32) / count  # [B, F]
        nats = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
        correct = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
        loss = jnp.sum(weight * nats)
        metrics = {
            "loss": loss,
            "accuracy": jnp.sum(weight * correct),
            "target_perplexity": rvq.perplexity(targets[..., None], self.model.targets)[0],
        }
        return loss, (state, metrics)

    def evaluate(
        self, params: Any, state: Any, frozen: Any, batch: Batch, key: jax.Array
    ) -> Metrics:
        """Returns the loss's metrics, token_perplexity and kmeans_*.

        token_perplexity is the effective number of tokens in this batch. kmeans_* is the fit of the
        centroids to the training clips (`kmeans.Fit.usage`), the same for every batch.
        """
        metrics = super().evaluate(params, state, frozen, batch, key)
        variables = {"params": params, **state}
        tokens = SemanticEncoder(self.model).apply(
            variables, batch["audio"], method=SemanticEncoder.tokens
        )
        metrics["token_perplexity"] = rvq.perplexity(tokens[..., None], self.model.codes)[0]
        fit = kmeans.Fit(**{name: state["kmeans"][name] for name in kmeans.Fit._fields})
        return metrics | {f"kmeans_{name}": figure for name, figure in fit.usage().items()}

    def finish(self, variables: Variables, frozen: Any, batches: Epoch) -> Variables:
        """Fills 'kmeans': standardises the features of training clips, and clusters them.

        Reads the first 256 frames a code in the shuffled order. Prints the use of the centroids.
        """
        # Standardise, so that no dimension dominates the distances.
        count = POINTS_PER_CODE * self.model.codes
        features = collect_points(self._features(variables, batches()), count)[:count]  # [P, D]
        mean, std = features.mean(axis=0), np.maximum(features.std(axis=0), LEAST_STD)
        fit = kmeans.fit(
            jax.random.key(0), (features - mean) / std, self.model.codes, KMEANS_ITERATIONS
        )
        # Report the fit.
        usage = "  ".join(f"{name} {float(figure):.4g}" for name, figure in fit.usage().items())
        print(
            f"k-means of {len(features)} frames in {self.model.codes} codes:  {usage}", flush=True
        )
        fitted = {"mean": jnp.asarray(mean), "std": jnp.asarray(std), **fit._asdict()}
        return variables | {"kmeans": fitted}

    def _features(
        self, variables: Variables, batches: Iterator[dict[str, np.ndarray]]
    ) -> Iterator[np.ndarray]:
        """Yields features f32 [B, F, D] of batches, computed on the whole mesh."""
        apply = jax.jit(SemanticEncoder(self.model).apply, static_argnames="method")
        mesh, clips = jax.sharding.get_mesh(), 0
        for batch in batches:
            wav = batch["audio"]
            clips = clips or len(wav)
            # The last batch may be smaller: padding keeps one compiled shape.
            rows = {"audio": np.pad(wav, ((0, clips - len(wav)), (0, 0)))}
            rows = rows if mesh.empty else sharding.put_batch(mesh, rows)
            features = apply(variables, rows["audio"], method=SemanticEncoder.features)
            yield sharding.fetch(features)[: len(wav)]


def _frames(config: SemanticConfig, wav: jax.Array) -> int:
    """Returns F of wav [B, N]."""
    return wav.shape[1] * semantic.FRAME_RATE_HZ // (semantic.STACK * config.sample_rate_hz)


def _masking(key: jax.Array, config: SemanticConfig, wav: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (mask bool [B, F], standard normal noise [B, F, 4 M]) for wav [B, N]."""
    mask_key, noise_key = jax.random.split(key)
    clips, frames = wav.shape[0], _frames(config, wav)
    noise = jax.random.normal(noise_key, (clips, frames, semantic.STACK * config.mels))
    return semantic.draw_mask(mask_key, clips, frames), noise
