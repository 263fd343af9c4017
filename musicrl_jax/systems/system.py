"""The contract of a text-to-music model: texts become tokens, and tokens become sound.

RL, the listeners and the verbs know a model by this contract alone. Frames, codec levels, delay
patterns and guidance are the model's own affair. `tests/bigram_system.py` is an example of forty lines.

Legend: B clips, S tokens of a clip in the order of sampling, V token ids, C channels, N samples.
"""

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from musicrl_jax.losses.policy_gradient import Scores, scores, token_log_probs

Tree = Any  # a pytree of arrays, which only the system looks into
Text = Mapping[str, np.ndarray]  # prompts as a system reads them, arrays [B, ...] by name


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How logits become the distribution that tokens are sampled from, which *is* the policy.

    Attributes:
      temperature: above 0; an f32 array that broadcasts against the logits gives each clip its own.
      top_k: only the k likeliest tokens may be sampled, and those that are as likely as the last of
        them; None, the paper's choice, allows all.
    """

    temperature: float | jax.Array = 0.99
    top_k: int | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.temperature, float | int)
        if not isinstance(self.temperature, jax.Array) and not (
            number and 0 < self.temperature < math.inf
        ):
            raise ValueError(f"temperature={self.temperature!r} must be above 0 and finite")
        if self.top_k is not None and not (isinstance(self.top_k, int) and self.top_k >= 1):
            raise ValueError(f"top_k={self.top_k!r} must be 1 or more, or None for all codes")

    def allowed(self, logits: jax.Array) -> jax.Array | None:
        """Returns which tokens may be sampled, bool [..., V]; None if all may."""
        if self.top_k is None or self.top_k >= logits.shape[-1]:
            return None
        return logits >= jax.lax.top_k(logits, self.top_k)[0][..., -1:]

    def log_distribution(self, logits: jax.Array, allowed: jax.Array | None) -> jax.Array:
        """Returns f32 [..., V], renormalised over the allowed tokens; -inf for the others."""
        scaled = logits / self.temperature
        return jax.nn.log_softmax(
            scaled if allowed is None else jnp.where(allowed, scaled, -jnp.inf), axis=-1
        )


class Beginning(NamedTuple):
    """How clips begin that continue given ones."""

    tokens: jax.Array  # int32 [B, S]
    length: jax.Array  # int32 [B], the tokens that are given: whole frames; the others are ignored


@flax.struct.dataclass
class SampledTokens:
    """Tokens with the distribution that they were sampled from.

    Attributes:
      tokens: int32 [B, S].
      log_probs: f32 [B, S], of the tokens under that distribution.
      allowed: bool [B, S, V], the tokens that could have been sampled; None if all could.
    """

    tokens: jax.Array
    log_probs: jax.Array
    allowed: jax.Array | None


@flax.struct.dataclass
class Rollout:
    """Everything that prompts became, on the device.

    Attributes:
      condition: what the policy knows of the prompts, the system's own pytree.
      sampled: the policy's tokens.
      codes: what the tokens became on the way to sound, the system's own pytree.
      wav: f32 [B, C, N], in about [-1, 1].
    """

    condition: Tree
    sampled: SampledTokens
    codes: Tree
    wav: jax.Array

    @property
    def mono(self) -> jax.Array:
        """The mean over the channels, f32 [B, N]."""
        return self.wav[:, 0] if self.wav.shape[1] == 1 else self.wav.mean(axis=1)


class Weights(NamedTuple):
    """A system's weights: the policy, which RL trains, and the frozen parts by name."""

    policy: Tree
    frozen: dict[str, Tree]


class Stages(Protocol):
    """The functions of a rollout: those of a system, or a player's jitted ones."""

    condition: Any
    sample: Any
    codes: Any
    decode: Any


class MusicSystem(abc.ABC):
    """A text-to-music model without its weights.

    A subclass is a frozen dataclass of configs. All methods but `read` and `length` are pure
    functions of arrays, traced under jit. A row of their result depends on its own row of the
    arguments alone.

    Attributes:
      PARTS: the config class of each part on disk, by name; 'policy' is the one that RL trains.
      PLAYING: the parts that make clips from prompts.
      ENCODING: the parts that make tokens from sound; () if the system cannot.
      USES: the frozen parts that each function of `Stages` needs, by the function's name.
      sample_rate_hz: sample rate of the generated audio.
      channels: C.
      frame_seconds: length of a frame; clips and given beginnings are whole frames.
      frame_tokens: tokens of a frame.
      vocabulary: content of the file by which `read` has `inputs.pieces` read texts, and does no
        more; b'' if it reads them in another way. A bundle needs it.
    """

    PARTS: ClassVar[Mapping[str, type]]
    PLAYING: ClassVar[tuple[str, ...]] = ("policy",)
    ENCODING: ClassVar[tuple[str, ...]] = ()
    USES: ClassVar[Mapping[str, tuple[str, ...]]] = {"condition": (), "codes": (), "decode": ()}

    sample_rate_hz: int
    channels: int = 1
    frame_seconds: float
    frame_tokens: int
    vocabulary: bytes = b""

    @property
    def token_names(self) -> list[str]:
        """Names of the tokens of a frame, as pages show them."""
        return [str(number) for number in range(1, self.frame_tokens + 1)]

    # --- from and to disk ---

    @classmethod
    @abc.abstractmethod
    def from_models(cls, models: Mapping[str, Any]) -> "MusicSystem":
        """Builds the system from its parts, `core.checkpoint.Model` by name.

        Raises ValueError, by name of the field, if they do not belong together.
        """

    def stored(self, policy: Tree) -> Tree:
        """Returns the policy's variables as a checkpoint holds them."""
        return {"params": policy}

    def restored(self, variables: Tree) -> Tree:
        """Returns the policy's weights as this system computes with them."""
        return variables["params"]

    def tuned(self, platform: str, remat: bool = False) -> "MusicSystem":
        """Returns the system as it computes fastest on a platform; `remat` saves its memory.

        It computes with any platform's `compute_copy`, if not as fast as with its own.
        """
        del platform, remat
        return self

    def compute_copy(self, weights: Weights, dtype: str) -> Weights:
        """Returns the weights as sampling takes them; `dtype` is that of large products."""
        del dtype
        return weights

    # --- sizes ---

    def length(self, clip_seconds: float) -> int:
        """Returns S of a clip; ValueError if it holds no whole number of frames."""
        frames = round(clip_seconds / self.frame_seconds)
        if frames < 1 or abs(frames * self.frame_seconds - clip_seconds) > 1e-6:
            raise ValueError(
                f"clip_seconds={clip_seconds} must be a multiple of {self.frame_seconds:g} s"
            )
        return frames * self.frame_tokens

    def data_layout(self) -> dict[str, int]:
        """Returns the sizes that a data set of tokens has to share, by name."""
        return {}

    def data_models(self, hashes: Mapping[str, str]) -> dict[str, str]:
        """Returns the hashes that a data set of tokens records of its models, by name.

        Args:
          hashes: of the parts.
        """
        return {name: part for name, part in hashes.items() if name != "policy"}

    # --- text ---

    @abc.abstractmethod
    def read(self, prompts: Sequence[str]) -> Text:
        """Reads texts on the host; ValueError if one says nothing."""

    @abc.abstractmethod
    def condition(self, frozen: Mapping[str, Tree], text: Text) -> Tree:
        """Returns what the policy knows of the texts."""

    # --- tokens ---

    @abc.abstractmethod
    def init(self, key: jax.Array) -> Tree:
        """Draws weights of the policy; boxes with logical axis names say how they are sharded."""

    @abc.abstractmethod
    def sample(
        self,
        policy: Tree,
        condition: Tree,
        keys: jax.Array,
        length: int,
        sampling: Sampling,
        beginning: Beginning | None = None,
    ) -> SampledTokens:
        """Samples clips.

        Args:
          policy: its weights, as `compute_copy` returns them.
          condition: of B prompts.
          keys: [B], one a row.
          length: S.
          sampling: the distribution.
          beginning: tokens that stand before the sampled ones; the log-probs at their places are of
            the tokens that would have been sampled.
        """

    @abc.abstractmethod
    def distributions(
        self, policy: Tree, condition: Tree, sampled: SampledTokens, sampling: Sampling
    ) -> jax.Array:
        """Returns the log-distribution before each token, f32 [B, S, V].

        It is the one that `sample` draws from, over the same allowed tokens. Systems whose V is
        large override `reference` and `scores`, and nothing but tests calls this.
        """

    def reference(
        self, policy: Tree, condition: Tree, sampled: SampledTokens, sampling: Sampling
    ) -> Tree:
        """Returns what `scores` needs of an anchor, computed once a rollout: arrays [B, ...]."""
        return self.distributions(policy, condition, sampled, sampling)

    def scores(
        self,
        policy: Tree,
        reference: Tree,
        condition: Tree,
        sampled: SampledTokens,
        sampling: Sampling,
    ) -> Scores:
        """Scores sampled tokens by policy and anchor: log-probs and the exact KL, f32 [B, S]."""
        log_policy = self.distributions(policy, condition, sampled, sampling)
        return scores(log_policy, reference, sampled.tokens)

    def log_probs(
        self, policy: Tree, condition: Tree, sampled: SampledTokens, sampling: Sampling
    ) -> jax.Array:
        """Returns the tokens' log-probs, f32 [B, S], under the distribution `sample` draws from."""
        return token_log_probs(
            self.distributions(policy, condition, sampled, sampling), sampled.tokens
        )

    def kl(
        self,
        policy: Tree,
        other: Tree,
        condition: Tree,
        sampled: SampledTokens,
        sampling: Sampling,
    ) -> jax.Array:
        """Returns KL(policy || other) before each token, exact over V: f32 [B, S], in nats."""
        reference = self.reference(other, condition, sampled, sampling)
        return self.scores(policy, reference, condition, sampled, sampling).kl

    # --- values: systems without them are trained with another baseline ---

    def init_values(self, key: jax.Array) -> Tree:
        """Draws weights of the value function, boxed as in `init`."""
        raise ValueError(
            f"{type(self).__name__} has no values: set PolicyGradient.baseline to 'leave_one_out'"
        )

    def start_values(self, values: Tree, policy: Tree) -> Tree:
        """Returns the value function's weights, started from the policy's (MusicRL 3.3)."""
        del policy
        return values

    def centre_values(self, values: Tree, mean: jax.Array) -> Tree:
        """Returns the value function's weights, shifted to start at a reward f32 []."""
        raise NotImplementedError

    def values(self, values: Tree, condition: Tree, tokens: jax.Array) -> jax.Array:
        """Returns the value of the prefix before each of the tokens int32 [B, S], f32 [B, S]."""
        raise NotImplementedError

    # --- sound ---

    def codes(self, frozen: Mapping[str, Tree], tokens: jax.Array, keys: jax.Array) -> Tree:
        """Returns what `decode` takes, from the policy's tokens int32 [B, S]; keys as in `sample`."""
        del frozen, keys
        return tokens

    @abc.abstractmethod
    def decode(self, frozen: Mapping[str, Tree], codes: Tree) -> jax.Array:
        """Returns waveforms, f32 [B, C, N]."""

    def sound(self, frozen: Mapping[str, Tree], tokens: jax.Array, keys: jax.Array) -> jax.Array:
        """Returns the waveforms of tokens int32 [B, S], f32 [B, C, N]."""
        return self.decode(frozen, self.codes(frozen, tokens, keys))

    def encode(self, frozen: Mapping[str, Tree], wav: jax.Array) -> dict[str, jax.Array]:
        """Returns the arrays of a token data set, int32 [B, ...] by name, from wav f32 [B, N].

        A token below 0 marks a clip whose features are not finite.
        """
        raise ValueError(f"{type(self).__name__} cannot encode sound")

    def features(self, rollout: Rollout) -> dict[str, jax.Array]:
        """Returns the arrays of a token data set, as `encode` does, of clips that were drawn."""
        return {"tokens": rollout.sampled.tokens}


def roll_out(
    stages: Stages, weights: Weights, text: Text, keys: jax.Array, *sampling: Any
) -> Rollout:
    """Draws a clip for each prompt: condition, sample, codes, decode, one after the other.

    Args:
      stages: a system, or a player.
      weights: as `compute_copy` returns them.
      text: what `read` returned for B prompts.
      keys: [B]; a clip depends on its prompt and key alone.
      sampling: what `stages.sample` takes behind the keys.
    """
    condition = stages.condition(weights.frozen, text)
    sampled = stages.sample(weights.policy, condition, keys, *sampling)
    codes = stages.codes(weights.frozen, sampled.tokens, keys)
    return Rollout(condition, sampled, codes, stages.decode(weights.frozen, codes))
