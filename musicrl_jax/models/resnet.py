"""The residual network over log-mel spectrograms that MuLan's audio tower and the quality regressor share.

ResNet's (He et al., 2015) basic pre-activation block, with LayerNorm over the channels of each point where the paper
has BatchNorm, so that a clip's output never depends on the rest of its batch. The picture shrinks by 4 x 4 at
once (a convolution over patches) and by 2 x 2 between stages, which keeps most of the work in small pictures.

Legend: B clips, N samples, S spectral frames (100 Hz), M mel bands, W channels.
"""

import dataclasses

import jax
from flax import linen as nn

from musicrl_jax.core import spectral

FRAME_RATE_HZ = 100
WINDOW_MS = 64
PATCH = 4
# Natural logs of mel magnitudes run from -11.5 (the floor) to about 5: these bring them to about [-2, 2].
LOG_MEL_CENTRE = -3.5
LOG_MEL_SCALE = 4.0


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """Size of the network.

    Attributes:
        mels: mel bands M of its input; a multiple of 4.
        widths: channels of the stages; each stage after the first halves time and frequency.
        blocks: residual blocks of two convolutions in each stage.
    """

    mels: int = 128
    widths: tuple[int, ...] = (64, 128, 256, 512)
    blocks: int = 2

    def __post_init__(self):
        if self.mels % PATCH or not self.widths or self.blocks < 1:
            raise ValueError(
                f"mels = {self.mels} must be a multiple of {PATCH}, widths = {self.widths} not empty "
                f"and blocks = {self.blocks} at least 1"
            )


def log_mels(wav: jax.Array, sample_rate_hz: int, mels: int) -> jax.Array:
    """[B, N] -> [B, S, M] log-mels at 100 Hz from 64 ms windows, shifted and scaled to about [-2, 2]."""
    window, hop = sample_rate_hz * WINDOW_MS // 1000, sample_rate_hz // FRAME_RATE_HZ
    return (
        spectral.log_mel(wav, sample_rate_hz, mels, window, hop) - LOG_MEL_CENTRE
    ) / LOG_MEL_SCALE


class ResidualBlock(nn.Module):
    """x + conv(conv(x)), halving time and frequency first where `stride` is 2."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(nn.LayerNorm(name="first_norm")(x))
        if self.stride > 1 or x.shape[-1] != self.width:
            x = nn.Conv(self.width, (1, 1), strides=self.stride, name="shortcut")(y)
        y = nn.Conv(self.width, (3, 3), strides=self.stride, name="first")(y)
        y = nn.relu(nn.LayerNorm(name="second_norm")(y))
        return x + nn.Conv(self.width, (3, 3), kernel_init=nn.initializers.zeros, name="second")(y)


class ResNet(nn.Module):
    """Scaled log-mels [B, S, M] -> [B, widths[-1]], the mean over time and frequency of the last stage."""

    config: ResNetConfig

    @nn.compact
    def __call__(self, mels: jax.Array) -> jax.Array:
        stem = nn.Conv(self.config.widths[0], (PATCH, PATCH), strides=PATCH, name="patches")
        x = stem(mels[..., None])  # [B, S/4, M/4, W]
        for stage, width in enumerate(self.config.widths):
            for block in range(self.config.blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = ResidualBlock(width, stride, name=f"stage_{stage}_block_{block}")(x)
        return nn.LayerNorm(name="norm")(x).mean(axis=(1, 2))
