"""MuLan (2208.12415): music and text on one unit sphere, and the quantizer that makes tokens of an embedding.

The audio tower is a residual network over log-mels, the text tower a BERT-style encoder, pre-norm, over SentencePiece
pieces. A clip and its caption end up close; the cosine is both MusicRL's text-adherence reward and, through the
quantizer, MusicLM's conditioning.

Collections: 'params' is trained; 'rvq' (codebooks [M, C, E]) is fitted to audio embeddings afterwards.

Legend: B clips or texts, N samples, V windows of a clip, L text pieces (0 fills up), D width of the text tower,
E width of the shared sphere, M MuLan levels, C codes in a level.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from musicrl_jax.models import resnet, rvq

FIRST_TEMPERATURE = 0.1
LEAST_TEMPERATURE = 0.01
PADDING = 0


@dataclasses.dataclass(frozen=True)
class MuLanConfig:
    """Size of both towers and of the quantizer.

    Attributes:
        sample_rate_hz: of the audio it hears.
        window_seconds: what the audio tower hears at once; longer clips are heard in windows and averaged.
        audio: the audio tower.
        text_layers: transformer blocks of the text tower (BERT-base: 12).
        text_heads: attention heads (12).
        text_embed: width D (768).
        text_mlp: hidden width of the feed-forwards (3072).
        text_length: L, the most pieces of a text.
        pieces: size of the vocabulary, the id 0 for padding included.
        embed: E.
        levels: M; 12 in MusicLM.
        codes: C; 1024 in MusicLM.
    """

    sample_rate_hz: int = 24_000
    window_seconds: float = 10.0
    audio: resnet.ResNetConfig = dataclasses.field(default_factory=resnet.ResNetConfig)
    text_layers: int = 12
    text_heads: int = 12
    text_embed: int = 768
    text_mlp: int = 3072
    text_length: int = 64
    pieces: int = 32_000
    embed: int = 128
    levels: int = 12
    codes: int = 1024

    def __post_init__(self):
        if self.text_embed % self.text_heads:
            raise ValueError(f"text_embed = {self.text_embed} must be a multiple of text_heads = {self.text_heads}")
        if self.window_seconds <= 0:
            raise ValueError(f"window_seconds = {self.window_seconds} must be more than 0")


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
    """x [..., E] scaled to length 1; the zero vector stays zero and passes no NaN to gradients."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-12))


def _dense(features: int, *names: str | None) -> nn.Dense:
    return nn.Dense(features, kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), names))


class TextBlock(nn.Module):
    """Pre-norm transformer block that sees both directions; padding is not attended to."""

    config: MuLanConfig

    @nn.compact
    def __call__(self, x: jax.Array, real: jax.Array) -> jax.Array:
        """x [B, L, D], real [B, L] bool -> [B, L, D]."""
        c = self.config
        y = nn.LayerNorm()(x)
        query, key, value = (
            _dense(c.text_embed, "embed", "heads")(y).reshape(*x.shape[:2], c.text_heads, -1) for _ in range(3)
        )  # [B, L, heads, D / heads] each
        mixed = jax.nn.dot_product_attention(query, key, value, mask=real[:, None, None, :])
        x = x + _dense(c.text_embed, "heads", "embed")(mixed.reshape(x.shape))
        y = nn.gelu(_dense(c.text_mlp, "embed", "mlp")(nn.LayerNorm()(x)))
        return x + _dense(c.text_embed, "mlp", "embed")(y)


class TextTower(nn.Module):
    """Pieces [B, L] int32 -> [B, E], not yet on the sphere: the mean over a text's pieces, projected."""

    config: MuLanConfig

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        c = self.config
        if text.shape[1] > c.text_length:
            raise ValueError(f"texts of {text.shape[1]} pieces are longer than text_length = {c.text_length}: cut them")
        real = text != PADDING  # [B, L]
        named = nn.with_logical_partitioning
        normal = nn.initializers.normal(1.0)
        pieces = self.param("pieces", named(normal, ("vocab", "embed")), (c.pieces, c.text_embed))
        positions = self.param(
            "positions", named(nn.initializers.normal(0.1), (None, "embed")), (c.text_length, c.text_embed)
        )
        x = pieces[text] + positions[None, : text.shape[1]]  # [B, L, D]
        for layer in range(c.text_layers):
            x = TextBlock(c, name=f"block_{layer}")(x, real)
        weight = real.astype(x.dtype) / jnp.maximum(jnp.sum(real, axis=1, keepdims=True), 1).astype(x.dtype)
        pooled = jnp.sum(nn.LayerNorm()(x) * weight[:, :, None], axis=1)  # [B, D]
        return _dense(c.embed, "embed", None)(pooled)


class MuLan(nn.Module):
    """Both towers, the learned temperature and the quantizer."""

    config: MuLanConfig

    def setup(self):
        c = self.config
        self.audio_tower = resnet.ResNet(c.audio)
        self.audio_projection = nn.Dense(c.embed)
        self.text_tower = TextTower(c)
        self.log_temperature = self.param("log_temperature", nn.initializers.constant(math.log(FIRST_TEMPERATURE)), ())
        self.codebooks = self.variable("rvq", "codebooks", jnp.zeros, (c.levels, c.codes, c.embed))

    def embed_windows(self, wav: jax.Array) -> jax.Array:
        """[B, N] in [-1, 1] -> [B, V, E] float32 of length 1: one embedding for each of `windows`."""
        c = self.config
        parts = windows(wav, round(c.window_seconds * c.sample_rate_hz))  # [B, V, samples]
        mels = resnet.log_mels(parts.reshape(-1, parts.shape[-1]), c.sample_rate_hz, c.audio.mels)
        embedding = on_sphere(self.audio_projection(self.audio_tower(mels)))
        return embedding.reshape(*parts.shape[:2], c.embed)

    def embed_audio(self, wav: jax.Array) -> jax.Array:
        """[B, N] in [-1, 1] -> [B, E] float32 of length 1: the mean over the clip's windows, back on the sphere."""
        return on_sphere(jnp.mean(self.embed_windows(wav), axis=1))

    def embed_text(self, text: jax.Array) -> jax.Array:
        """Pieces [B, L] int32, filled up with 0 -> [B, E] float32 of length 1; the filling changes nothing."""
        return on_sphere(self.text_tower(text))

    def quantize(self, embedding: jax.Array) -> jax.Array:
        """Embeddings of audio or text [B, E] -> MuLan tokens [B, M] int32; all 0 before the quantizer is fitted."""
        return rvq.quantize(self.codebooks.value, embedding)

    def temperature(self) -> jax.Array:
        """What the training divides cosines by: float32 [], learned, at least 0.01."""
        return jnp.exp(jnp.maximum(self.log_temperature, math.log(LEAST_TEMPERATURE)))

    def __call__(self, wav: jax.Array, text: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(audio embeddings [B, E], text embeddings [B, E], temperature [])."""
        return self.embed_audio(wav), self.embed_text(text), self.temperature()
