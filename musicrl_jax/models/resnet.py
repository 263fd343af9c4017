"""A residual network over log-mel spectrograms, for MuLan's audio tower and the quality regressor.

Its block is ResNet's basic pre-activation block (He et al., 2015), with LayerNorm over the channels
of each point in place of BatchNorm: a clip's output does not depend on its batch. A convolution
over patches shrinks the input by 4 x 4; each later stage shrinks it by 2 x 2.

Legend: B clips, N samples, S spectral frames (100 Hz), M mel bands, W channels.
"""

import dataclasses

import jax
from flax import linen as nn

from musicrl_jax.core import spectral

FRAME_RATE_HZ = 100
WINDOW_MS = 64
PATCH = 4
# Natural logs of mel magnitudes are between -11.5 (the floor) and about 5; this scales them to
# about [-2, 2].
LOG_MEL_CENTRE = -3.5
LOG_MEL_SCALE = 4.0


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """Size of the network.

    Attributes:
      mels: mel bands M of the input; a multiple of 4.
      widths: channels of each stage; each stage after the first halves time and frequency.
      blocks: residual blocks of two convolutions in each stage.
    """

    mels: int = 128
    widths: tuple[int, ...] = (64, 128, 256, 512)
    blocks: int = 2

    def __post_init__(self):
        if self.mels % PATCH or not self.widths or self.blocks < 1:
            raise ValueError(
                f"mels = {self.mels} must be a multiple of {PATCH}, widths = {self.widths} must "
                f"not be empty and blocks = {self.blocks} must be at least 1"
            )


def log_mels(wav: jax.Array, sample_rate_hz: int, mels: int) -> jax.Array:
    """Computes log-mels of 64 ms windows, scaled to about [-2, 2]: [B, N] -> [B, S, M]."""
    window, hop = sample_rate_hz * WINDOW_MS // 1000, sample_rate_hz // FRAME_RATE_HZ
    log_mel = spectral.log_mel(wav, sample_rate_hz, mels, window, hop)
    return (log_mel - LOG_MEL_CENTRE) / LOG_MEL_SCALE


class ResidualBlock(nn.Module):
    """x + conv(conv(x)); a stride of 2 halves time and frequency."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Transforms x [B, S, M, W]."""
        y = nn.relu(nn.LayerNorm(name="first_norm")(x))
        if self.stride > 1 or x.shape[-1] != self.width:
            x = nn.Conv(self.width, (1, 1), strides=self.stride, name="shortcut")(y)
        y = nn.Conv(self.width, (3, 3), strides=self.stride, name="first")(y)
        y = nn.relu(nn.LayerNorm(name="second_norm")(y))
        return x + nn.Conv(self.width, (3, 3), kernel_init=nn.initializers.zeros, name="second")(y)


class ResNet(nn.Module):
    """The network."""

    config: ResNetConfig

    @nn.compact
    def __call__(self, mels: jax.Array) -> jax.Array:
        """Averages the last stage over time and frequency: [B, S, M] -> [B, widths[-1]]."""
        stem = nn.Conv(self.config.widths[0], (PATCH, PATCH), strides=PATCH, name="patches")
        x = stem(mels[..., None])  # [B, S/4, M/4, W]
        for stage, width in enumerate(self.config.widths):
            for block in range(self.config.blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = ResidualBlock(width, stride, name=f"stage_{stage}_block_{block}")(x)
        return nn.LayerNorm(name="norm")(x).mean(axis=(1, 2))
