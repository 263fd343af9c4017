"""Reward models: networks that give a clip a number.

The quality regressor hears a waveform and guesses a mean opinion score; the preference model reads caption and tokens
and guesses how well a listener likes the clip.

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

LOWEST_MOS = 1.0
MOS_RANGE = 4.0


def ends(x: jax.Array, length: int) -> jax.Array:
    """The first and the last `length` of every row, one after the other: [B, N, ...] -> [2 B, length, ...].

    Heard side by side they are compiled once, not twice.
    """
    return jnp.stack([x[:, :length], x[:, -length:]], axis=1).reshape(-1, length, *x.shape[2:])


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

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Draws the variables of a Quality."""
        return Quality(self).init(key, jnp.zeros((1, self.sample_rate_hz)))  # one second


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
        return self.window(ends(wav, samples)).reshape(-1, 2).mean(axis=1)


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """Size of the preference model.

    Attributes:
        policy: the policy's config: the same trunk reads the clip.
        window_seconds: what it hears at once, 20 s in MusicRL; of longer clips it hears the first and the last so many.
        captioned: whether it sees the caption; without, it judges the music alone (an ablation of the paper's).
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
    """How well listeners like a clip, up to a constant: Bradley-Terry's score (MusicRL, section 3.2).

    A policy's trunk, from whose weights it starts, and a linear score of its mean output that starts at 0. The paper
    says no more of the head than that it gives a scalar.
    """

    config: PreferenceConfig

    def setup(self):
        self.trunk = Trunk(self.config.policy)
        self.score = nn.Dense(
            1, use_bias=False, kernel_init=nn.initializers.zeros
        )  # a constant would cancel

    def window(self, tokens: jax.Array, mulan: jax.Array) -> jax.Array:
        """int32 [B, F, K], int32 [B, M] -> f32 [B], of the whole clip, read at once."""
        mulan = mulan if self.config.captioned else jnp.zeros_like(mulan)
        hidden = self.trunk.hidden(tokens, mulan)
        return self.score(hidden.mean(axis=(1, 2)))[:, 0].astype(jnp.float32)

    def __call__(self, tokens: jax.Array, mulan: jax.Array) -> jax.Array:
        """A clip's interleaved tokens int32 [B, F, K] and its caption's MuLan tokens int32 [B, M] -> f32 [B].

        Of a clip longer than window_seconds, the mean of its first and of its last window.
        """
        frames = round(self.config.window_seconds * FRAMES_PER_SECOND)
        if tokens.shape[1] <= frames:
            return self.window(tokens, mulan)
        return (
            self.window(ends(tokens, frames), mulan.repeat(2, axis=0)).reshape(-1, 2).mean(axis=1)
        )
