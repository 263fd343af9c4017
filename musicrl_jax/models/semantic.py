"""Semantic tokens: a BEST-RQ encoder (Chiu et al., 2022) in the manner of MusicFM, and k-means over its features.

The encoder learns to guess, from the rest of a clip, the codes that a *random* projection and a *random* codebook
give to masked log-mels. MusicLM's w2v-BERT is not public; this stands in for it. As there, the tokens are k-means
clusters of an inner layer's features, standardised per dimension, at 25 Hz.

Collections: 'params' is trained. 'statistics' (mean and std of every mel band), 'quantizer' (projection and
codebook) and 'kmeans' (mean, std, centroids, and how well they fit) are not, but belong to the model: without them
tokens mean nothing.

Legend: B clips, N samples, S spectral frames (100 Hz), F policy frames (25 Hz, S // 4), M mel bands, D width,
C codes of k-means, R codes of the random codebook.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from musicrl_jax.core import spectral
from musicrl_jax.models import conformer, kmeans

FRAME_RATE_HZ = 100
WINDOW_MS = 64
STACK = 4  # spectral frames in a policy frame
PROJECTION = 16
MASK_FRAMES = 10  # 400 ms
MASK_PROBABILITY = 0.6
MASK_NOISE = 0.1
LEAST_STD = 0.1  # of a log-mel band; a band that is always silent is not blown up


@dataclasses.dataclass(frozen=True)
class SemanticConfig:
    """Size of the semantic encoder.

    Attributes:
        sample_rate_hz: of the audio it hears.
        mels: mel bands M.
        encoder: the conformer.
        layer: conformer block whose output is clustered into tokens (1 is the first); the middle of the stack is usual.
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
    """[B, F] bool: each block of 10 frames (400 ms) is masked whole with probability 0.6, the last one cut to fit."""
    blocks = jax.random.bernoulli(key, MASK_PROBABILITY, (clips, -(-frames // MASK_FRAMES)))
    return jnp.repeat(blocks, MASK_FRAMES, axis=1)[:, :frames]


def _random_codebook(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    codebook = jax.random.normal(key, shape)
    return codebook / jnp.linalg.norm(codebook, axis=-1, keepdims=True)


class SemanticEncoder(nn.Module):
    """Audio to features [B, F, D] and semantic tokens [B, F]."""

    config: SemanticConfig

    def setup(self):
        mels, width = self.config.mels, self.config.encoder.embed
        self.mean = self.variable("statistics", "mean", jnp.zeros, (mels,))
        self.std = self.variable("statistics", "std", jnp.ones, (mels,))
        self.projection = self.variable(
            "quantizer",
            "projection",
            lambda: nn.initializers.xavier_uniform()(
                self.make_rng("params"), (STACK * mels, PROJECTION)
            ),
        )
        self.codebook = self.variable(
            "quantizer",
            "codebook",
            lambda: _random_codebook(self.make_rng("params"), (self.config.targets, PROJECTION)),
        )
        self.feature_mean = self.variable("kmeans", "mean", jnp.zeros, (width,))
        self.feature_std = self.variable("kmeans", "std", jnp.ones, (width,))
        self.centroids = self.variable("kmeans", "centroids", jnp.zeros, (self.config.codes, width))
        self.variable("kmeans", "share", jnp.zeros, (self.config.codes,))
        self.variable("kmeans", "inertia", jnp.zeros, ())
        self.variable("kmeans", "iterations", jnp.zeros, (), jnp.int32)
        self.variable("kmeans", "converged", jnp.zeros, (), bool)
        axes = nn.with_logical_partitioning
        init = nn.initializers.lecun_normal()
        self.entry = nn.Dense(width, kernel_init=axes(init, (None, "embed")))
        self.encoder = conformer.Conformer(self.config.encoder)
        self.head = nn.Dense(self.config.targets, kernel_init=axes(init, ("embed", "vocab")))

    def log_mels(self, wav: jax.Array) -> jax.Array:
        """[B, N] -> natural log-mels [B, S, M] as they are, S = 4 F: what 'statistics' are taken over."""
        rate = self.config.sample_rate_hz
        hop = rate // FRAME_RATE_HZ
        whole = wav.shape[-1] // (STACK * hop) * STACK * hop
        return spectral.log_mel(
            wav[:, :whole], rate, self.config.mels, rate * WINDOW_MS // 1000, hop
        )

    def stacked(self, wav: jax.Array) -> jax.Array:
        """[B, N] -> [B, F, 4M]: standardised log-mels, four frames side by side."""
        mels = (self.log_mels(wav) - self.mean.value[None, None]) / self.std.value[None, None]
        return mels.reshape(mels.shape[0], -1, STACK * self.config.mels)

    def targets(self, stacked: jax.Array) -> jax.Array:
        """[B, F, 4M] -> [B, F] int32: the random codeword nearest in angle to the random projection."""
        exactly = jax.lax.Precision.HIGHEST
        projected = jnp.matmul(stacked, self.projection.value, precision=exactly)  # [B, F, 16]
        return jnp.argmax(
            jnp.matmul(projected, self.codebook.value.T, precision=exactly), axis=-1
        ).astype(jnp.int32)

    def __call__(
        self, wav: jax.Array, mask: jax.Array, noise: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Guesses and truth for every frame: (logits [B, F, R] float32, targets [B, F] int32).

        wav [B, N]; mask [B, F] bool, the frames that the encoder does not see; noise [B, F, 4M], standard normal,
        a tenth of which it sees there instead.
        """
        stacked = self.stacked(wav)
        seen = jnp.where(mask[:, :, None], MASK_NOISE * noise, stacked)
        return self.head(self.encoder(self.entry(seen))), self.targets(stacked)

    def features(self, wav: jax.Array) -> jax.Array:
        """[B, N] in [-1, 1] -> [B, F, D] float32 after block `layer`, nothing masked; F = 25 N // sample_rate_hz."""
        return self.encoder(self.entry(self.stacked(wav)), layers=self.config.layer)

    def tokens(self, wav: jax.Array) -> jax.Array:
        """[B, N] in [-1, 1] -> semantic tokens [B, F] int32 in 0..codes-1, at 25 Hz.

        A token depends on its whole clip, not on the batch. Before k-means has run (the end of training) all are 0.
        """
        features = self.features(wav)
        standard = (features - self.feature_mean.value[None, None]) / self.feature_std.value[
            None, None
        ]
        return kmeans.nearest(self.centroids.value, standard)
