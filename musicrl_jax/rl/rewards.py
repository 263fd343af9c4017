"""Reward terms and their mixture.

A term says what it is called, in which range it lies and which weights it needs; `score` is a pure function
(weights, Rollout) -> f32 [B] on the device. A user's own term is a frozen dataclass with the same five members.

Legend: B clips.
"""

import dataclasses
import json
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from musicrl_jax.core import checkpoint
from musicrl_jax.models.mulan import MuLan, MuLanConfig
from musicrl_jax.models.rewards import Preference, PreferenceConfig, Quality, QualityConfig
from musicrl_jax.rl.rollout import LINEAGE, Rollout


class Term(Protocol):
    """What a reward term offers."""

    name: str
    low: float
    high: float

    def load(self) -> checkpoint.Model:
        """The term's model, read once."""

    def score(self, model: Any, variables: Any, rollout: Rollout) -> jax.Array:
        """f32 [B] in [low, high]; `model` is the config that `load` gave, `variables` its weights."""


@dataclasses.dataclass(frozen=True)
class TextAdherence:
    """Cosine of MuLan's embeddings of the prompt and of the clip, as it is; the mean over the clip's windows, three of
    10 s in 30 s (MusicRL 3.2).

    Attributes:
      mulan: folder of the MuLan checkpoint.
    """

    mulan: str
    name = "text_adherence"
    low = -1.0
    high = 1.0

    def load(self) -> checkpoint.Model:
        """MuLan."""
        return checkpoint.load_model(self.mulan, MuLanConfig)

    def score(self, model: MuLanConfig, variables: Any, rollout: Rollout) -> jax.Array:
        """f32 [B]."""
        audio = MuLan(model).apply(variables, rollout.wav, method="embed_windows")  # [B, V, E]
        return jnp.sum(audio * rollout.embedding[:, None], axis=-1).mean(axis=1)


@dataclasses.dataclass(frozen=True)
class AcousticQuality:
    """(q - 1) / 4 for a mean opinion score q in [1, 5] (MusicRL 3.2); pseudo-MOS where the regressor learned that.

    Attributes:
      quality: folder of the quality regressor's checkpoint.
    """

    quality: str
    name = "acoustic_quality"
    low = 0.0
    high = 1.0

    def load(self) -> checkpoint.Model:
        """The regressor."""
        return checkpoint.load_model(self.quality, QualityConfig)

    def score(self, model: QualityConfig, variables: Any, rollout: Rollout) -> jax.Array:
        """f32 [B]."""
        return (Quality(model).apply(variables, rollout.wav) - 1) / 4


@dataclasses.dataclass(frozen=True)
class UserPreference:
    """The score of a preference model trained on votes, as it is (MusicRL 3.2); unbounded.

    Attributes:
      preference: folder of the preference model's checkpoint.
    """

    preference: str
    name = "user_preference"
    low = -math.inf
    high = math.inf

    def load(self) -> checkpoint.Model:
        """The preference model."""
        return checkpoint.load_model(self.preference, PreferenceConfig)

    def score(self, model: PreferenceConfig, variables: Any, rollout: Rollout) -> jax.Array:
        """f32 [B]."""
        return Preference(model).apply(variables, rollout.tokens, rollout.mulan)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A weighted sum of terms.

    Attributes:
      terms: the terms, each name once.
      weights: a weight for each term's name.
    """

    terms: tuple[Term, ...]
    weights: dict[str, float]

    def __post_init__(self) -> None:
        names = [term.name for term in self.terms]
        if len(set(names)) < len(names):
            raise ValueError(f"Mixture.terms names a reward twice: {names}; keep each once")
        if set(names) != set(self.weights):
            raise ValueError(
                f"Mixture.weights is for {sorted(self.weights)}, Mixture.terms are {sorted(names)}; make them match"
            )

    def load(self) -> "LoadedMixture":
        """Reads every term's model."""
        return LoadedMixture(self, {term.name: term.load() for term in self.terms})


@dataclasses.dataclass(frozen=True)
class LoadedMixture:
    """A mixture with its models."""

    mixture: Mixture
    models: dict[str, checkpoint.Model]

    @property
    def variables(self) -> dict[str, Any]:
        """The weights, an argument of the jitted reward step."""
        return {name: model.variables for name, model in self.models.items()}

    @property
    def hashes(self) -> dict[str, str]:
        """Each term's checkpoint, by content."""
        return {name: model.hash for name, model in self.models.items()}

    def check_lineage(self, lineage: bytes) -> None:
        """ValueError where a term reads tokens, and of other models than those in `lineage`, the policy's."""
        spoken = json.loads(lineage)
        for name, model in self.models.items():
            for other, found in json.loads(model.assets.get(LINEAGE, b"{}")).items():
                if found != spoken.get(other, found):
                    raise ValueError(
                        f"the model of reward {name} was trained on tokens of {other} {found[:12]}, and the policy "
                        f"speaks those of {spoken[other][:12]}: train it on votes for clips of this policy"
                    )

    def score(self, variables: dict[str, Any], rollout: Rollout) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(the mixture f32 [B], each term f32 [B])."""
        scores = {
            term.name: term.score(self.models[term.name].config, variables[term.name], rollout).astype(jnp.float32)
            for term in self.mixture.terms
        }
        total = sum(self.mixture.weights[name] * score for name, score in scores.items())
        return total, scores

    def check(self, scores: dict[str, np.ndarray]) -> None:
        """ValueError where a term left its range; what is not finite is left to the update, which skips it."""
        for term in self.mixture.terms:
            values = np.asarray(scores[term.name])
            outside = values[np.isfinite(values) & ((values < term.low - 1e-4) | (values > term.high + 1e-4))]
            if outside.size:
                raise ValueError(
                    f"reward {term.name} is {outside[0]:.4g}, outside [{term.low}, {term.high}]: mend the term"
                )
