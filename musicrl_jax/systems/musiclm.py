"""MusicLM and what stands around it: MuLan tokens, the policy's tokens, SoundStorm's fine levels, SoundStream.

A frame of 40 ms is K tokens of the policy: one semantic code and the coarse codes of two codec
frames (MusicRL 3.1). In memory the policy's layers are stacked; on disk they are apart.

Legend: B clips, L text pieces, E MuLan's width, M MuLan levels, F frames, K codes in a frame,
S = F K, V ids at a place, T codec frames, Q codec levels, N samples.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp

from musicrl_jax.core import checkpoint
from musicrl_jax.core.precision import in_dtype
from musicrl_jax.inputs import pieces
from musicrl_jax.losses.policy_gradient import token_log_probs
from musicrl_jax.models.layers import stacked, unstacked
from musicrl_jax.models.mulan import MuLan, MuLanConfig
from musicrl_jax.models.musiclm import MusicLM, MusicLMConfig, Value
from musicrl_jax.models.semantic import SemanticConfig, SemanticEncoder
from musicrl_jax.models.soundstorm import SoundStorm, SoundStormConfig, fill_fine
from musicrl_jax.models.soundstream import SoundStream, SoundStreamConfig
from musicrl_jax.models.tokens import FRAMES_PER_SECOND, deinterleave
from musicrl_jax.models.transformer import LANES
from musicrl_jax.systems.system import (
    Beginning,
    MusicSystem,
    Rollout,
    SampledTokens,
    Sampling,
    Text,
    Tree,
    Weights,
)

VOCABULARY = "vocabulary"  # MuLan's asset: what reads texts
# The parts that say what tokens mean, by the names under which data sets and lineages record them.
TOKENIZERS = {"codec": "soundstream", "semantic": "semantic", "mulan": "mulan"}
LOOPED = ("tpu",)  # platforms on which frozen networks scan over stacked layers


@flax.struct.dataclass
class MuLanCondition:
    """Prompts as MuLan sees them.

    Attributes:
      embedding: f32 [B, E], of length 1.
      tokens: int32 [B, M], the same quantized: the policy's prefix.
    """

    embedding: jax.Array
    tokens: jax.Array


@dataclasses.dataclass(frozen=True)
class MusicLMSystem(MusicSystem):
    """The four models between a prompt and its sound, and the semantic encoder for tokens of sound.

    Attributes:
      configs: the config of each part that is there, by name.
      vocabulary: content of the file that MuLan reads text with.
      lanes: lanes of a vector register, as in `models.transformer.Transformer`.
      looped: whether frozen networks scan over stacked layers, which compiles faster.
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

    configs: Mapping[str, Any]
    vocabulary: bytes = b""
    lanes: int = 1
    looped: bool = False
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
        """K."""
        return self.music.layout.depth

    @property
    def token_names(self) -> list[str]:
        """The semantic code and the levels of both codec frames."""
        levels = [f"coarse {level}" for level in range(1, self.music.layout.coarse_levels + 1)]
        return ["semantic", *levels, *levels]

    @property
    def _policy(self) -> MusicLM:
        return MusicLM(self.music, self.remat, self.lanes)

    @property
    def _value(self) -> Value:
        return Value(self.music, self.remat, self.lanes)

    # --- from and to disk ---

    @classmethod
    def from_models(cls, models: Mapping[str, checkpoint.Model]) -> "MusicLMSystem":
        """Builds the system; ValueError, by name of the field, if the parts do not fit."""
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
        """Returns the policy's variables with its layers apart."""
        return {"params": unstacked(policy)}

    def restored(self, variables: Tree) -> Tree:
        """Returns the policy's weights with its layers stacked."""
        return stacked(variables["params"])

    def tuned(self, platform: str, remat: bool = False) -> "MusicLMSystem":
        """Returns the system for a platform: cache lanes, and whether frozen layers are scanned."""
        return dataclasses.replace(
            self, lanes=LANES.get(platform, 1), looped=platform in LOOPED, remat=remat
        )

    def compute_copy(self, weights: Weights, dtype: str) -> Weights:
        """Returns the policy's layers apart, SoundStorm in `dtype`, frozen layers stacked if looped."""
        frozen = {
            name: in_dtype(tree, dtype) if name == "soundstorm" else tree
            for name, tree in weights.frozen.items()
        }
        return Weights(unstacked(weights.policy), stacked(frozen) if self.looped else frozen)

    def data_layout(self) -> dict[str, int]:
        """Returns levels and codes of the tokens, of the parts that are there."""
        layout = {}
        if "soundstream" in self.configs:
            codec = self.configs["soundstream"]
            layout |= {"acoustic_levels": codec.levels, "acoustic_codes": codec.codes}
        if "semantic" in self.configs:
            layout["semantic_codes"] = self.configs["semantic"].codes
        elif "policy" in self.configs:
            layout["semantic_codes"] = self.music.layout.semantic_codes
        if "mulan" in self.configs:
            mulan = self.configs["mulan"]
            layout |= {"mulan_levels": mulan.levels, "mulan_codes": mulan.codes}
        return layout

    def data_models(self, hashes: Mapping[str, str]) -> dict[str, str]:
        """Returns the hashes of codec, semantic encoder and MuLan, those that are there."""
        return {name: hashes[part] for name, part in TOKENIZERS.items() if part in hashes}

    # --- text ---

    def read(self, prompts: Sequence[str]) -> Text:
        """Returns the pieces of prompts, {'pieces': int32 [B, L]}, cut to MuLan's length."""
        length = self.configs["mulan"].text_length
        return {"pieces": pieces.encode(self.vocabulary, prompts, length)}

    def condition(self, frozen: Mapping[str, Tree], text: Text) -> MuLanCondition:
        """Returns MuLan's embedding of the texts, and its tokens."""
        mulan = MuLan(self.configs["mulan"])
        embedding = mulan.apply(frozen["mulan"], text["pieces"], method=MuLan.embed_text)
        return MuLanCondition(
            embedding, mulan.apply(frozen["mulan"], embedding, method=MuLan.quantize)
        )

    # --- tokens ---

    def init(self, key: jax.Array) -> Tree:
        """Draws weights of the policy, its layers stacked."""
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
        """Samples clips frame by frame, and in a frame code by code.

        The caches travel in the loop's carry and are updated in place. A row's key is folded with
        the frame, so that what a row samples does not depend on the rest of the batch.
        """
        layout, frames = self.music.layout, length // self.frame_tokens
        model, variables, batch = self._policy, {"params": policy}, condition.tokens.shape[0]
        keys = _split(keys)[:, 0]

        def apply(method: Callable, *arguments: Any) -> Any:
            return model.apply(variables, *arguments, method=method)

        temporal_bias = apply(MusicLM.temporal_bias, frames)
        depth_bias = apply(MusicLM.depth_bias)

        def sample_frame(carry: Any, frame: jax.Array) -> Any:
            previous, cache = carry
            context, cache = apply(MusicLM.next_frame, previous, cache, frame, temporal_bias)
            frame_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, frame)
            noise = jax.vmap(
                lambda key: jax.random.gumbel(key, (layout.depth, layout.vocabulary), jnp.float32)
            )(frame_keys)

            def sample_code(carry: Any, inputs: Any) -> Any:
                previous, cache = carry
                place, place_noise = inputs
                logits, cache = apply(
                    MusicLM.next_logits, context, previous, cache, place, depth_bias
                )
                allowed = sampling.allowed(logits)
                scores = sampling.log_distribution(logits, allowed)
                code = jnp.argmax(scores.astype(jnp.float32) + place_noise, axis=-1)
                code = code.astype(jnp.int32)
                return (code, cache), SampledTokens(code, token_log_probs(scores, code), allowed)

            # The codes of the frame, each given those before it.
            start = (jnp.zeros(batch, jnp.int32), apply(MusicLM.empty_depth_cache, batch))
            places = jnp.arange(layout.depth, dtype=jnp.int32)
            _, sampled = jax.lax.scan(sample_code, start, (places, jnp.moveaxis(noise, 1, 0)))
            sampled = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), sampled)  # [B, K, ...]
            if beginning is not None:
                given = self._frames(beginning.tokens)[:, frame]
                kept = (frame < beginning.length // layout.depth)[:, None]
                sampled = sampled.replace(tokens=jnp.where(kept, given, sampled.tokens))
            return (sampled.tokens, cache), sampled

        # The frames, each given those before it.
        cache = apply(MusicLM.start_clip, condition.tokens, frames, temporal_bias)
        start = (jnp.zeros((batch, layout.depth), jnp.int32), cache)
        _, sampled = jax.lax.scan(sample_frame, start, jnp.arange(frames, dtype=jnp.int32))
        return jax.tree.map(lambda x: _by_clip(jnp.moveaxis(x, 0, 1)), sampled)

    def distributions(
        self, policy: Tree, condition: MuLanCondition, sampled: SampledTokens, sampling: Sampling
    ) -> jax.Array:
        """Returns f32 [B, S, V], all positions at once.

        Policy and anchor are renormalised over the same allowed codes. Otherwise a code that the
        anchor's own filter leaves out would cost an infinite KL.
        """
        logits = self._policy.apply(
            {"params": self._layers(policy)}, self._frames(sampled.tokens), condition.tokens
        )
        return sampling.log_distribution(_by_clip(logits), sampled.allowed)

    # --- values ---

    def init_values(self, key: jax.Array) -> Tree:
        """Draws weights of the value function, its layers stacked."""
        return stacked(self._value.init(key, *self.music.smallest())["params"])

    def start_values(self, values: Tree, policy: Tree) -> Tree:
        """Returns the value function with the policy's trunk (MusicRL 3.3)."""
        return {**values, "trunk": jax.tree.map(jnp.copy, policy["trunk"])}

    def centre_values(self, values: Tree, mean: jax.Array) -> Tree:
        """Returns the value function, shifted to start at a reward f32 []."""
        return {**values, "offset": mean}

    def values(self, values: Tree, condition: MuLanCondition, tokens: jax.Array) -> jax.Array:
        """Returns the value of the prefix before each token, f32 [B, S]."""
        frames = self._frames(tokens)
        return _by_clip(
            self._value.apply({"params": self._layers(values)}, frames, condition.tokens)
        )

    # --- sound ---

    def codes(self, frozen: Mapping[str, Tree], tokens: jax.Array, keys: jax.Array) -> jax.Array:
        """Returns all codec levels, int32 [B, T, Q]: SoundStorm adds the fine ones."""
        model = SoundStorm(self.configs["soundstorm"])
        coarse = deinterleave(self._frames(tokens))[1]
        return fill_fine(model, frozen["soundstorm"], coarse, _split(keys)[:, 1])

    def decode(self, frozen: Mapping[str, Tree], codes: jax.Array) -> jax.Array:
        """Returns SoundStream's waveforms, f32 [B, 1, N]."""
        codec = SoundStream(self.configs["soundstream"])
        return codec.apply(frozen["soundstream"], codes, method=SoundStream.decode)[:, None]

    def encode(self, frozen: Mapping[str, Tree], wav: jax.Array) -> dict[str, jax.Array]:
        """Returns semantic int32 [B, F], acoustic [B, T, Q] and mulan [B, M] of wav f32 [B, N]."""
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
        """Returns the arrays that `encode` would, of clips that were drawn."""
        semantic, _ = deinterleave(self._frames(rollout.sampled.tokens))
        return {"semantic": semantic, "acoustic": rollout.codes, "mulan": rollout.condition.tokens}

    # --- shapes and layers ---

    def _frames(self, tokens: jax.Array) -> jax.Array:
        """[B, S] -> [B, F, K]."""
        return tokens.reshape(tokens.shape[0], -1, self.frame_tokens)

    def _layers(self, weights: Tree) -> Tree:
        """Returns stacked weights as they are where remat scans over them; else apart, which CPUs
        compute a quarter faster.
        """
        return weights if self.remat else unstacked(weights)


def _by_clip(x: jax.Array) -> jax.Array:
    """[B, F, K, ...] -> [B, S, ...]."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _split(keys: jax.Array) -> jax.Array:
    """A row's key [B] -> the policy's and SoundStorm's [B, 2], so that neither shows in the other."""
    return jax.vmap(jax.random.split)(keys)


def _check_sizes(configs: Mapping[str, Any]) -> None:
    """Raises ValueError if a part has other sizes than the one it reads from or writes for."""
    pairs = []
    if "policy" in configs and "soundstream" in configs:
        codes = configs["policy"].layout.acoustic_codes
        pairs.append(("policy", "layout.acoustic_codes", codes, configs["soundstream"].codes))
    if "policy" in configs and "mulan" in configs:
        music, mulan = configs["policy"], configs["mulan"]
        pairs.append(("policy", "mulan_levels", music.mulan_levels, mulan.levels))
        pairs.append(("policy", "mulan_codes", music.mulan_codes, mulan.codes))
    if "soundstorm" in configs and "soundstream" in configs:
        storm, codec = configs["soundstorm"], configs["soundstream"]
        pairs.append(("soundstorm", "levels", storm.levels, codec.levels))
        pairs.append(("soundstorm", "codes", storm.codes, codec.codes))
    if "soundstorm" in configs and "policy" in configs:
        levels = configs["policy"].layout.coarse_levels
        pairs.append(("soundstorm", "coarse_levels", configs["soundstorm"].coarse_levels, levels))
    for part, field, value, wanted in pairs:
        if value != wanted:
            raise ValueError(
                f"the part {part}: {field} is {value}, but the models it works with have {wanted}; "
                "train it for them"
            )


def _check_lineage(models: Mapping[str, checkpoint.Model]) -> None:
    """Raises ValueError if a part was trained on the tokens of another codec or MuLan."""
    for part in ("policy", "soundstorm"):
        if part not in models:
            continue
        lineage = models[part].json_asset(checkpoint.LINEAGE, {"codec": str, "mulan": str})
        for name, source in (("codec", "soundstream"), ("mulan", "mulan")):
            if source in models and lineage[name] != models[source].hash:
                raise ValueError(
                    f"the part {part} was trained on tokens of {name} {lineage[name][:12]}, not of "
                    f"{models[source].hash[:12]}: give the folder of that {name}, or encode and "
                    "train again"
                )
