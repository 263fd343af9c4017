"""MusicLM as a system: MuLan reads prompts, MusicLM samples tokens, and two models decode them.

A frame of 40 ms is K tokens of the policy: one semantic code and the coarse codes of two codec
frames (MusicRL 3.1). SoundStorm adds the fine codes, and SoundStream decodes all. The policy's
layers are stacked in memory, and separate on disk.

Legend: B clips, L text pieces, E MuLan's width, M MuLan levels, F frames, K codes in a frame,
S = F K tokens, V ids at a place, T codec frames, Q codec levels, N samples.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from musicrl_jax.core import checkpoint
from musicrl_jax.core.precision import in_dtype
from musicrl_jax.inputs import pieces
from musicrl_jax.losses.policy_gradient import Scores, scores, token_log_probs
from musicrl_jax.models.categorical import sample_codes
from musicrl_jax.models.layers import joined, stacked, unstacked
from musicrl_jax.models.mulan import MuLan, MuLanConfig
from musicrl_jax.models.musiclm import MusicLM, MusicLMConfig, Value
from musicrl_jax.models.semantic import SemanticConfig, SemanticEncoder
from musicrl_jax.models.soundstorm import SoundStorm, SoundStormConfig, fill_fine
from musicrl_jax.models.soundstream import SoundStream, SoundStreamConfig
from musicrl_jax.models.tokens import CODEC_FRAMES_PER_FRAME, FRAMES_PER_SECOND, deinterleave
from musicrl_jax.models.transformer import LANES
from musicrl_jax.systems.sampling import Beginning, SampledTokens, Sampling
from musicrl_jax.systems.system import MusicSystem, Rollout, Text, Tree, Weights

VOCABULARY = "vocabulary"  # asset of MuLan: its tokenizer's file
# The parts that define what tokens mean, by their names in data sets and lineages.
TOKENIZERS = {"codec": "soundstream", "semantic": "semantic", "mulan": "mulan"}
# Sizes that must be equal: (part, field, other part, its field).
SIZES = (
    ("policy", "layout.acoustic_codes", "soundstream", "codes"),
    ("policy", "mulan_levels", "mulan", "levels"),
    ("policy", "mulan_codes", "mulan", "codes"),
    ("soundstorm", "levels", "soundstream", "levels"),
    ("soundstorm", "codes", "soundstream", "codes"),
    ("soundstorm", "coarse_levels", "policy", "layout.coarse_levels"),
)
# Sizes that token data sets record: (name, part, its field); the encoder overrides the policy.
DATA_SIZES = (
    ("acoustic_levels", "soundstream", "levels"),
    ("acoustic_codes", "soundstream", "codes"),
    ("semantic_codes", "policy", "layout.semantic_codes"),
    ("semantic_codes", "semantic", "codes"),
    ("mulan_levels", "mulan", "levels"),
    ("mulan_codes", "mulan", "codes"),
)
JOINED = ("cpu",)  # platforms on which sampling uses joined weights
# Frames whose codes are scored together, by platform; others score whole clips. A gradient then
# holds the activations of so many frames, and computes them again. On a TPU this takes longer.
FRAME_BLOCK = {"cpu": 32}
LOOPED = ("tpu",)  # platforms on which frozen networks scan over stacked layers
FUSED = ("tpu",)  # platforms of the kernel of `models.fused_attention`


@flax.struct.dataclass
class MuLanCondition:
    """Prompts, embedded by MuLan.

    Attributes:
      embedding: f32 [B, E], of length 1.
      tokens: int32 [B, M], the quantized embedding: the policy's prefix.
    """

    embedding: jax.Array
    tokens: jax.Array


class FrameBlock(NamedTuple):
    """Successive frames of all clips, and what their scores need.

    Attributes:
      context: f32 [B, F, d], of each frame.
      tokens: int32 [B, F, K].
      allowed: bool [B, F, V_k] for each place; None if all codes are.
      reference: the anchor's log-distributions, f32 [B, F, V_k] for each place; () without one.
    """

    context: jax.Array
    tokens: jax.Array
    allowed: tuple[jax.Array | None, ...]
    reference: tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class MusicLMSystem(MusicSystem):
    """MuLan, MusicLM, SoundStorm and SoundStream, and the semantic encoder that reads sound.

    Attributes:
      configs: config of each loaded part, by name.
      vocabulary: content of MuLan's tokenizer file.
      lanes: lanes of a vector register; see `models.transformer.Transformer`.
      looped: whether frozen networks scan over stacked layers, which compiles faster.
      joined: whether sampling uses weights that are `layers.joined`. A mesh with a tensor axis
        cannot divide their products, and on a TPU they are copied in each step.
      fused: whether attention over whole clips is `models.fused_attention`.
      frame_block: frames whose codes are scored together, to save memory; None for whole clips.
      remat: whether gradients recompute activations, to save memory.
    """

    PARTS: ClassVar[Mapping[str, type]] = {
        "policy": MusicLMConfig,
        "soundstorm": SoundStormConfig,
        "soundstream": SoundStreamConfig,
        "mulan": MuLanConfig,
        "semantic": SemanticConfig,
    }
    PLAYING: ClassVar[tuple[str, ...]] = ("policy", "soundstorm", "soundstream", "mulan")
    ENCODING: ClassVar[tuple[str, ...]] = ("soundstream", "semantic", "mulan")
    USES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "condition": ("mulan",),
        "codes": ("soundstorm",),
        "decode": ("soundstream",),
    }
    STREAM_FRAMES: ClassVar[int] = FRAMES_PER_SECOND

    configs: Mapping[str, Any]
    vocabulary: bytes = b""
    lanes: int = 1
    looped: bool = False
    joined: bool = False
    fused: bool = False
    frame_block: int | None = None
    remat: bool = False

    frame_seconds: ClassVar[float] = 1 / FRAMES_PER_SECOND

    @property
    def music(self) -> MusicLMConfig:
        """Config of the policy."""
        return self.configs["policy"]

    @property
    def sample_rate_hz(self) -> int:
        """Sample rate of the codec."""
        return self.configs["soundstream"].sample_rate_hz

    @property
    def frame_tokens(self) -> int:
        """Number of codes in a frame, K."""
        return self.music.layout.depth

    @property
    def token_names(self) -> list[str]:
        """Names of the semantic code and of the coarse codes of both codec frames."""
        levels = [f"coarse {level}" for level in range(1, self.music.layout.coarse_levels + 1)]
        return ["semantic", *levels, *levels]

    @property
    def _policy(self) -> MusicLM:
        return MusicLM(self.music, self.remat, self.lanes, self.fused)

    @property
    def _value(self) -> Value:
        return Value(self.music, self.remat, self.lanes, self.fused)

    # --- weights ---

    @classmethod
    def from_models(cls, models: Mapping[str, checkpoint.Model]) -> "MusicLMSystem":
        """Builds the system; raises ValueError if sizes or lineages of the parts do not match."""
        configs = {name: model.config for name, model in models.items()}
        _check_sizes(configs)
        _check_lineage(models)
        vocabulary = b""
        if "mulan" in models:
            if VOCABULARY not in models["mulan"].assets:
                raise ValueError(
                    "the part mulan has no vocabulary in its model's folder: restore a copy, or "
                    "train it again"
                )
            vocabulary = models["mulan"].assets[VOCABULARY]
        return cls(configs, vocabulary).tuned(jax.default_backend())

    def stored(self, policy: Tree) -> Tree:
        """Returns the policy's variables with separate layers."""
        return {"params": unstacked(policy)}

    def restored(self, variables: Tree) -> Tree:
        """Returns the policy's weights with stacked layers."""
        return stacked(variables["params"])

    def tuned(self, platform: str, remat: bool = False) -> "MusicLMSystem":
        """Returns the system with the fastest lanes, loops, attention and blocks."""
        return dataclasses.replace(
            self,
            lanes=LANES.get(platform, 1),
            looped=platform in LOOPED,
            joined=platform in JOINED,
            fused=platform in FUSED,
            frame_block=FRAME_BLOCK.get(platform),
            remat=remat,
        )

    def compute_copy(self, weights: Weights, dtype: str) -> Weights:
        """Separates the policy's layers, and joins their weights if `joined`.

        Casts SoundStorm, and stacks frozen layers if looped.
        """
        frozen = dict(weights.frozen)
        if "soundstorm" in frozen:
            frozen["soundstorm"] = in_dtype(frozen["soundstorm"], dtype)
        policy = unstacked(weights.policy)
        policy = joined(policy) if self.joined else policy
        return Weights(policy, stacked(frozen) if self.looped else frozen)

    def data_layout(self) -> dict[str, int]:
        """Returns the numbers of levels and codes of the loaded parts."""
        layout = {}
        for name, part, field in DATA_SIZES:
            if part in self.configs:
                layout[name] = attrgetter(field)(self.configs[part])
        return layout

    def data_models(self, hashes: Mapping[str, str]) -> dict[str, str]:
        """Returns the hashes of codec, semantic encoder and MuLan, as far as they are loaded."""
        return {name: hashes[part] for name, part in TOKENIZERS.items() if part in hashes}

    # --- text ---

    def read(self, prompts: Sequence[str]) -> Text:
        """Tokenizes prompts for MuLan: {'pieces': int32 [B, L]}, cut to its length."""
        length = self.configs["mulan"].text_length
        return {"pieces": pieces.encode(self.vocabulary, prompts, length)}

    def condition(self, frozen: Mapping[str, Tree], text: Text) -> MuLanCondition:
        """Returns MuLan's embeddings of the texts, and their tokens."""
        mulan, variables = MuLan(self.configs["mulan"]), frozen["mulan"]
        embedding = mulan.apply(variables, text["pieces"], method=MuLan.embed_text)
        tokens = mulan.apply(variables, embedding, method=MuLan.quantize)
        return MuLanCondition(embedding, tokens)

    # --- tokens ---

    def init(self, key: jax.Array) -> Tree:
        """Samples initial weights of the policy, with stacked layers."""
        return stacked(self._policy.init(key, *self.music.smallest())["params"])

    def sample(
        self,
        policy: Tree,
        condition: MuLanCondition,
        keys: jax.Array,
        length: int,
        sampling: Sampling,
        beginning: Beginning | None = None,
    ) -> SampledTokens:
        """Samples frame by frame, and code by code within a frame.

        The scan over frames carries the cache, so XLA updates it in place. Within a frame the codes
        are unrolled: each sees the ones before it alone. The random numbers of a row depend on its
        key and the frame alone.
        """
        start = self._before_frames(policy, condition, length)
        sample_frame = self._frame_sampler(policy, keys, length, sampling, beginning)
        frames = jnp.arange(length // self.frame_tokens, dtype=jnp.int32)
        _, sampled = jax.lax.scan(sample_frame, start, frames)
        return jax.tree.map(lambda x: _by_clip(jnp.moveaxis(x, 0, 1)), sampled)

    def _before_frames(self, policy: Tree, condition: MuLanCondition, length: int) -> Any:
        """Returns the state before the first frame: (tokens of the frame before, cache)."""
        # Frame 0 ignores the tokens before it; the cache has the prompt.
        model, variables, frames = self._policy, {"params": policy}, length // self.frame_tokens
        bias = model.apply(variables, frames, method=MusicLM.temporal_bias)
        prefix = condition.tokens
        cache = model.apply(variables, prefix, frames, bias, method=MusicLM.start_clip)
        return jnp.zeros((prefix.shape[0], self.frame_tokens), jnp.int32), cache

    def _frame_sampler(
        self,
        policy: Tree,
        keys: jax.Array,
        length: int,
        sampling: Sampling,
        beginning: Beginning | None = None,
    ) -> Callable:
        """Returns the function that samples a frame: (state, frame) -> (state, SampledTokens)."""
        layout, frames = self.music.layout, length // self.frame_tokens
        model, variables, batch = self._policy, {"params": policy}, keys.shape[0]
        keys = _split(keys)[:, 0]  # `codes` uses the other ones

        def apply(method: Callable, *arguments: Any) -> Any:
            return model.apply(variables, *arguments, method=method)

        temporal_bias = apply(MusicLM.temporal_bias, frames)
        depth_bias = apply(MusicLM.depth_bias)

        def sample_frame(carry: Any, frame: jax.Array) -> Any:
            # The temporal model reads the previous frame, and gives the context of this one.
            previous, cache = carry
            context, cache = apply(MusicLM.next_frame, previous, cache, frame, temporal_bias)

            # Two random numbers for each code.
            frame_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, frame)
            uniforms = jax.vmap(lambda key: jax.random.uniform(key, (layout.depth, 2)))(frame_keys)

            # The depth model samples the codes, each given those before it in the frame.
            places, code, depth_cache = [], None, apply(MusicLM.empty_depth_cache, batch)
            for place in range(layout.depth):
                logits, depth_cache = apply(
                    MusicLM.next_logits, context, code, depth_cache, place, depth_bias
                )
                allowed = sampling.allowed(logits)
                scores = sampling.log_distribution(logits, allowed)
                code = sample_codes(scores, uniforms[:, place])
                allowed = None if sampling.top_k is None else self._padded(allowed, scores)
                places.append(SampledTokens(code, token_log_probs(scores, code), allowed))
            sampled = _stack_places(places, axis=1)

            # The frames of the beginning replace what was sampled, and the next ones follow them.
            if beginning is not None:
                first_tokens = self._frames(beginning.tokens)[:, frame]
                in_beginning = (frame < beginning.length // layout.depth)[:, None]
                tokens = jnp.where(in_beginning, first_tokens, sampled.tokens)
                sampled = sampled.replace(tokens=tokens)
            return (sampled.tokens, cache), sampled

        return sample_frame

    def distributions(
        self, policy: Tree, condition: MuLanCondition, sampled: SampledTokens, sampling: Sampling
    ) -> jax.Array:
        """Returns the log-distributions of all tokens in one pass, f32 [B, S, V].

        Codes that a place does not have get -inf. The anchor, too, is renormalised over the codes
        that the policy allowed. By its own filter it could exclude some of them, and the KL would
        be infinite.
        """
        missing = self.music.layout.vocabulary - np.array(self.music.layout.sizes)
        places = self.reference(policy, condition, sampled, sampling)
        padded = [
            jnp.pad(scores, ((0, 0), (0, 0), (0, count)), constant_values=-jnp.inf)
            for scores, count in zip(places, missing, strict=True)
        ]
        return _by_clip(jnp.stack(padded, axis=2))

    def reference(
        self, policy: Tree, condition: MuLanCondition, sampled: SampledTokens, sampling: Sampling
    ) -> tuple[jax.Array, ...]:
        """Returns the log-distributions of each place k over its own codes, f32 [B, F, V_k]."""

        def distributions(variables: Tree, block: FrameBlock) -> tuple[jax.Array, ...]:
            return self._log_distributions(variables, block, sampling)

        return self._map_frames(distributions, policy, condition, sampled, ())

    def scores(
        self,
        policy: Tree,
        reference: tuple[jax.Array, ...],
        condition: MuLanCondition,
        sampled: SampledTokens,
        sampling: Sampling,
    ) -> Scores:
        """Returns the tokens' log-probs and KL, f32 [B, S].

        With blocks of frames the gradient computes each again, and stores no distribution.
        """

        def score(variables: Tree, block: FrameBlock) -> Scores:
            log_policy = self._log_distributions(variables, block, sampling)
            places = jnp.moveaxis(block.tokens, 2, 0)
            return _stack_places([*map(scores, log_policy, block.reference, places)], axis=2)

        score = score if self.frame_block is None else jax.checkpoint(score)
        result = self._map_frames(score, policy, condition, sampled, reference)
        return Scores(*map(_by_clip, result))

    def _map_frames(
        self,
        function: Callable[[Tree, "FrameBlock"], Tree],
        policy: Tree,
        condition: MuLanCondition,
        sampled: SampledTokens,
        reference: tuple[jax.Array, ...],
    ) -> Tree:
        """Returns function(variables, block) of all frames, [B, F, ...], block by block."""
        variables, tokens = {"params": self._layers(policy)}, self._frames(sampled.tokens)
        context = self._policy.apply(variables, tokens, condition.tokens, method=MusicLM.context)
        clip = FrameBlock(context, tokens, self._allowed(sampled), reference)
        frames = tokens.shape[1]
        if frames <= (self.frame_block or frames):
            return function(variables, clip)

        # Blocks of equal length; the last frames may be zeros.
        count = -(-frames // self.frame_block)
        size = -(-frames // count)

        def split(x: jax.Array) -> jax.Array:
            padding = [(0, 0), (0, count * size - frames)] + [(0, 0)] * (x.ndim - 2)
            blocks = jnp.pad(x, padding).reshape(len(x), count, size, *x.shape[2:])
            return blocks.swapaxes(0, 1)

        def join(x: jax.Array) -> jax.Array:
            return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :frames]

        blocks = jax.lax.map(lambda block: function(variables, block), jax.tree.map(split, clip))
        return jax.tree.map(join, blocks)

    def _log_distributions(
        self, variables: Tree, block: "FrameBlock", sampling: Sampling
    ) -> tuple[jax.Array, ...]:
        """Returns the log-distributions of a block's places, f32 [B, F, V_k]."""
        logits = self._policy.apply(
            variables, block.context, block.tokens, method=MusicLM.frame_logits
        )
        return tuple(map(sampling.log_distribution, logits, block.allowed))

    def _allowed(self, sampled: SampledTokens) -> tuple[jax.Array | None, ...]:
        """Returns the allowed codes of each place, bool [B, F, V_k]; None if all are."""
        if sampled.allowed is None:
            return (None,) * self.frame_tokens
        frames, sizes = self._frames(sampled.allowed), self.music.layout.sizes
        return tuple(frames[:, :, place, :size] for place, size in enumerate(sizes))

    def _padded(self, allowed: jax.Array | None, scores: jax.Array) -> jax.Array:
        """Returns the allowed codes of a place of V_k codes, bool [B, V]; None stands for all."""
        allowed = jnp.ones(scores.shape, bool) if allowed is None else allowed
        return jnp.pad(allowed, ((0, 0), (0, self.music.layout.vocabulary - scores.shape[-1])))

    # --- values ---

    def init_values(self, key: jax.Array) -> Tree:
        """Samples initial weights of the value function, with stacked layers."""
        return stacked(self._value.init(key, *self.music.smallest())["params"])

    def start_values(self, values: Tree, policy: Tree) -> Tree:
        """Returns the value function's weights with the policy's trunk (MusicRL 3.3)."""
        return {**values, "trunk": jax.tree.map(jnp.copy, policy["trunk"])}

    def values(self, values: Tree, condition: MuLanCondition, tokens: jax.Array) -> jax.Array:
        """Returns the value of the prefix before each token, f32 [B, S]."""
        variables, frames = {"params": self._layers(values)}, self._frames(tokens)
        return _by_clip(self._value.apply(variables, frames, condition.tokens))

    # --- sound ---

    def codes(self, frozen: Mapping[str, Tree], tokens: jax.Array, keys: jax.Array) -> jax.Array:
        """Returns the codes of all codec levels, int32 [B, T, Q]: SoundStorm adds the fine ones."""
        model = SoundStorm(self.configs["soundstorm"])
        coarse = deinterleave(self._frames(tokens))[1]
        return fill_fine(model, frozen["soundstorm"], coarse, _split(keys)[:, 1])

    def decode(self, frozen: Mapping[str, Tree], codes: jax.Array) -> jax.Array:
        """Decodes codes with SoundStream, f32 [B, 1, N]."""
        codec = SoundStream(self.configs["soundstream"])
        return codec.apply(frozen["soundstream"], codes, method=SoundStream.decode)[:, None]

    # --- streams ---

    def start_stream(self, policy: Tree, condition: MuLanCondition, length: int) -> Tree:
        """Returns the states of the three networks before the first frame."""
        # SoundStorm has decided nothing yet, and the codec begins in silence.
        no_codes = condition.tokens.shape[0], 0, self.configs["soundstorm"].levels
        return {
            "policy": self._before_frames(policy, condition, length),
            "past": jnp.zeros(no_codes, jnp.int32),
            "codec": {},
        }

    def stream(
        self,
        weights: Weights,
        state: Tree,
        keys: jax.Array,
        chunk: tuple[jax.Array, int],
        length: int,
        sampling: Sampling,
    ) -> tuple[jax.Array, jax.Array, Tree]:
        """Draws the next chunk.

        Only SoundStorm would see later frames. In a stream it decodes windows that overlap: the
        chunk after the last STREAM_FRAMES decided before it. The codec is causal, and continues.
        """
        # The policy's frames.
        first, count = chunk
        sample_frame = self._frame_sampler(weights.policy, keys, length, sampling)
        frames = first + jnp.arange(count, dtype=jnp.int32)
        policy, sampled = jax.lax.scan(sample_frame, state["policy"], frames)
        tokens = _by_clip(jnp.moveaxis(sampled.tokens, 0, 1))

        # The fine codes. Each window has noise of its own.
        window_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(_split(keys)[:, 1], first)
        storm, variables = SoundStorm(self.configs["soundstorm"]), weights.frozen["soundstorm"]
        coarse = deinterleave(self._frames(tokens))[1]
        codes = fill_fine(storm, variables, coarse, window_keys, state["past"])
        past = jnp.concatenate([state["past"], codes], axis=1)
        past = past[:, -CODEC_FRAMES_PER_FRAME * self.STREAM_FRAMES :]

        # The sound.
        variables = {**weights.frozen["soundstream"], **state["codec"]}
        codec = SoundStream(self.configs["soundstream"])
        wav, stream = codec.apply(variables, codes, method=SoundStream.decode, mutable=["stream"])
        return tokens, wav[:, None], {"policy": policy, "past": past, "codec": stream}

    def encode(self, frozen: Mapping[str, Tree], wav: jax.Array) -> dict[str, jax.Array]:
        """Encodes wav f32 [B, N]: int32 semantic [B, F], acoustic [B, T, Q] and mulan [B, M]."""
        # A policy that learns from sound alone is conditioned on MuLan's audio embeddings.
        mulan = MuLan(self.configs["mulan"])
        embedding = mulan.apply(frozen["mulan"], wav, method=MuLan.embed_audio)
        semantic = SemanticEncoder(self.configs["semantic"])
        codec = SoundStream(self.configs["soundstream"])
        return {
            "semantic": semantic.apply(frozen["semantic"], wav, method=SemanticEncoder.tokens),
            "acoustic": codec.apply(frozen["soundstream"], wav, method=SoundStream.encode),
            "mulan": mulan.apply(frozen["mulan"], embedding, method=MuLan.quantize),
        }

    def features(self, rollout: Rollout) -> dict[str, jax.Array]:
        """Returns the arrays of `encode`, from a rollout."""
        semantic, _ = deinterleave(self._frames(rollout.sampled.tokens))
        return {"semantic": semantic, "acoustic": rollout.codes, "mulan": rollout.condition.tokens}

    # --- shapes and layers ---

    def _frames(self, tokens: jax.Array) -> jax.Array:
        """Splits tokens by frame, [B, S, ...] -> [B, F, K, ...]."""
        return tokens.reshape(tokens.shape[0], -1, self.frame_tokens, *tokens.shape[2:])

    def _layers(self, weights: Tree) -> Tree:
        """Separates stacked layers unless remat scans over them: a quarter faster on CPUs."""
        return weights if self.remat else unstacked(weights)


# --- helpers ---


def _by_clip(x: jax.Array) -> jax.Array:
    """Joins frames, [B, F, K, ...] -> [B, S, ...]."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _stack_places(places: Sequence[Tree], axis: int) -> Tree:
    """Stacks the arrays of K places along an axis."""
    return jax.tree.map(lambda *arrays: jnp.stack(arrays, axis), *places)


def _split(keys: jax.Array) -> jax.Array:
    """Splits keys [B] into independent ones for policy and SoundStorm, [B, 2]."""
    return jax.vmap(jax.random.split)(keys)


def _check_sizes(configs: Mapping[str, Any]) -> None:
    """Raises ValueError if the sizes of two parts that work together differ."""
    for part, field, other, other_field in SIZES:
        if part not in configs or other not in configs:
            continue
        size, expected = attrgetter(field)(configs[part]), attrgetter(other_field)(configs[other])
        if size != expected:
            raise ValueError(
                f"the part {part}: {field} is {size}, but the models it works with have "
                f"{expected}; train it for them"
            )


def _check_lineage(models: Mapping[str, checkpoint.Model]) -> None:
    """Raises ValueError if a part was trained on the tokens of another codec or MuLan."""
    for part in ("policy", "soundstorm"):
        if part not in models:
            continue
        lineage = models[part].json_asset(checkpoint.LINEAGE, {"codec": str, "mulan": str})
        for name in ("codec", "mulan"):
            source = models.get(TOKENIZERS[name])
            if source and lineage[name] != source.hash:
                raise ValueError(
                    f"the part {part} was trained on tokens of {name} {lineage[name][:12]}, not of "
                    f"{source.hash[:12]}: give the folder of that {name}, or encode and train again"
                )
