"""Reward models: networks that score a clip.

The quality regressor predicts a mean opinion score from a waveform. The preference model predicts
how well a listener likes a clip, from its caption and tokens.

Legend: B clips, N samples, F frames, K codes in a frame, M MuLan levels.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from musicrl_jax.models import resnet
from musicrl_jax.models.musiclm import MusicLMConfig, Trunk
from musicrl_jax.models.tokens import FRAMES_PER_SECOND

# Mean opinion scores are between 1 and 5.
LOWEST_MOS = 1.0
MOS_RANGE = 4.0


def first_and_last(x: jax.Array, length: int) -> jax.Array:
    """Returns each row's first and last `length` items: [B, N, ...] -> [2 B, length, ...].

    As rows of one batch they are compiled once.
    """
    return jnp.stack([x[:, :length], x[:, -length:]], axis=1).reshape(-1, length, *x.shape[2:])


@dataclasses.dataclass(frozen=True)
class QualityConfig:
    """Size of the quality regressor.

    Attributes:
      sample_rate_hz: of the input audio.
      window_seconds: length of a window, 20 s in MusicRL. Of a longer clip, the first and the last
        window count.
      network: the residual network.
    """

    sample_rate_hz: int = 24_000
    window_seconds: float = 20.0
    network: resnet.ResNetConfig = dataclasses.field(default_factory=resnet.ResNetConfig)

    def __post_init__(self):
        if self.window_seconds <= 0:
            raise ValueError(f"window_seconds = {self.window_seconds} must be more than 0")

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Draws the variables of a Quality."""
        return Quality(self).init(key, jnp.zeros((1, self.sample_rate_hz)))  # one second


class Quality(nn.Module):
    """Acoustic quality of music as a mean opinion score (MusicRL, section 3.2).

    The meaning of the score depends on its training labels: ratings by people, or the pseudo-MOS of
    `objectives.degradations`.
    """

    config: QualityConfig

    def setup(self):
        """Creates submodules."""
        self.network = resnet.ResNet(self.config.network)
        self.score = nn.Dense(1, kernel_init=nn.initializers.normal(0.01))

    def window(self, wav: jax.Array) -> jax.Array:
        """Predicts the score of whole clips as one window: [B, N] in [-1, 1] -> MOS [B]."""
        mels = resnet.log_mels(wav, self.config.sample_rate_hz, self.config.network.mels)
        return LOWEST_MOS + MOS_RANGE * nn.sigmoid(self.score(self.network(mels))[:, 0])

    def __call__(self, wav: jax.Array) -> jax.Array:
        """Predicts scores: [B, N] in [-1, 1] -> MOS [B] float32 in [1, 5].

        The score of a clip longer than window_seconds is the mean of its first and last window,
        which may overlap.
        """
        samples = round(self.config.window_seconds * self.config.sample_rate_hz)
        if wav.shape[-1] <= samples:
            return self.window(wav)
        return self.window(first_and_last(wav, samples)).reshape(-1, 2).mean(axis=1)


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """Size of the preference model.

    Attributes:
      policy: the policy's config; the model has the same trunk.
      window_seconds: length of a window, 20 s in MusicRL. Of a longer clip, the first and the last
        window count.
      captioned: whether the model sees the caption; without it, it scores the music alone (an
        ablation in the paper).
    """

    policy: MusicLMConfig = dataclasses.field(default_factory=MusicLMConfig)
    window_seconds: float = 20.0
    captioned: bool = True

    def __post_init__(self):
        if self.window_seconds * FRAMES_PER_SECOND < 1:
            raise ValueError(
                f"window_seconds = {self.window_seconds} must hold at least one frame of 40 ms"
            )

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Draws the variables of a Preference."""
        return Preference(self).init(key, *self.policy.smallest())


class Preference(nn.Module):
    """A listener's preference up to a constant: Bradley-Terry's score (MusicRL, section 3.2).

    It is a policy's trunk, whose weights it starts from, and a linear score of the mean output,
    which starts at 0. The paper only says that the head gives a scalar.
    """

    config: PreferenceConfig

    def setup(self):
        """Creates submodules."""
        self.trunk = Trunk(self.config.policy)
        # No bias: a constant cancels in a pair.
        self.score = nn.Dense(1, use_bias=False, kernel_init=nn.initializers.zeros)

    def window(self, tokens: jax.Array, mulan: jax.Array) -> jax.Array:
        """Predicts the score of whole clips as one window: int32 [B, F, K], [B, M] -> f32 [B]."""
        mulan = mulan if self.config.captioned else jnp.zeros_like(mulan)
        hidden = self.trunk.hidden(tokens, mulan)
        return self.score(hidden.mean(axis=(1, 2)))[:, 0].astype(jnp.float32)

    def __call__(self, tokens: jax.Array, mulan: jax.Array) -> jax.Array:
        """Predicts scores from clips' tokens and their captions' MuLan tokens, as `window`.

        The score of a clip longer than window_seconds is the mean of its first and last window.
        """
        frames = round(self.config.window_seconds * FRAMES_PER_SECOND)
        if tokens.shape[1] <= frames:
            return self.window(tokens, mulan)
        scores = self.window(first_and_last(tokens, frames), mulan.repeat(2, axis=0))
        return scores.reshape(-1, 2).mean(axis=1)
