"""Semantic tokens: k-means on features of a BEST-RQ encoder (Chiu et al., 2022), as MusicFM's.

The encoder predicts codes of masked log-mels from the rest of the clip. The codes come from a
*random* projection and a *random* codebook. It replaces MusicLM's w2v-BERT, which is not public. As
there, tokens are k-means clusters of an inner layer's features, standardised per dimension, at
25 Hz.

Collections: 'params' is trained. 'statistics' (mean and std of each mel band), 'quantizer'
(projection and codebook) and 'kmeans' (mean, std, centroids, and how well they fit) are not, but
tokens depend on them.

Legend: B clips, N samples, S spectral frames (100 Hz), F policy frames (25 Hz, S // 4), M mel
bands, D width, C codes of k-means, R codes of the random codebook.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from musicrl_jax.core import spectral
from musicrl_jax.models import conformer, kmeans
from musicrl_jax.models.layers import kernel_init

FRAME_RATE_HZ = 100
WINDOW_MS = 64
# Spectral frames in a policy frame.
STACK = 4
PROJECTION = 16
# Length of a masked block: 400 ms.
MASK_FRAMES = 10
MASK_PROBABILITY = 0.6
MASK_NOISE = 0.1
# Least standard deviation of a log-mel band, so that silent bands are not amplified.
LEAST_STD = 0.1


@dataclasses.dataclass(frozen=True)
class SemanticConfig:
    """Size of the semantic encoder.

    Attributes:
      sample_rate_hz: of the input audio.
      mels: mel bands M.
      encoder: the conformer.
      layer: conformer block whose output is clustered (1 is the first), usually in the middle.
      targets: codes R of the random codebook that training predicts; 4096 in MusicFM.
      codes: semantic codes C; 1024 in MusicLM.
    """

    sample_rate_hz: int = 24_000
    mels: int = 128
    encoder: conformer.ConformerConfig = dataclasses.field(
        default_factory=conformer.ConformerConfig
    )
    layer: int = 7
    targets: int = 4096
    codes: int = 1024

    def __post_init__(self):
        if not 1 <= self.layer <= self.encoder.layers:
            raise ValueError(
                f"layer = {self.layer} is not between 1 and the conformer's {self.encoder.layers}"
            )
        if self.sample_rate_hz % FRAME_RATE_HZ:
            raise ValueError(
                f"sample_rate_hz = {self.sample_rate_hz} must be a multiple of {FRAME_RATE_HZ}"
            )

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Draws the variables of a SemanticEncoder."""
        frames = FRAME_RATE_HZ // STACK  # in one second
        noise = jnp.zeros((1, frames, STACK * self.mels))
        wav, mask = jnp.zeros((1, self.sample_rate_hz)), jnp.zeros((1, frames), bool)
        return SemanticEncoder(self).init(key, wav, mask, noise)


def draw_mask(key: jax.Array, clips: int, frames: int) -> jax.Array:
    """Draws a training mask, bool [B, F]: each block of 400 ms is masked with probability 0.6."""
    blocks = jax.random.bernoulli(key, MASK_PROBABILITY, (clips, -(-frames // MASK_FRAMES)))
    return jnp.repeat(blocks, MASK_FRAMES, axis=1)[:, :frames]


def _random_codebook(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    codebook = jax.random.normal(key, shape)
    return codebook / jnp.linalg.norm(codebook, axis=-1, keepdims=True)


class SemanticEncoder(nn.Module):
    """Audio to features [B, F, D] and semantic tokens [B, F]."""

    config: SemanticConfig

    def setup(self):
        """Creates variables and submodules."""
        c, width = self.config, self.config.encoder.embed
        self.mean = self.variable("statistics", "mean", jnp.zeros, (c.mels,))
        self.std = self.variable("statistics", "std", jnp.ones, (c.mels,))

        # The random targets.
        def projection() -> jax.Array:
            shape = (STACK * c.mels, PROJECTION)
            return nn.initializers.xavier_uniform()(self.make_rng("params"), shape)

        def codebook() -> jax.Array:
            return _random_codebook(self.make_rng("params"), (c.targets, PROJECTION))

        self.projection = self.variable("quantizer", "projection", projection)
        self.codebook = self.variable("quantizer", "codebook", codebook)

        # k-means.
        self.feature_mean = self.variable("kmeans", "mean", jnp.zeros, (width,))
        self.feature_std = self.variable("kmeans", "std", jnp.ones, (width,))
        self.centroids = self.variable("kmeans", "centroids", jnp.zeros, (c.codes, width))
        self.variable("kmeans", "share", jnp.zeros, (c.codes,))
        self.variable("kmeans", "inertia", jnp.zeros, ())
        self.variable("kmeans", "iterations", jnp.zeros, (), jnp.int32)
        self.variable("kmeans", "converged", jnp.zeros, (), bool)

        # The network.
        self.entry = nn.Dense(width, kernel_init=kernel_init(None, "embed"))
        self.encoder = conformer.Conformer(c.encoder)
        self.head = nn.Dense(c.targets, kernel_init=kernel_init("embed", "vocab"))

    def log_mels(self, wav: jax.Array) -> jax.Array:
        """Computes natural log-mels, not standardised: [B, N] -> [B, S, M], S = 4 F."""
        rate = self.config.sample_rate_hz
        hop, window = rate // FRAME_RATE_HZ, rate * WINDOW_MS // 1000
        whole = wav.shape[-1] // (STACK * hop) * STACK * hop
        return spectral.log_mel(wav[:, :whole], rate, self.config.mels, window, hop)

    def stacked(self, wav: jax.Array) -> jax.Array:
        """Computes standardised log-mels, four frames side by side: [B, N] -> [B, F, 4M]."""
        mels = (self.log_mels(wav) - self.mean.value[None, None]) / self.std.value[None, None]
        return mels.reshape(mels.shape[0], -1, STACK * self.config.mels)

    def targets(self, stacked: jax.Array) -> jax.Array:
        """Returns the random codeword nearest in angle: [B, F, 4M] -> [B, F] int32."""
        highest = jax.lax.Precision.HIGHEST
        projected = jnp.matmul(stacked, self.projection.value, precision=highest)  # [B, F, 16]
        cosines = jnp.matmul(projected, self.codebook.value.T, precision=highest)
        return jnp.argmax(cosines, axis=-1).astype(jnp.int32)

    def __call__(
        self, wav: jax.Array, mask: jax.Array, noise: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Predicts every frame's target.

        Args:
          wav: [B, N].
          mask: [B, F] bool, True for frames hidden from the encoder.
          noise: [B, F, 4M], standard normal; a tenth of it replaces hidden frames.

        Returns:
          Logits [B, F, R] float32 and targets [B, F] int32.
        """
        stacked = self.stacked(wav)
        masked = jnp.where(mask[:, :, None], MASK_NOISE * noise, stacked)
        return self.head(self.encoder(self.entry(masked))), self.targets(stacked)

    def features(self, wav: jax.Array) -> jax.Array:
        """Computes the output of block `layer`, without a mask: [B, N] -> [B, F, D] float32.

        F is 25 N // sample_rate_hz; wav is in [-1, 1].
        """
        return self.encoder(self.entry(self.stacked(wav)), layers=self.config.layer)

    def tokens(self, wav: jax.Array) -> jax.Array:
        """Computes semantic tokens: [B, N] in [-1, 1] -> [B, F] int32 in 0..codes-1, at 25 Hz.

        A token depends on its whole clip, not on the batch. All are 0 before k-means is fitted, at
        the end of training.
        """
        mean, std = self.feature_mean.value[None, None], self.feature_std.value[None, None]
        return kmeans.nearest(self.centroids.value, (self.features(wav) - mean) / std)
