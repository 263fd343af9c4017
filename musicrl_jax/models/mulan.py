"""MuLan (2208.12415): music and text on one unit sphere, and the quantizer that makes tokens of an embedding.

The audio tower is a residual network over log-mels or the packaged musicnn, the text tower is BERT. A clip and its
caption end up close; the cosine is both MusicRL's text-adherence reward and, through the quantizer, MusicLM's
conditioning.

Collections: 'params' is trained; 'rvq' (codebooks [M, C, E]) is fitted to audio embeddings afterwards.

Legend: B clips or texts, N samples, V windows of a clip, L text pieces (0 fills up), W and D what audio and text tower
give, E width of the shared sphere, M MuLan levels, C codes in a level.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from musicrl_jax.models import bert, musicnn, resnet, rvq

FIRST_TEMPERATURE = 0.1
LEAST_TEMPERATURE = 0.01


@dataclasses.dataclass(frozen=True)
class MuLanConfig:
    """Size of both towers and of the quantizer.

    Attributes:
        sample_rate_hz: of the audio it is given; musicnn resamples that to 16 kHz.
        window_seconds: what the audio tower hears at once; longer clips are heard in windows and averaged.
        audio: the audio tower.
        text: the text tower.
        text_length: L, the most pieces of a text.
        embed: E.
        hidden: width of the hidden layer between a tower and the sphere; 0 projects straight.
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
                f"text_length = {self.text_length} is more than BertConfig.positions = {self.text.positions}"
            )

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Draws the variables of a MuLan."""
        wav = jnp.zeros((1, self.sample_rate_hz))  # one second
        return MuLan(self).init(key, wav, jnp.zeros((1, 1), jnp.int32))


def windows(wav: jax.Array, samples: int) -> jax.Array:
    """[B, N] -> [B, V, min(N, samples)]: as few windows as cover the clip, evenly spread from its start to its end.

    30 s in windows of 10 s are three that touch; 25 s are three that overlap; up to 10 s are one, the clip itself.
    """
    length = wav.shape[-1]
    if length <= samples:
        return wav[:, None]
    count = math.ceil(length / samples)
    starts = [round(index * (length - samples) / (count - 1)) for index in range(count)]
    return jnp.stack([wav[:, start : start + samples] for start in starts], axis=1)


def on_sphere(x: jax.Array) -> jax.Array:
    """X [..., E] scaled to length 1; the zero vector stays zero and passes no NaN to gradients."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-12))


class Towers(nn.Module):
    """What hears clips and what reads texts, each in its own terms."""

    config: MuLanConfig

    def setup(self):
        audio, text = self.config.audio, self.config.text
        is_musicnn = isinstance(audio, musicnn.MusicnnConfig)
        self.audio = musicnn.Musicnn(audio) if is_musicnn else resnet.ResNet(audio)
        self.text = bert.Bert(text)

    def hear(self, wav: jax.Array) -> jax.Array:
        """[B, N] in [-1, 1] -> [B, V, W] float32: what the audio tower finds in each of `windows`."""
        c = self.config
        parts = windows(wav, round(c.window_seconds * c.sample_rate_hz))  # [B, V, samples]
        flat = parts.reshape(-1, parts.shape[-1])
        if isinstance(c.audio, musicnn.MusicnnConfig):
            mels = musicnn.log_mels(musicnn.at_16_khz(flat, c.sample_rate_hz))
        else:
            mels = resnet.log_mels(flat, c.sample_rate_hz, c.audio.mels)
        return self.audio(mels).reshape(*parts.shape[:2], -1)

    def read(self, text: jax.Array) -> jax.Array:
        """Pieces [B, L] int32, filled up with 0 -> [B, D] float32: what the text tower finds."""
        if text.shape[1] > self.config.text_length:
            raise ValueError(
                f"texts of {text.shape[1]} pieces are longer than text_length = {self.config.text_length}: cut them"
            )
        return self.text(text)


class Projection(nn.Module):
    """What a tower found [..., W] -> [..., E] float32 of length 1."""

    hidden: int
    embed: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.hidden:
            x = nn.gelu(nn.Dense(self.hidden, name="hidden")(nn.LayerNorm(name="norm")(x)))
        return on_sphere(nn.Dense(self.embed, name="out")(x))


class MuLan(nn.Module):
    """Both towers, the learned temperature and the quantizer."""

    config: MuLanConfig

    def setup(self):
        c = self.config
        self.towers = Towers(c)
        self.audio_projection = Projection(c.hidden, c.embed)
        self.text_projection = Projection(c.hidden, c.embed)
        self.log_temperature = self.param(
            "log_temperature", nn.initializers.constant(math.log(FIRST_TEMPERATURE)), ()
        )
        self.codebooks = self.variable("rvq", "codebooks", jnp.zeros, (c.levels, c.codes, c.embed))

    def place_audio(self, heard: jax.Array) -> jax.Array:
        """What `Towers.hear` gave [B, V, W] -> [B, E] of length 1: the mean over the windows, back on the sphere."""
        return on_sphere(jnp.mean(self.audio_projection(heard), axis=1))

    def place(self, heard: jax.Array, read: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As `__call__`, from what the towers gave, `hear` [B, V, W] and `read` [B, D]."""
        return self.place_audio(heard), self.text_projection(read), self.temperature()

    def embed_windows(self, wav: jax.Array) -> jax.Array:
        """[B, N] in [-1, 1] -> [B, V, E] float32 of length 1: one embedding for each of `windows`."""
        return self.audio_projection(self.towers.hear(wav))

    def embed_audio(self, wav: jax.Array) -> jax.Array:
        """[B, N] in [-1, 1] -> [B, E] float32 of length 1: the mean over the clip's windows, back on the sphere."""
        return self.place_audio(self.towers.hear(wav))

    def embed_text(self, text: jax.Array) -> jax.Array:
        """Pieces [B, L] int32, filled up with 0 -> [B, E] float32 of length 1; the filling changes nothing."""
        return self.text_projection(self.towers.read(text))

    def quantize(self, embedding: jax.Array) -> jax.Array:
        """Embeddings of audio or text [B, E] -> MuLan tokens [B, M] int32; all 0 before the quantizer is fitted."""
        return rvq.quantize(self.codebooks.value, embedding)

    def temperature(self) -> jax.Array:
        """What the training divides cosines by: float32 [], learned, at least 0.01."""
        return jnp.exp(jnp.maximum(self.log_temperature, math.log(LEAST_TEMPERATURE)))

    def __call__(self, wav: jax.Array, text: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(audio embeddings [B, E], text embeddings [B, E], temperature [])."""
        return self.place(self.towers.hear(wav), self.towers.read(text))
