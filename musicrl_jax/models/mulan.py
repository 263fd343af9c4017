"""MuLan (2208.12415): music and text on one unit sphere, and a quantizer of its embeddings.

The audio tower is a residual network over log-mels or the packaged musicnn; the text tower is BERT.
A clip and its caption get similar embeddings. Their cosine is MusicRL's text-adherence reward, and
the quantizer's tokens condition MusicLM.

Collections: 'params' is trained; 'rvq' (codebooks [M, C, E]) is fitted to audio embeddings later.

Legend: B clips or texts, N samples, V windows of a clip, L text pieces (0 is padding), W and D
widths of audio and text tower, E width of the embedding, M MuLan levels, C codes in a level.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from musicrl_jax.models import bert, musicnn, resnet, rvq

# The temperature before training, and its lower bound.
FIRST_TEMPERATURE = 0.1
LEAST_TEMPERATURE = 0.01


@dataclasses.dataclass(frozen=True)
class MuLanConfig:
    """Sizes of both towers and of the quantizer.

    Attributes:
      sample_rate_hz: of the input audio; musicnn resamples it to 16 kHz.
      window_seconds: length of a window. Longer clips are averaged over several windows.
      audio: the audio tower.
      text: the text tower.
      text_length: most pieces of a text, L.
      embed: width E.
      hidden: width of the hidden layer between a tower and the sphere; 0 for none.
      levels: M; 12 in MusicLM.
      codes: C; 1024 in MusicLM.
    """

    sample_rate_hz: int = 24_000
    window_seconds: float = 10.0
    audio: resnet.ResNetConfig | musicnn.MusicnnConfig = dataclasses.field(
        default_factory=resnet.ResNetConfig
    )
    text: bert.BertConfig = dataclasses.field(default_factory=bert.BertConfig)
    text_length: int = 64
    embed: int = 128
    hidden: int = 0
    levels: int = 12
    codes: int = 1024

    def __post_init__(self):
        if self.window_seconds <= 0:
            raise ValueError(f"window_seconds = {self.window_seconds} must be more than 0")
        if self.text_length > self.text.positions:
            raise ValueError(
                f"text_length = {self.text_length} must not exceed "
                f"BertConfig.positions = {self.text.positions}"
            )

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Draws the variables of a MuLan."""
        wav = jnp.zeros((1, self.sample_rate_hz))  # one second
        return MuLan(self).init(key, wav, jnp.zeros((1, 1), jnp.int32))


def windows(wav: jax.Array, samples: int) -> jax.Array:
    """Cuts the fewest windows that cover a clip, evenly spaced: [B, N] -> [B, V, min(N, samples)].

    With windows of 10 s: three adjacent ones for 30 s, three that overlap for 25 s, and the clip
    itself up to 10 s.
    """
    length = wav.shape[-1]
    if length <= samples:
        return wav[:, None]
    count = math.ceil(length / samples)
    starts = [round(index * (length - samples) / (count - 1)) for index in range(count)]
    return jnp.stack([wav[:, start : start + samples] for start in starts], axis=1)


def on_sphere(x: jax.Array) -> jax.Array:
    """Scales x [..., E] to length 1. The zero vector stays zero and has a finite gradient."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-12))


class Towers(nn.Module):
    """The audio tower and the text tower, before any projection."""

    config: MuLanConfig

    def setup(self):
        """Creates both towers."""
        audio = self.config.audio
        is_musicnn = isinstance(audio, musicnn.MusicnnConfig)
        self.audio = musicnn.Musicnn(audio) if is_musicnn else resnet.ResNet(audio)
        self.text = bert.Bert(self.config.text)

    def audio_features(self, wav: jax.Array) -> jax.Array:
        """Computes features of each window: [B, N] in [-1, 1] -> [B, V, W] float32."""
        c = self.config
        parts = windows(wav, round(c.window_seconds * c.sample_rate_hz))  # [B, V, samples]
        flat = parts.reshape(-1, parts.shape[-1])
        if isinstance(c.audio, musicnn.MusicnnConfig):
            mels = musicnn.log_mels(musicnn.resample_to_16_khz(flat, c.sample_rate_hz))
        else:
            mels = resnet.log_mels(flat, c.sample_rate_hz, c.audio.mels)
        return self.audio(mels).reshape(*parts.shape[:2], -1)

    def text_features(self, text: jax.Array) -> jax.Array:
        """Computes features of texts: pieces int32 [B, L] -> [B, D] float32."""
        if text.shape[1] > self.config.text_length:
            raise ValueError(
                f"texts of {text.shape[1]} pieces are longer than "
                f"text_length = {self.config.text_length}: cut the texts"
            )
        return self.text(text)


class Projection(nn.Module):
    """Projects a tower's features to the unit sphere."""

    hidden: int
    embed: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Projects x: [..., W] -> [..., E] float32 of length 1."""
        if self.hidden:
            x = nn.gelu(nn.Dense(self.hidden, name="hidden")(nn.LayerNorm(name="norm")(x)))
        return on_sphere(nn.Dense(self.embed, name="out")(x))


class MuLan(nn.Module):
    """Both towers and projections, the learned temperature and the quantizer."""

    config: MuLanConfig

    def setup(self):
        """Creates parameters and submodules."""
        c = self.config
        self.towers = Towers(c)
        self.audio_projection = Projection(c.hidden, c.embed)
        self.text_projection = Projection(c.hidden, c.embed)
        first = nn.initializers.constant(math.log(FIRST_TEMPERATURE))
        self.log_temperature = self.param("log_temperature", first, ())
        self.codebooks = self.variable("rvq", "codebooks", jnp.zeros, (c.levels, c.codes, c.embed))

    def project_audio(self, features: jax.Array) -> jax.Array:
        """Averages the windows on the sphere: [B, V, W] -> [B, E] of length 1."""
        return on_sphere(jnp.mean(self.audio_projection(features), axis=1))

    def project(self, audio: jax.Array, text: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Computes `__call__` from the towers' features, [B, V, W] and [B, D]."""
        return self.project_audio(audio), self.text_projection(text), self.temperature()

    def embed_windows(self, wav: jax.Array) -> jax.Array:
        """Embeds each window: [B, N] in [-1, 1] -> [B, V, E] float32 of length 1."""
        return self.audio_projection(self.towers.audio_features(wav))

    def embed_audio(self, wav: jax.Array) -> jax.Array:
        """Embeds clips: [B, N] in [-1, 1] -> [B, E] float32 of length 1."""
        return self.project_audio(self.towers.audio_features(wav))

    def embed_text(self, text: jax.Array) -> jax.Array:
        """Embeds text pieces int32 [B, L] as unit vectors float32 [B, E]; ignores padding."""
        return self.text_projection(self.towers.text_features(text))

    def quantize(self, embedding: jax.Array) -> jax.Array:
        """Quantizes embeddings [B, E] to MuLan tokens int32 [B, M]; all 0 before the fit."""
        return rvq.quantize(self.codebooks.value, embedding)

    def temperature(self) -> jax.Array:
        """Returns the learned softmax temperature of the contrastive loss: f32 [], 0.01 or more."""
        return jnp.exp(jnp.maximum(self.log_temperature, math.log(LEAST_TEMPERATURE)))

    def __call__(self, wav: jax.Array, text: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns audio embeddings [B, E], text embeddings [B, E] and the temperature []."""
        features = self.towers.audio_features(wav), self.towers.text_features(text)
        return self.project(*features)
