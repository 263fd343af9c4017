"""Reward terms by this project's models, and features to compare sets of clips by.

Legend: B clips, L text pieces, N samples, V windows of a clip, E MuLan's width, F frames, D numbers
of a frame.
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

# --- reward terms; `rl.rewards.Term` is their protocol ---


class _FirstAndLastWindow:
    """A term that scores both ends of a clip, and neither reads the prompt nor has a lineage."""

    def windows(self, model: QualityConfig | PreferenceConfig) -> str:
        """Says which windows of a clip are scored, and how their scores are combined."""
        return f"the first and the last {model.window_seconds:g} s; the mean"

    def lineage(self, model: checkpoint.Model) -> dict[str, str]:
        """Returns {}: the term works with the clips of any system."""
        return {}

    def read(self, model: checkpoint.Model, prompts: Sequence[str]) -> Text:
        """Returns {}: the term does not read prompts itself."""
        return {}


@dataclasses.dataclass(frozen=True)
class TextAdherence:
    """Cosine of MuLan's embeddings of prompt and clip (MusicRL 3.2).

    It is averaged over the clip's windows: three of 10 s in 30 s.

    Attributes:
      mulan: folder of the MuLan checkpoint.
      licence: licence of its weights.
    """

    mulan: str = dataclasses.field(metadata=checkpoint.PATH)
    licence: str = dataclasses.field(metadata=checkpoint.NO_IDENTITY)
    name = "text_adherence"
    low = -1.0
    high = 1.0

    def load(self, read: checkpoint.Reader = checkpoint.load_model) -> checkpoint.Model:
        """Loads MuLan."""
        return read(self.mulan, MuLanConfig)

    def windows(self, model: MuLanConfig) -> str:
        """Says which windows of a clip are scored, and how their scores are combined."""
        return f"windows of {model.window_seconds:g} s, one after the other; the mean"

    def lineage(self, model: checkpoint.Model) -> dict[str, str]:
        """Returns MuLan's hash."""
        return {"mulan": model.hash}

    def read(self, model: checkpoint.Model, prompts: Sequence[str]) -> Text:
        """Tokenizes prompts for MuLan, {'pieces': int32 [B, L]}."""
        vocabulary = model.assets[VOCABULARY]
        return {"pieces": pieces.encode(vocabulary, prompts, model.config.text_length)}

    def score(self, model: MuLanConfig, variables: Tree, rollout: Rollout, text: Text) -> jax.Array:
        """Returns cosines, f32 [B]."""
        module = MuLan(model)
        if isinstance(rollout.condition, MuLanCondition):
            # This MuLan has embedded the prompt for the policy: `lineage` holds it to be the same.
            prompt = rollout.condition.embedding
        else:
            prompt = module.apply(variables, text["pieces"], method=MuLan.embed_text)
        windows = module.apply(variables, rollout.mono, method=MuLan.embed_windows)  # [B, V, E]
        return jnp.sum(windows * prompt[:, None], axis=-1).mean(axis=1)


@dataclasses.dataclass(frozen=True)
class AcousticQuality(_FirstAndLastWindow):
    """(q - 1) / 4 for a predicted mean opinion score q in [1, 5] (MusicRL 3.2).

    Attributes:
      quality: folder of the quality regressor's checkpoint.
      licence: licence of its weights.
    """

    quality: str = dataclasses.field(metadata=checkpoint.PATH)
    licence: str = dataclasses.field(metadata=checkpoint.NO_IDENTITY)
    name = "acoustic_quality"
    low = 0.0
    high = 1.0

    def load(self, read: checkpoint.Reader = checkpoint.load_model) -> checkpoint.Model:
        """Loads the regressor."""
        return read(self.quality, QualityConfig)

    def score(
        self, model: QualityConfig, variables: Tree, rollout: Rollout, text: Text
    ) -> jax.Array:
        """Returns scores, f32 [B] in [0, 1]."""
        return (Quality(model).apply(variables, rollout.mono) - 1) / 4


@dataclasses.dataclass(frozen=True)
class UserPreference(_FirstAndLastWindow):
    """Score of a preference model that was trained on votes, unbounded (MusicRL 3.2).

    The model reads the tokens and the condition of `MusicLMSystem`.

    Attributes:
      preference: folder of the preference model's checkpoint.
      licence: licence of its weights.
    """

    preference: str = dataclasses.field(metadata=checkpoint.PATH)
    licence: str = dataclasses.field(metadata=checkpoint.NO_IDENTITY)
    name = "user_preference"
    low = -math.inf
    high = math.inf

    def load(self, read: checkpoint.Reader = checkpoint.load_model) -> checkpoint.Model:
        """Loads the preference model."""
        return read(self.preference, PreferenceConfig)

    def lineage(self, model: checkpoint.Model) -> dict[str, str]:
        """Returns the hashes of the models whose tokens it was trained on."""
        return model.json_asset(checkpoint.LINEAGE, {str: str}, default={})

    def score(
        self, model: PreferenceConfig, variables: Tree, rollout: Rollout, text: Text
    ) -> jax.Array:
        """Returns scores, f32 [B]."""
        # The model reads frames, [B, F, K], where K is the codes in a frame.
        tokens = rollout.sampled.tokens
        tokens = tokens.reshape(tokens.shape[0], -1, model.policy.layout.depth)
        return Preference(model).apply(variables, tokens, rollout.condition.tokens)


# --- features ---


@dataclasses.dataclass(frozen=True)
class SemanticFeatures:
    """Features of the semantic encoder, to compare sets of clips by.

    Attributes:
      semantic: folder of the semantic encoder's checkpoint.
    """

    semantic: str = dataclasses.field(metadata=checkpoint.PATH)

    def load(self, read: checkpoint.Reader = checkpoint.load_model) -> checkpoint.Model:
        """Loads the semantic encoder."""
        return read(self.semantic, SemanticConfig)

    def features(self, model: SemanticConfig, variables: Tree, wav: jax.Array) -> jax.Array:
        """Returns features f32 [B, F, D] of waveforms f32 [B, N]."""
        encoder = SemanticEncoder(model)
        return encoder.apply(variables, wav, method=SemanticEncoder.features)
