"""This project's models that judge or describe clips: reward terms, and features to compare sets by.

Legend: B clips, N samples, V windows of a clip, E MuLan's width, F frames, K codes in a frame.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from musicrl_jax.core import checkpoint
from musicrl_jax.inputs import pieces
from musicrl_jax.models.mulan import MuLan, MuLanConfig
from musicrl_jax.models.rewards import Preference, PreferenceConfig, Quality, QualityConfig
from musicrl_jax.models.semantic import SemanticConfig, SemanticEncoder
from musicrl_jax.systems.musiclm import VOCABULARY, MuLanCondition
from musicrl_jax.systems.system import Rollout, Text, Tree

FIRST_AND_LAST = "the first and the last {:g} s; the mean"


@dataclasses.dataclass(frozen=True)
class TextAdherence:
    """Cosine of MuLan's embeddings of prompt and clip (MusicRL 3.2).

    The mean over the clip's windows, three of 10 s in 30 s.

    Attributes:
      mulan: folder of the MuLan checkpoint.
      licence: that its weights stand under.
    """

    mulan: str = dataclasses.field(metadata=checkpoint.PATH)
    licence: str = dataclasses.field(metadata=checkpoint.NO_IDENTITY)
    name = "text_adherence"
    low = -1.0
    high = 1.0

    def load(self, read: checkpoint.Reader = checkpoint.load_model) -> checkpoint.Model:
        """Returns MuLan."""
        return read(self.mulan, MuLanConfig)

    def windows(self, model: MuLanConfig) -> str:
        """Names the windows: one after the other."""
        return f"windows of {model.window_seconds:g} s, one after the other; the mean"

    def lineage(self, model: checkpoint.Model) -> dict[str, str]:
        """Returns MuLan's own hash."""
        return {"mulan": model.hash}

    def read(self, model: checkpoint.Model, prompts: Sequence[str]) -> Text:
        """Returns the pieces of prompts, {'pieces': int32 [B, L]}."""
        vocabulary = model.assets[VOCABULARY]
        return {"pieces": pieces.encode(vocabulary, prompts, model.config.text_length)}

    def score(self, model: MuLanConfig, variables: Tree, rollout: Rollout, text: Text) -> jax.Array:
        """Returns cosines, f32 [B]."""
        module = MuLan(model)
        if isinstance(rollout.condition, MuLanCondition):
            # The same MuLan read the prompt for the policy, which `lineage` makes sure of.
            prompt = rollout.condition.embedding
        else:
            prompt = module.apply(variables, text["pieces"], method=MuLan.embed_text)
        windows = module.apply(variables, rollout.mono, method=MuLan.embed_windows)  # [B, V, E]
        return jnp.sum(windows * prompt[:, None], axis=-1).mean(axis=1)


@dataclasses.dataclass(frozen=True)
class AcousticQuality:
    """(q - 1) / 4 for a mean opinion score q in [1, 5] (MusicRL 3.2).

    Pseudo-MOS where the regressor learned that.

    Attributes:
      quality: folder of the quality regressor's checkpoint.
      licence: that its weights stand under.
    """

    quality: str = dataclasses.field(metadata=checkpoint.PATH)
    licence: str = dataclasses.field(metadata=checkpoint.NO_IDENTITY)
    name = "acoustic_quality"
    low = 0.0
    high = 1.0

    def load(self, read: checkpoint.Reader = checkpoint.load_model) -> checkpoint.Model:
        """Returns the regressor."""
        return read(self.quality, QualityConfig)

    def windows(self, model: QualityConfig) -> str:
        """Names the windows: both ends."""
        return FIRST_AND_LAST.format(model.window_seconds)

    def lineage(self, model: checkpoint.Model) -> dict[str, str]:
        """Returns {}: it hears waveforms alone."""
        return {}

    def read(self, model: checkpoint.Model, prompts: Sequence[str]) -> Text:
        """Returns {}: the prompt does not matter."""
        return {}

    def score(
        self, model: QualityConfig, variables: Tree, rollout: Rollout, text: Text
    ) -> jax.Array:
        """Returns f32 [B] in [0, 1]."""
        return (Quality(model).apply(variables, rollout.mono) - 1) / 4


@dataclasses.dataclass(frozen=True)
class UserPreference:
    """Score of a preference model trained on votes, unbounded (MusicRL 3.2); MusicLM's clips alone.

    Attributes:
      preference: folder of the preference model's checkpoint.
      licence: that its weights stand under.
    """

    preference: str = dataclasses.field(metadata=checkpoint.PATH)
    licence: str = dataclasses.field(metadata=checkpoint.NO_IDENTITY)
    name = "user_preference"
    low = -math.inf
    high = math.inf

    def load(self, read: checkpoint.Reader = checkpoint.load_model) -> checkpoint.Model:
        """Returns the preference model."""
        return read(self.preference, PreferenceConfig)

    def windows(self, model: PreferenceConfig) -> str:
        """Names the windows: both ends."""
        return FIRST_AND_LAST.format(model.window_seconds)

    def lineage(self, model: checkpoint.Model) -> dict[str, str]:
        """Returns the models whose tokens it was trained on."""
        return model.json_asset(checkpoint.LINEAGE, {str: str}, default={})

    def read(self, model: checkpoint.Model, prompts: Sequence[str]) -> Text:
        """Returns {}: it reads the prompt as the policy does, from the condition."""
        return {}

    def score(
        self, model: PreferenceConfig, variables: Tree, rollout: Rollout, text: Text
    ) -> jax.Array:
        """Returns f32 [B]."""
        tokens = rollout.sampled.tokens
        tokens = tokens.reshape(tokens.shape[0], -1, model.policy.layout.depth)
        return Preference(model).apply(variables, tokens, rollout.condition.tokens)


@dataclasses.dataclass(frozen=True)
class SemanticFeatures:
    """Features of the semantic encoder, by which sets of clips are compared.

    Attributes:
      semantic: folder of the semantic encoder's checkpoint.
    """

    semantic: str = dataclasses.field(metadata=checkpoint.PATH)

    def load(self, read: checkpoint.Reader = checkpoint.load_model) -> checkpoint.Model:
        """Returns the encoder."""
        return read(self.semantic, SemanticConfig)

    def features(self, model: SemanticConfig, variables: Tree, wav: jax.Array) -> jax.Array:
        """Returns f32 [B, F, D] of waveforms f32 [B, N]."""
        encoder = SemanticEncoder(model)
        return encoder.apply(variables, wav, method=SemanticEncoder.features)
