"""The contract of a text-to-music model: it turns texts into tokens, and tokens into sound.

RL, listeners and verbs know a model by this contract alone. Codec levels, delay patterns and
guidance are the model's own affair. `tests/bigram_system.py` is a complete example.

Legend: B clips, S tokens of a clip in sampling order, V token ids, C channels, N samples.
"""

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import flax.struct
import jax
import numpy as np

from musicrl_jax.losses.policy_gradient import Scores, scores
from musicrl_jax.systems.sampling import Beginning, SampledTokens, Sampling

Tree = Any  # a pytree of arrays that only the system looks into
Text = Mapping[str, np.ndarray]  # prompts that a system has read, arrays [B, ...] by name


@flax.struct.dataclass
class Rollout:
    """Clips with everything that was computed on the way to them, on the device.

    Attributes:
      condition: output of `MusicSystem.condition`.
      sampled: output of `MusicSystem.sample`.
      codes: output of `MusicSystem.codes`.
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


class MusicSystem(abc.ABC):
    """A text-to-music model without its weights.

    A subclass is a frozen dataclass of configs. The methods of the sections text, tokens, values
    and sound are pure functions, traced under jit (`read` is not: it runs on the host). Row i of
    their results depends on row i of their arguments alone.

    Attributes:
      PARTS: config class of each part on disk, by name; RL trains the part 'policy'.
      PLAYING: names of the parts that turn prompts into clips.
      ENCODING: names of the parts that turn sound into tokens; () if the system cannot.
      USES: names of the frozen parts that `condition`, `codes` and `decode` take.
      sample_rate_hz: sample rate of the generated audio.
      channels: C.
      frame_seconds: length of a frame; clips and beginnings are whole frames.
      frame_tokens: tokens of a frame.
      vocabulary: content of the vocabulary file, if `read` only calls `inputs.pieces.encode` with
        it; otherwise b'', and the system cannot be exported.
      STREAM_FRAMES: frames of a chunk of a stream; 0 if the system cannot stream.
    """

    PARTS: ClassVar[Mapping[str, type]]
    PLAYING: ClassVar[tuple[str, ...]] = ("policy",)
    ENCODING: ClassVar[tuple[str, ...]] = ()
    USES: ClassVar[Mapping[str, tuple[str, ...]]] = {"condition": (), "codes": (), "decode": ()}
    STREAM_FRAMES: ClassVar[int] = 0

    sample_rate_hz: int
    channels: int = 1
    frame_seconds: float
    frame_tokens: int
    vocabulary: bytes = b""

    @property
    def token_names(self) -> list[str]:
        """Names of the tokens of a frame, for pages."""
        return [str(number) for number in range(1, self.frame_tokens + 1)]

    # --- weights ---

    @classmethod
    @abc.abstractmethod
    def from_models(cls, models: Mapping[str, Any]) -> "MusicSystem":
        """Builds the system from its parts, `core.checkpoint.Model` by name.

        Raises ValueError, with the name of the field, if parts do not belong together.
        """

    def stored(self, policy: Tree) -> Tree:
        """Returns the policy's variables as a checkpoint holds them."""
        return {"params": policy}

    def restored(self, variables: Tree) -> Tree:
        """Returns the policy's weights from a checkpoint's variables; inverts `stored`."""
        return variables["params"]

    def tuned(self, platform: str, remat: bool = False) -> "MusicSystem":
        """Returns the system in its fastest form for a platform; `remat` saves memory in gradients.

        Any form computes with any form's `compute_copy`.
        """
        return self

    def compute_copy(self, weights: Weights, dtype: str) -> Weights:
        """Returns the weights that sampling takes; frozen token models multiply in `dtype`."""
        return weights

    # --- sizes ---

    def length(self, clip_seconds: float) -> int:
        """Returns S of a clip; raises ValueError if it is not a whole number of frames."""
        frames = round(clip_seconds / self.frame_seconds)
        if frames < 1 or abs(frames * self.frame_seconds - clip_seconds) > 1e-6:
            raise ValueError(
                f"clip_seconds={clip_seconds} must be a multiple of {self.frame_seconds:g} s"
            )
        return frames * self.frame_tokens

    def data_layout(self) -> dict[str, int]:
        """Returns the sizes, by name, that a data set of this system's tokens must have."""
        return {}

    def data_models(self, hashes: Mapping[str, str]) -> dict[str, str]:
        """Returns the hashes that a token data set records, by name, from the hashes of parts."""
        return {name: part for name, part in hashes.items() if name != "policy"}

    # --- text ---

    @abc.abstractmethod
    def read(self, prompts: Sequence[str]) -> Text:
        """Reads prompts on the host; raises ValueError if one is empty."""

    @abc.abstractmethod
    def condition(self, frozen: Mapping[str, Tree], text: Text) -> Tree:
        """Returns what the policy is conditioned on."""

    # --- tokens ---

    @abc.abstractmethod
    def init(self, key: jax.Array) -> Tree:
        """Samples initial weights of the policy, boxed with logical axis names for sharding."""

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
          policy: weights from `compute_copy`.
          condition: output of `condition` for B prompts.
          keys: random keys [B].
          length: S.
          sampling: the distribution.
          beginning: first tokens of the clips. There, the log-probs are those of tokens that would
            have been sampled.
        """

    @abc.abstractmethod
    def distributions(
        self, policy: Tree, condition: Tree, sampled: SampledTokens, sampling: Sampling
    ) -> jax.Array:
        """Returns the log-distribution of each token given the tokens before it, f32 [B, S, V].

        `sample` samples from it: the allowed tokens are `sampled.allowed`. A system with a large V
        overrides `reference` and `scores`, so that only tests call this.
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
        """Returns the tokens' log-probs, and the exact KL to an anchor before each, f32 [B, S]."""
        log_policy = self.distributions(policy, condition, sampled, sampling)
        return scores(log_policy, reference, sampled.tokens)

    def log_probs(
        self, policy: Tree, condition: Tree, sampled: SampledTokens, sampling: Sampling
    ) -> jax.Array:
        """Returns the tokens' log-probs, f32 [B, S], under the distribution of `sample`."""
        reference = self.reference(policy, condition, sampled, sampling)
        return self.scores(policy, reference, condition, sampled, sampling).log_probs

    def kl(
        self,
        policy: Tree,
        other: Tree,
        condition: Tree,
        sampled: SampledTokens,
        sampling: Sampling,
    ) -> jax.Array:
        """Returns KL(policy || other) before each token, exact over V, in nats: f32 [B, S]."""
        reference = self.reference(other, condition, sampled, sampling)
        return self.scores(policy, reference, condition, sampled, sampling).kl

    # --- values: without them, another baseline is needed ---

    def init_values(self, key: jax.Array) -> Tree:
        """Samples initial weights of the value function, boxed as in `init`."""
        raise ValueError(
            f"{type(self).__name__} has no values: set PolicyGradient.baseline to 'leave_one_out'"
        )

    def start_values(self, values: Tree, policy: Tree) -> Tree:
        """Returns the value function's weights, initialised from the policy's (MusicRL 3.3)."""
        return values

    def centre_values(self, values: Tree, mean: jax.Array) -> Tree:
        """Returns the value function's weights, with their 'offset' at a mean reward, f32 []."""
        return {**values, "offset": mean}

    def values(self, values: Tree, condition: Tree, tokens: jax.Array) -> jax.Array:
        """Returns the value of the prefix before each token, f32 [B, S]."""
        raise ValueError(f"{type(self).__name__} has init_values, but no values: define both")

    # --- sound ---

    def codes(self, frozen: Mapping[str, Tree], tokens: jax.Array, keys: jax.Array) -> Tree:
        """Returns the input of `decode` for tokens int32 [B, S] and the keys of `sample`."""
        return tokens

    @abc.abstractmethod
    def decode(self, frozen: Mapping[str, Tree], codes: Tree) -> jax.Array:
        """Returns waveforms, f32 [B, C, N]."""

    def sound(self, frozen: Mapping[str, Tree], tokens: jax.Array, keys: jax.Array) -> jax.Array:
        """Returns the waveforms of tokens int32 [B, S], f32 [B, C, N]; keys as in `sample`."""
        return self.decode(frozen, self.codes(frozen, tokens, keys))

    # --- streams: optional; the sound of a clip while its later tokens are not yet sampled ---

    def stream_chunks(self, frames: int) -> list[int]:
        """Returns the frames of each chunk of a clip; raises ValueError if it cannot stream.

        All chunks but the first have STREAM_FRAMES, so that two compiled functions draw any clip.
        """
        chunk = self.STREAM_FRAMES
        if not chunk:
            raise ValueError(
                f"{type(self).__name__} cannot stream: define STREAM_FRAMES, start_stream and "
                "stream, or ask for whole clips"
            )
        # The first chunk has what remains, so that it has at least as many frames as the others.
        later = max(0, frames // chunk - 1)
        return [frames - later * chunk] + [chunk] * later

    def start_stream(self, policy: Tree, condition: Tree, length: int) -> Tree:
        """Returns the state before the first chunk of clips of `length` tokens.

        It is arrays [B, ...] in dictionaries, lists and tuples, which a bundle can store.
        """
        raise ValueError(f"{type(self).__name__} has STREAM_FRAMES, but no start_stream: define it")

    def stream(
        self,
        weights: Weights,
        state: Tree,
        keys: jax.Array,
        chunk: tuple[jax.Array, int],
        length: int,
        sampling: Sampling,
    ) -> tuple[jax.Array, jax.Array, Tree]:
        """Draws the next chunk of streamed clips.

        The tokens of all chunks are those that `sample` samples with the same keys. The sound may
        differ from `sound`, which sees whole clips; it depends on the arguments of `sample` alone.

        Args:
          weights: from `compute_copy`.
          state: of `start_stream`, or of the chunk before.
          keys: random keys [B], the same for all chunks.
          chunk: (its first frame, int32 []; its number of frames).
          length: S of the whole clips.
          sampling: the distribution.

        Returns:
          The chunk's tokens, int32 [B, s], and waveforms, f32 [B, C, n]; and the next state.
        """
        raise ValueError(f"{type(self).__name__} has STREAM_FRAMES, but no stream: define it")

    def encode(self, frozen: Mapping[str, Tree], wav: jax.Array) -> dict[str, jax.Array]:
        """Returns the arrays of a token data set, int32 [B, ...] by name, from wav f32 [B, N].

        A token is below 0 if the features it comes from are not finite.
        """
        raise ValueError(f"{type(self).__name__} cannot encode sound")

    def features(self, rollout: Rollout) -> dict[str, jax.Array]:
        """Returns the same arrays as `encode`, from a rollout."""
        return {"tokens": rollout.sampled.tokens}
