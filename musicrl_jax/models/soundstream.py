"""SoundStream (2107.03312): a causal convolutional codec with a residual vector quantizer in the middle.

An encoder turns each stride of samples into one vector, the quantizer into Q codes, a mirrored decoder back into
samples. No normalisation; no activation outside the residual units; widths double at every stride. Two of DAC's
changes (2306.06546) are options: snake activations, and codebooks of few dimensions searched by angle.

Letters: B clips, N samples, T codec frames (N / stride), Q levels, C codes in a codebook, D width, W code width.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from musicrl_jax.models import rvq

DILATIONS = (1, 3, 9)
KERNEL = 7
LAST_KERNEL = 3
ACTIVATIONS = ("elu", "snake")
START_CLIPS, START_FRAMES = 64, 50  # of the noise that `linear_start` fits
START_LEVEL = (
    0.05  # root mean square of music, about -26 dB below full scale: brought to 1 inside the codec
)
LEAST_LENGTH, GREATEST_LOG_LENGTH = 1e-4, 10.0  # of vectors, where lengths are compressed
LEAST_ENERGY = 1e-6  # of a principal direction, as a share of the strongest one's

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class SoundStreamConfig:
    """The shape of a SoundStream."""

    sample_rate_hz: int = 24000  # of the audio it is trained on and returns
    strides: tuple[int, ...] = (
        3,
        4,
        5,
        8,
    )  # of the encoder's blocks, waveform first; large ones first are cheaper
    channels: int = 32  # width at the waveform; doubles at every stride
    embed: int = 128  # width of the quantized vectors, D
    levels: int = 12  # of the residual quantizer, Q
    codes: int = 1024  # in each level's codebook, C
    activation: str = "elu"  # of the residual units: "elu" (SoundStream) or "snake" (DAC)
    code_width: int | None = (
        None  # None: codebooks of width D, moving averages; else DAC's of width W, by gradient (8)
    )
    companding: bool = True  # quantizes vectors whose lengths are compressed to log(1 + length); False is the paper

    def __post_init__(self) -> None:
        object.__setattr__(self, "strides", tuple(self.strides))
        if not self.strides or min(self.strides) < 2:
            raise ValueError(
                f"SoundStreamConfig.strides = {self.strides}: give at least one, each 2 or more"
            )
        if min(self.channels, self.embed, self.levels) < 1 or self.codes < 2:
            raise ValueError(
                f"{self}: channels, embed and levels must be at least 1, codes at least 2"
            )
        if self.sample_rate_hz % self.stride:
            raise ValueError(
                f"SoundStreamConfig.strides = {self.strides} multiply to {self.stride}, which does not divide "
                f"sample_rate_hz = {self.sample_rate_hz}: frames would drift against seconds"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"SoundStreamConfig.activation = {self.activation!r} is none of {ACTIVATIONS}"
            )
        if self.code_width is not None and self.code_width < 1:
            raise ValueError(
                f"SoundStreamConfig.code_width = {self.code_width}: give 1 or more, or None"
            )

    @property
    def stride(self) -> int:
        """Samples in a codec frame."""
        return math.prod(self.strides)

    def init(self, key: jax.Array) -> Params:
        """Draws the variables of a SoundStream."""
        return SoundStream(self).init(key, jnp.zeros((1, self.stride)), key)


def compressed(x: jax.Array) -> jax.Array:
    """X [..., D] with its length r made log(1 + r), its direction kept.

    Music's frames differ in level by far more than a codebook can hold: codewords fitted to their plain distances go
    to the loud frames, and quiet ones share a few. The decoder undoes it (`expanded`), so that quantization noise
    follows the level of each frame. As the mu-law does for samples; not in the paper.
    """
    length = jnp.sqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + LEAST_LENGTH**2)
    return x * (jnp.log1p(length) / length)


def expanded(x: jax.Array) -> jax.Array:
    """The inverse of `compressed`, up to lengths of e^10."""
    length = jnp.sqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + LEAST_LENGTH**2)
    return x * (jnp.expm1(jnp.minimum(length, GREATEST_LOG_LENGTH)) / length)


def with_past(module: nn.Module, x: jax.Array, count: int) -> jax.Array:
    """X [B, N, D] behind the `count` inputs that came before it: [B, count + N, D].

    These are zeros; but where the collection `stream` is mutable they are the last inputs of the call before, kept
    there by the module, so that a clip given in parts comes out as the clip at once would.
    """
    before = jnp.zeros((x.shape[0], count, x.shape[2]), x.dtype)
    if not module.is_mutable_collection("stream") or module.is_initializing():
        return jnp.concatenate([before, x], axis=1)
    past = module.variable("stream", "past", lambda: before)
    joined = jnp.concatenate([past.value, x], axis=1)
    past.value = joined[:, joined.shape[1] - count :]
    return joined


class CausalConv(nn.Module):
    """A convolution [B, N, D] -> [B, N / stride, features] whose output n hears inputs up to (n + 1) * stride - 1."""

    features: int
    kernel: int
    stride: int = 1
    dilation: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param(
            "kernel", nn.initializers.lecun_normal(), (self.kernel, x.shape[-1], self.features)
        )
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x = with_past(self, x, (self.kernel - 1) * self.dilation + 1 - self.stride)
        axes = ("NWC", "WIO", "NWC")
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride,),
            "VALID",
            rhs_dilation=(self.dilation,),
            dimension_numbers=axes,
        )
        return y + bias[None, None, :]


class CausalUpsample(nn.Module):
    """Transposed convolution with a kernel of two strides: [B, T, D] -> [B, T * stride, features].

    Frame t adds to the samples of strides t and t + 1, so a sample hears only its own and the frame before. Written
    as one matrix product and an overlap-add, which CPUs run several times faster than XLA's dilated convolution.
    """

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        clips, steps, width = x.shape
        two_frames = nn.initializers.variance_scaling(
            0.5, "fan_in", "truncated_normal", in_axis=0, out_axis=(1, 2)
        )
        kernel = self.param("kernel", two_frames, (width, 2 * self.stride, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        own, after = jnp.split(
            x @ kernel.reshape(width, -1), 2, axis=-1
        )  # [B, T, stride * features] each
        y = own + with_past(self, after, 1)[:, :steps]
        return y.reshape(clips, steps * self.stride, self.features) + bias[None, None, :]


class Snake(nn.Module):
    """x + sin^2(a x) / a with one learned a for each dimension (2006.08195), in DAC in place of ELU."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        alpha = self.param("alpha", nn.initializers.ones, (x.shape[-1],))[None, None, :]
        return x + jnp.square(jnp.sin(alpha * x)) / (alpha + 1e-9)


class ResidualUnit(nn.Module):
    """x + conv1(elu(conv7(x))), or x + conv1(snake(conv7(snake(x)))); the first convolution dilated; shape and
    causality kept. Starts as the identity.
    """

    dilation: int
    activation: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = Snake(name="before")(x) if self.activation == "snake" else x
        h = CausalConv(x.shape[-1], KERNEL, dilation=self.dilation, name="wide")(h)
        h = Snake(name="between")(h) if self.activation == "snake" else nn.elu(h)
        return x + nn.Dense(x.shape[-1], kernel_init=nn.initializers.zeros, name="narrow")(h)


class Encoder(nn.Module):
    """Waveform [B, N] -> vectors [B, N / stride, embed]."""

    config: SoundStreamConfig

    @nn.compact
    def __call__(self, wav: jax.Array) -> jax.Array:
        width = self.config.channels
        x = CausalConv(width, KERNEL, name="first")(wav[:, :, None])
        for block, stride in enumerate(self.config.strides):
            for dilation in DILATIONS:
                x = ResidualUnit(dilation, self.config.activation, name=f"unit_{block}_{dilation}")(
                    x
                )
            width *= 2
            x = CausalConv(width, 2 * stride, stride=stride, name=f"down_{block}")(x)
        return CausalConv(self.config.embed, LAST_KERNEL, name="last")(x)


class Decoder(nn.Module):
    """Vectors [B, T, embed] -> waveform [B, T * stride]; blocks are numbered like the encoder's, waveform first."""

    config: SoundStreamConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = self.config.channels * 2 ** len(self.config.strides)
        x = CausalConv(width, KERNEL, name="first")(x)
        for block, stride in reversed(list(enumerate(self.config.strides))):
            width //= 2
            x = CausalUpsample(width, stride, name=f"up_{block}")(x)
            for dilation in DILATIONS:
                x = ResidualUnit(dilation, self.config.activation, name=f"unit_{block}_{dilation}")(
                    x
                )
        return CausalConv(1, KERNEL, name="last")(x)[:, :, 0]


def linear_start(config: SoundStreamConfig, params: Params, key: jax.Array) -> Params:
    """`params` whose codec, quantizer apart, starts as a linear transform codec fitted to brown noise.

    With residual units that start as identities, only the strided convolutions are left between the waveform and the
    vectors. Each gets the principal directions of its inputs' strides, its twin in the decoder their transpose, and
    taps outside the stride zero: a projection on the directions that hold most of the energy, and back. Brown noise
    falls by 6 dB an octave, about as music does, and unlike a first batch there is always enough of it.

    The first convolution also brings music's usual level to 1, where activations bend, and the last one back.
    Outputs for which no energy is left keep their random weights in the encoder and start unheard in the decoder.
    Not in the paper; it is to the convolutions what the k-means start is to the codebooks. From random weights, 150
    steps of the quickstart's size decode nothing that correlates with the input.
    """
    width = config.channels
    wav = brown_noise(key, START_CLIPS, START_FRAMES * config.stride)
    enc, dec = dict(params["encoder"]), dict(params["decoder"])
    even = jnp.full((1, width), width**-0.5)
    enc["first"] = _last_tap(enc["first"], even / START_LEVEL)
    dec["last"] = _last_tap(dec["last"], even.T * START_LEVEL)
    x = wav[:, :, None] * even[None]  # [B, N, D]
    for block, stride in enumerate(config.strides):
        x = x.reshape(x.shape[0], -1, stride * width)
        basis = principal_directions(x, 2 * width)  # [stride * D, 2 * D]
        x, kernel = x @ basis, basis.reshape(stride, width, 2 * width)
        down, up = enc[f"down_{block}"], dec[f"up_{block}"]
        heard = jnp.any(basis != 0.0, axis=0)[None, None, :]
        own = jnp.concatenate([jnp.zeros_like(kernel), kernel])
        enc[f"down_{block}"] = down | {"kernel": jnp.where(heard, own, down["kernel"])}
        back = kernel.transpose(2, 0, 1)
        dec[f"up_{block}"] = up | {"kernel": jnp.concatenate([back, jnp.zeros_like(back)], axis=1)}
        width *= 2
    basis = principal_directions(x, config.embed)  # [D, embed]
    last, first = enc["last"], dec["first"]
    own, back = _last_tap(last, basis), _last_tap(first, basis.T)
    spoken = jnp.any(basis != 0.0, axis=0)[None, None, :]
    enc["last"] = own | {"kernel": jnp.where(spoken, own["kernel"], last["kernel"])}
    # Nothing bends between the decoder's first two convolutions: zeros on both sides of a unit would stay for good.
    dec["first"] = back | {"kernel": jnp.where(heard, back["kernel"], first["kernel"])}
    return params | {"encoder": enc, "decoder": dec}


def brown_noise(key: jax.Array, clips: int, samples: int) -> jax.Array:
    """[clips, samples] noise of unit mean power whose power falls by 6 dB an octave; its period is `samples`."""
    cycles = jnp.arange(samples // 2 + 1, dtype=jnp.float32)
    amplitude = jnp.where(cycles > 0.0, 1.0 / jnp.maximum(cycles, 1.0), 0.0)
    spectrum = jnp.fft.rfft(jax.random.normal(key, (clips, samples))) * amplitude[None, :].astype(
        jnp.complex64
    )
    noise = jnp.fft.irfft(spectrum, n=samples)
    return noise / jnp.sqrt(jnp.mean(jnp.square(noise)))


def principal_directions(x: jax.Array, count: int) -> jax.Array:
    """The `count` directions [D, count] in which x [..., D] has most energy (not centred), strongest first; columns
    beyond x's rank are zero.
    """
    flat = x.reshape(-1, x.shape[-1])
    energy, directions = jnp.linalg.eigh(
        jnp.matmul(flat.T, flat, precision=jax.lax.Precision.HIGHEST)
    )
    audible = energy > LEAST_ENERGY * energy[-1]
    strongest = jnp.where(audible[None, :], directions, 0.0)[:, ::-1][:, :count]
    return jnp.pad(strongest, ((0, 0), (0, count - strongest.shape[1])))


def _last_tap(conv: Params, matrix: jax.Array) -> Params:
    """Parameters of a convolution that multiplies its newest input by `matrix` [D, features] and ignores the rest."""
    return conv | {"kernel": jnp.zeros_like(conv["kernel"]).at[-1].set(matrix)}


class Training(NamedTuple):
    """What a training pass returns."""

    wav: (
        jax.Array
    )  # [B, N] float32, decoded from a random number of levels a clip (quantizer dropout)
    commitment: jax.Array  # [] see rvq.Trained
    codes: jax.Array  # [B, T, Q] int32, all levels


class SoundStream(nn.Module):
    """The codec. `params` are trained; the collection `codebooks` (rvq.State) is the quantizer's moving averages, or
    missing where `code_width` makes the codebooks params too.

    Sample n of decode(encode(wav)) depends on no input after the end of its codec frame, and a clip may be given in
    parts of whole frames, one after the other, with the same result as at once: keep the collection `stream`, which
    the first part makes and the others pass on, apart for `encode` and `decode`:

        codes, past = module.apply(variables, wav, method=SoundStream.encode, mutable=["stream"])
        more, past = module.apply({**variables, **past}, more_wav, method=SoundStream.encode, mutable=["stream"])
    """

    config: SoundStreamConfig

    def setup(self) -> None:
        config = self.config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        sizes = (config.levels, config.codes, config.embed)
        if config.code_width is None:
            self.rvq = self.variable(
                "codebooks", "rvq", lambda: rvq.init(self.make_rng("params"), *sizes)
            )
        else:
            self.factored = self.param("rvq", rvq.init_factored, *sizes, config.code_width)

    def vectors(self, wav: jax.Array) -> jax.Array:
        """What is quantized: [B, N / stride, embed] float32 of wav [B, N]; N must be a multiple of the stride."""
        if wav.shape[-1] == 0 or wav.shape[-1] % self.config.stride:
            raise ValueError(
                f"clip of {wav.shape[-1]} samples is no whole number of codec frames of {self.config.stride}: "
                "choose clip_seconds so that it is"
            )
        x = self.encoder(wav.astype(jnp.float32))
        return compressed(x) if self.config.companding else x

    def wav(self, quantized: jax.Array) -> jax.Array:
        """Waveform [B, T * stride] float32 of quantized vectors [B, T, embed]."""
        return self.decoder(expanded(quantized) if self.config.companding else quantized)

    def encode(self, wav: jax.Array) -> jax.Array:
        """Codes [B, N / stride, Q] int32 of wav [B, N] in [-1, 1]; N must be a multiple of the stride."""
        if self.config.code_width is None:
            return rvq.quantize(self.rvq.value["codebooks"], self.vectors(wav))
        return rvq.quantize_factored(self.factored, self.vectors(wav))

    def decode(self, codes: jax.Array) -> jax.Array:
        """Waveform [B, T * stride] float32 of codes [B, T, q] of the first q <= Q levels, -1 where a level is not
        heard; not clipped to [-1, 1].
        """
        return self.wav(rvq.dequantize(self.codebooks(), codes))

    def codebooks(self) -> jax.Array:
        """The vectors [Q, C, D] float32 that codes stand for."""
        return (
            self.rvq.value["codebooks"]
            if self.config.code_width is None
            else rvq.expanded(self.factored)
        )

    def __call__(self, wav: jax.Array, key: jax.Array) -> Training:
        """A training pass; moves the collection `codebooks` if it is mutable. `key` draws dropout and new codes."""
        if self.config.code_width is not None:
            quantized = rvq.train_factored(self.factored, self.vectors(wav), key)
        else:
            quantized, state = rvq.train(self.rvq.value, self.vectors(wav), key)
            if self.is_mutable_collection("codebooks") and not self.is_initializing():
                self.rvq.value = state
        return Training(self.wav(quantized.x), quantized.commitment, quantized.codes)
