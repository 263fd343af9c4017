"""Reward models: networks that give a clip a number. The quality regressor guesses a mean opinion score.

Legend: B clips, N samples.
"""

import dataclasses

import jax
from flax import linen as nn

from musicrl_jax.models import resnet

LOWEST_MOS = 1.0
MOS_RANGE = 4.0


@dataclasses.dataclass(frozen=True)
class QualityConfig:
    """Size of the quality regressor.

    Attributes:
        sample_rate_hz: of the audio it hears.
        window_seconds: what it hears at once, 20 s in MusicRL; of longer clips it hears the first and the last so many.
        network: the residual network.
    """

    sample_rate_hz: int = 24_000
    window_seconds: float = 20.0
    network: resnet.ResNetConfig = dataclasses.field(default_factory=resnet.ResNetConfig)

    def __post_init__(self):
        if self.window_seconds <= 0:
            raise ValueError(f"window_seconds = {self.window_seconds} must be more than 0")


class Quality(nn.Module):
    """Acoustic quality of music as a mean opinion score (MusicRL, section 3.2).

    What the score means is up to the labels it was trained on: people's ratings, or the pseudo-MOS of
    `objectives.degradations`.
    """

    config: QualityConfig

    def setup(self):
        self.network = resnet.ResNet(self.config.network)
        self.score = nn.Dense(1, kernel_init=nn.initializers.normal(0.01))

    def window(self, wav: jax.Array) -> jax.Array:
        """[B, N] in [-1, 1] -> MOS [B] of the whole clip, heard at once."""
        mels = resnet.log_mels(wav, self.config.sample_rate_hz, self.config.network.mels)
        return LOWEST_MOS + MOS_RANGE * nn.sigmoid(self.score(self.network(mels))[:, 0])

    def __call__(self, wav: jax.Array) -> jax.Array:
        """[B, N] in [-1, 1] -> MOS [B] float32 in [1, 5].

        Of a clip longer than window_seconds, the mean of its first and of its last window; they overlap when the
        clip is shorter than two. A clip up to window_seconds is heard whole.
        """
        samples = round(self.config.window_seconds * self.config.sample_rate_hz)
        if wav.shape[-1] <= samples:
            return self.window(wav)
        return (self.window(wav[:, :samples]) + self.window(wav[:, -samples:])) / 2
