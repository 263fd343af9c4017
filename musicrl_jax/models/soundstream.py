"""SoundStream (2107.03312): a causal convolutional codec with a residual vector quantizer.

An encoder maps each stride of samples to one vector, the quantizer to Q codes, and a mirrored
decoder back to samples. There is no normalisation, and no activation outside the residual units;
widths double at every stride. Two of DAC's changes (2306.06546) are options: snake activations, and
codebooks of few dimensions searched by angle.

Legend: B clips, N samples, T codec frames (N / stride), Q levels, C codes in a codebook, D width,
W code width.
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
# Size of the noise that `linear_start` is fitted to.
START_CLIPS, START_FRAMES = 64, 50
# Root mean square of music (about -26 dB), scaled to 1 inside the codec.
START_LEVEL = 0.05
# Limits of companding: added to lengths, and the largest log that `expand` inverts.
LEAST_LENGTH, GREATEST_LOG_LENGTH = 1e-4, 10.0
# Least energy of a principal direction, as a share of the strongest one's.
LEAST_ENERGY = 1e-6

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class SoundStreamConfig:
    """Size and variant of a SoundStream.

    Attributes:
      sample_rate_hz: of input and output.
      strides: of the encoder's blocks from the waveform on. Large ones first are cheaper.
      channels: width at the waveform; doubles at every stride.
      embed: width D of the quantized vectors.
      levels: levels Q of the residual quantizer.
      codes: codes C in each level's codebook.
      activation: of the residual units, "elu" (SoundStream) or "snake" (DAC).
      code_width: None for codebooks of width D, trained by moving averages. A width W (DAC has 8)
        for DAC's codebooks, trained by gradient.
      companding: whether lengths of vectors are compressed to log(1 + length) before quantization.
        False in the paper.
    """

    sample_rate_hz: int = 24000
    strides: tuple[int, ...] = (3, 4, 5, 8)
    channels: int = 32
    embed: int = 128
    levels: int = 12
    codes: int = 1024
    activation: str = "elu"
    code_width: int | None = None
    companding: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "strides", tuple(self.strides))
        if not self.strides or min(self.strides) < 2:
            raise ValueError(
                f"SoundStreamConfig.strides = {self.strides}: use one or more, each at least 2"
            )
        if min(self.channels, self.embed, self.levels) < 1 or self.codes < 2:
            raise ValueError(
                f"{self}: channels, embed and levels must be at least 1, codes at least 2"
            )
        if self.sample_rate_hz % self.stride:
            raise ValueError(
                f"SoundStreamConfig.strides = {self.strides} multiply to {self.stride}, which does "
                f"not divide sample_rate_hz = {self.sample_rate_hz}: frames would drift"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"SoundStreamConfig.activation = {self.activation!r} must be one of {ACTIVATIONS}"
            )
        if self.code_width is not None and self.code_width < 1:
            raise ValueError(
                f"SoundStreamConfig.code_width = {self.code_width} must be at least 1, or None"
            )

    @property
    def stride(self) -> int:
        """The samples in a codec frame."""
        return math.prod(self.strides)

    def init(self, key: jax.Array) -> Params:
        """Draws the variables of a SoundStream."""
        return SoundStream(self).init(key, jnp.zeros((1, self.stride)), key)


# --- companding ---


def _length(x: jax.Array) -> jax.Array:
    """Returns the length of x [..., D] as [..., 1], with a gradient at 0."""
    return jnp.sqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + LEAST_LENGTH**2)


def compress(x: jax.Array) -> jax.Array:
    """Changes the length r of x [..., D] to log(1 + r), as the mu-law does for samples.

    Music's frames differ in level more than a codebook can represent: most codewords would fit the
    loud frames. The decoder inverts it by `expand`, so quantization noise follows a frame's level.
    Not in the paper.
    """
    length = _length(x)
    return x * (jnp.log1p(length) / length)


def expand(x: jax.Array) -> jax.Array:
    """Inverts `compress` for lengths up to e^10."""
    length = _length(x)
    return x * (jnp.expm1(jnp.minimum(length, GREATEST_LOG_LENGTH)) / length)


# --- layers ---


def with_past(module: nn.Module, x: jax.Array, count: int) -> jax.Array:
    """Prepends `count` past inputs to x [B, N, D]: [B, count + N, D].

    The past is zeros by default. If the collection `stream` is mutable, it is the end of the
    previous call's input, which the module stores. Decoding a clip in chunks then gives the same
    result as decoding it whole.
    """
    zeros = jnp.zeros((x.shape[0], count, x.shape[2]), x.dtype)
    if not module.is_mutable_collection("stream") or module.is_initializing():
        return jnp.concatenate([zeros, x], axis=1)
    past = module.variable("stream", "past", lambda: zeros)
    joined = jnp.concatenate([past.value, x], axis=1)
    past.value = joined[:, joined.shape[1] - count :]
    return joined


class CausalConv(nn.Module):
    """A convolution whose output n depends on inputs up to (n + 1) * stride - 1."""

    features: int
    kernel: int
    stride: int = 1
    dilation: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolves x: [B, N, D] -> [B, N / stride, features]."""
        shape = (self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        y = jax.lax.conv_general_dilated(
            with_past(self, x, (self.kernel - 1) * self.dilation + 1 - self.stride),
            kernel,
            (self.stride,),
            "VALID",
            rhs_dilation=(self.dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
        return y + bias[None, None, :]


class CausalUpsample(nn.Module):
    """A transposed convolution with a kernel of two strides.

    Frame t adds to the samples of strides t and t + 1, so a sample depends on its own frame and the
    one before. It is one matrix product and an overlap-add, which CPUs run several times faster
    than XLA's dilated convolution.
    """

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Upsamples x: [B, T, D] -> [B, T * stride, features]."""
        clips, steps, width = x.shape
        two_frames = nn.initializers.variance_scaling(
            0.5, "fan_in", "truncated_normal", in_axis=0, out_axis=(1, 2)
        )
        kernel = self.param("kernel", two_frames, (width, 2 * self.stride, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        own, after = jnp.split(
            x @ kernel.reshape(width, -1), 2, axis=-1
        )  # [B, T, stride * features]
        y = own + with_past(self, after, 1)[:, :steps]
        return y.reshape(clips, steps * self.stride, self.features) + bias[None, None, :]


class Snake(nn.Module):
    """DAC's activation x + sin^2(a x) / a (2006.08195), with one learned a per dimension."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Activates x [B, N, D]."""
        alpha = self.param("alpha", nn.initializers.ones, (x.shape[-1],))[None, None, :]
        return x + jnp.square(jnp.sin(alpha * x)) / (alpha + 1e-9)


class ResidualUnit(nn.Module):
    """x + conv1(elu(conv7(x))), or x + conv1(snake(conv7(snake(x)))).

    The first convolution is dilated. The unit starts as the identity.
    """

    dilation: int
    activation: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Transforms x [B, N, D]."""
        snake = self.activation == "snake"
        h = Snake(name="before")(x) if snake else x
        h = CausalConv(x.shape[-1], KERNEL, dilation=self.dilation, name="wide")(h)
        h = Snake(name="between")(h) if snake else nn.elu(h)
        return x + nn.Dense(x.shape[-1], kernel_init=nn.initializers.zeros, name="narrow")(h)


def _units(config: SoundStreamConfig, block: int, x: jax.Array) -> jax.Array:
    """Applies a block's residual units to x [B, N, D]."""
    for dilation in DILATIONS:
        x = ResidualUnit(dilation, config.activation, name=f"unit_{block}_{dilation}")(x)
    return x


class Encoder(nn.Module):
    """Waveform to vectors."""

    config: SoundStreamConfig

    @nn.compact
    def __call__(self, wav: jax.Array) -> jax.Array:
        """Encodes wav: [B, N] -> [B, N / stride, embed]."""
        width = self.config.channels
        x = CausalConv(width, KERNEL, name="first")(wav[:, :, None])
        for block, stride in enumerate(self.config.strides):
            width *= 2
            x = _units(self.config, block, x)
            x = CausalConv(width, 2 * stride, stride=stride, name=f"down_{block}")(x)
        return CausalConv(self.config.embed, LAST_KERNEL, name="last")(x)


class Decoder(nn.Module):
    """Vectors to waveform. Blocks have the numbers of the encoder's, so the last one is block 0."""

    config: SoundStreamConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Decodes x: [B, T, embed] -> [B, T * stride]."""
        width = self.config.channels * 2 ** len(self.config.strides)
        x = CausalConv(width, KERNEL, name="first")(x)
        for block, stride in reversed(list(enumerate(self.config.strides))):
            width //= 2
            x = CausalUpsample(width, stride, name=f"up_{block}")(x)
            x = _units(self.config, block, x)
        return CausalConv(1, KERNEL, name="last")(x)[:, :, 0]


# --- initial weights ---


def linear_start(config: SoundStreamConfig, params: Params, key: jax.Array) -> Params:
    """Returns `params` of a codec that starts as a linear transform fitted to brown noise.

    Residual units start as identities, so only the strided convolutions are between the waveform
    and the vectors. Each gets the principal directions of its inputs' strides, its mirror in the
    decoder their transpose, and taps outside the stride are zero: a projection on the directions of
    most energy, and back. Brown noise falls by 6 dB an octave, about as music does; a first batch
    might be too small.

    The first convolution also scales music's usual level to 1, where activations are nonlinear, and
    the last one scales it back. Outputs without energy keep random weights in the encoder and get
    zeros in the decoder.

    Not in the paper. It does for the convolutions what k-means does for the codebooks. Without it,
    after 150 steps of the quickstart's size nothing decoded correlates with the input.
    """
    width = config.channels
    enc, dec = dict(params["encoder"]), dict(params["decoder"])

    # First and last convolution: the level.
    even = jnp.full((1, width), width**-0.5)
    enc["first"] = _last_tap(enc["first"], even / START_LEVEL)
    dec["last"] = _last_tap(dec["last"], even.T * START_LEVEL)

    # Strided convolutions: principal directions.
    wav = brown_noise(key, START_CLIPS, START_FRAMES * config.stride)
    x = wav[:, :, None] * even[None]  # [B, N, D]
    for block, stride in enumerate(config.strides):
        x = x.reshape(x.shape[0], -1, stride * width)
        basis = principal_directions(x, 2 * width)  # [stride * D, 2 * D]
        x, kernel = x @ basis, basis.reshape(stride, width, 2 * width)
        down, up = enc[f"down_{block}"], dec[f"up_{block}"]
        used = jnp.any(basis != 0.0, axis=0)[None, None, :]
        own = jnp.concatenate([jnp.zeros_like(kernel), kernel])
        enc[f"down_{block}"] = down | {"kernel": jnp.where(used, own, down["kernel"])}
        back = kernel.transpose(2, 0, 1)
        dec[f"up_{block}"] = up | {"kernel": jnp.concatenate([back, jnp.zeros_like(back)], axis=1)}
        width *= 2

    # The quantized vectors.
    basis = principal_directions(x, config.embed)  # [D, embed]
    last, first = enc["last"], dec["first"]
    own, back = _last_tap(last, basis), _last_tap(first, basis.T)
    encoded = jnp.any(basis != 0.0, axis=0)[None, None, :]
    enc["last"] = own | {"kernel": jnp.where(encoded, own["kernel"], last["kernel"])}
    # There is no activation between the decoder's first two convolutions, so a unit with zeros on
    # both sides would never get a gradient.
    dec["first"] = back | {"kernel": jnp.where(used, back["kernel"], first["kernel"])}
    return params | {"encoder": enc, "decoder": dec}


def brown_noise(key: jax.Array, clips: int, samples: int) -> jax.Array:
    """Draws noise [clips, samples] of unit mean power that falls by 6 dB an octave.

    Its period is `samples`.
    """
    cycles = jnp.arange(samples // 2 + 1, dtype=jnp.float32)
    amplitude = jnp.where(cycles > 0.0, 1.0 / jnp.maximum(cycles, 1.0), 0.0)
    white = jnp.fft.rfft(jax.random.normal(key, (clips, samples)))
    noise = jnp.fft.irfft(white * amplitude[None, :].astype(jnp.complex64), n=samples)
    return noise / jnp.sqrt(jnp.mean(jnp.square(noise)))


def principal_directions(x: jax.Array, count: int) -> jax.Array:
    """Returns the directions [D, count] of most energy in x [..., D], strongest first.

    x is not centred. Columns beyond its rank are zero.
    """
    flat = x.reshape(-1, x.shape[-1])
    covariance = jnp.matmul(flat.T, flat, precision=jax.lax.Precision.HIGHEST)
    energy, directions = jnp.linalg.eigh(covariance)
    audible = energy > LEAST_ENERGY * energy[-1]
    strongest = jnp.where(audible[None, :], directions, 0.0)[:, ::-1][:, :count]
    return jnp.pad(strongest, ((0, 0), (0, count - strongest.shape[1])))


def _last_tap(conv: Params, matrix: jax.Array) -> Params:
    """Returns a convolution that multiplies only its newest input, by `matrix` [D, features]."""
    return conv | {"kernel": jnp.zeros_like(conv["kernel"]).at[-1].set(matrix)}


# --- the codec ---


class Training(NamedTuple):
    """The output of a training pass."""

    # [B, N] float32, decoded from a random number of levels per clip.
    wav: jax.Array
    # [], see rvq.Trained.
    commitment: jax.Array
    # [B, T, Q] int32, all levels.
    codes: jax.Array


class SoundStream(nn.Module):
    """The codec.

    `params` are trained. The collection `codebooks` (rvq.State) holds the quantizer's moving
    averages; with a `code_width` the codebooks are params.

    Sample n of decode(encode(wav)) depends on no input after the end of its codec frame. A clip may
    be processed in parts of whole frames, with the result of the whole clip: pass on the collection
    `stream`, a separate one for `encode` and for `decode`:

        encode = functools.partial(module.apply, method=SoundStream.encode, mutable=["stream"])
        codes, past = encode(variables, wav)
        more, past = encode({**variables, **past}, more_wav)
    """

    config: SoundStreamConfig

    def setup(self) -> None:
        """Creates variables and submodules."""
        c = self.config
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        sizes = (c.levels, c.codes, c.embed)
        if c.code_width is None:

            def init() -> rvq.State:
                return rvq.init(self.make_rng("params"), *sizes)

            self.rvq = self.variable("codebooks", "rvq", init)
        else:
            self.factored = self.param("rvq", rvq.init_factored, *sizes, c.code_width)

    def vectors(self, wav: jax.Array) -> jax.Array:
        """Computes the vectors to quantize: [B, N] -> [B, N / stride, embed] float32.

        Raises ValueError if N is not a positive multiple of the stride.
        """
        samples, stride = wav.shape[-1], self.config.stride
        if samples == 0 or samples % stride:
            raise ValueError(
                f"a clip of {samples} samples is not a whole number of codec frames of {stride}: "
                "choose another clip_seconds"
            )
        x = self.encoder(wav.astype(jnp.float32))
        return compress(x) if self.config.companding else x

    def wav(self, quantized: jax.Array) -> jax.Array:
        """Decodes quantized vectors: [B, T, embed] -> [B, T * stride] float32."""
        return self.decoder(expand(quantized) if self.config.companding else quantized)

    def encode(self, wav: jax.Array) -> jax.Array:
        """Encodes wav in [-1, 1]: [B, N] -> [B, N / stride, Q] int32. Raises as `vectors`."""
        if self.config.code_width is None:
            return rvq.quantize(self.rvq.value["codebooks"], self.vectors(wav))
        return rvq.quantize_factored(self.factored, self.vectors(wav))

    def decode(self, codes: jax.Array) -> jax.Array:
        """Decodes the first q <= Q levels: [B, T, q] -> [B, T * stride] float32, not clipped.

        A code of -1 leaves its level out.
        """
        return self.wav(rvq.dequantize(self.codebooks(), codes))

    def codebooks(self) -> jax.Array:
        """Returns the vectors of all codes, [Q, C, D] float32."""
        if self.config.code_width is None:
            return self.rvq.value["codebooks"]
        return rvq.full_codebooks(self.factored)

    def __call__(self, wav: jax.Array, key: jax.Array) -> Training:
        """Runs a training pass; updates the collection `codebooks` if it is mutable.

        `key` draws dropout and replaced codes.
        """
        if self.config.code_width is not None:
            quantized = rvq.train_factored(self.factored, self.vectors(wav), key)
        else:
            quantized, state = rvq.train(self.rvq.value, self.vectors(wav), key)
            if self.is_mutable_collection("codebooks") and not self.is_initializing():
                self.rvq.value = state
        return Training(self.wav(quantized.x), quantized.commitment, quantized.codes)
