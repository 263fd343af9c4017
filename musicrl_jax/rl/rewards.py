"""Reward terms and their mixture.

A term says what it is called, in which range it lies, under which licence its model stands, what of a clip that hears
and which weights it needs; `score` is a pure function (weights, Rollout) -> f32 [B] on the device. A user's own term is
a frozen dataclass with the same members.

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
from musicrl_jax.rl.rollout import Loaded, Rollout

FIRST_AND_LAST = "the first and the last {:g} s; the mean"
Units = dict[str, tuple[jax.Array | float, jax.Array | float]]  # centre and spread of each term


class Term(Protocol):
    """What a reward term offers."""

    name: str
    low: float
    high: float
    licence: str

    def load(self) -> checkpoint.Model:
        """The term's model, read once."""

    def windows(self, model: Any) -> str:
        """In words, what of a clip is heard."""

    def score(self, model: Any, variables: Any, rollout: Rollout) -> jax.Array:
        """f32 [B] in [low, high]; `model` is the config that `load` gave, `variables` its weights."""


@dataclasses.dataclass(frozen=True)
class TextAdherence:
    """Cosine of MuLan's embeddings of the prompt and of the clip, as it is; the mean over the clip's windows, three of
    10 s in 30 s (MusicRL 3.2).

    Attributes:
      mulan: folder of the MuLan checkpoint.
      licence: that its weights stand under.
    """

    mulan: str
    licence: str = dataclasses.field(metadata=checkpoint.NO_IDENTITY)
    name = "text_adherence"
    low = -1.0
    high = 1.0

    def load(self) -> checkpoint.Model:
        """MuLan."""
        return checkpoint.load_model(self.mulan, MuLanConfig)

    def windows(self, model: MuLanConfig) -> str:
        """One after the other."""
        return f"windows of {model.window_seconds:g} s, one after the other; the mean"

    def score(self, model: MuLanConfig, variables: Any, rollout: Rollout) -> jax.Array:
        """f32 [B]."""
        audio = MuLan(model).apply(variables, rollout.wav, method="embed_windows")  # [B, V, E]
        return jnp.sum(audio * rollout.embedding[:, None], axis=-1).mean(axis=1)


@dataclasses.dataclass(frozen=True)
class AcousticQuality:
    """(q - 1) / 4 for a mean opinion score q in [1, 5] (MusicRL 3.2); pseudo-MOS where the regressor learned that.

    Attributes:
      quality: folder of the quality regressor's checkpoint.
      licence: that its weights stand under.
    """

    quality: str
    licence: str = dataclasses.field(metadata=checkpoint.NO_IDENTITY)
    name = "acoustic_quality"
    low = 0.0
    high = 1.0

    def load(self) -> checkpoint.Model:
        """The regressor."""
        return checkpoint.load_model(self.quality, QualityConfig)

    def windows(self, model: QualityConfig) -> str:
        """Both ends."""
        return FIRST_AND_LAST.format(model.window_seconds)

    def score(self, model: QualityConfig, variables: Any, rollout: Rollout) -> jax.Array:
        """f32 [B]."""
        return (Quality(model).apply(variables, rollout.wav) - 1) / 4


@dataclasses.dataclass(frozen=True)
class UserPreference:
    """The score of a preference model trained on votes, as it is (MusicRL 3.2); unbounded.

    Attributes:
      preference: folder of the preference model's checkpoint.
      licence: that its weights stand under.
    """

    preference: str
    licence: str = dataclasses.field(metadata=checkpoint.NO_IDENTITY)
    name = "user_preference"
    low = -math.inf
    high = math.inf

    def load(self) -> checkpoint.Model:
        """The preference model."""
        return checkpoint.load_model(self.preference, PreferenceConfig)

    def windows(self, model: PreferenceConfig) -> str:
        """Both ends."""
        return FIRST_AND_LAST.format(model.window_seconds)

    def score(self, model: PreferenceConfig, variables: Any, rollout: Rollout) -> jax.Array:
        """f32 [B]."""
        return Preference(model).apply(variables, rollout.tokens, rollout.mulan)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A weighted sum of terms.

    Attributes:
      terms: the terms, each name once.
      weights: a weight for each term's name.
      normalise: whether a term is first brought to mean 0 and standard deviation 1 over clips of the base, so that
        weights mean the same for terms of any scale; else terms are taken as they are, as in MusicRL.
    """

    terms: tuple[Term, ...]
    weights: dict[str, float]
    normalise: bool = False

    def __post_init__(self) -> None:
        names = [term.name for term in self.terms]
        if len(set(names)) < len(names):
            raise ValueError(f"Mixture.terms names a reward twice: {names}; keep each once")
        if not names:
            raise ValueError("Mixture.terms is empty: name a reward")
        if wrong := [name for name, weight in self.weights.items() if not math.isfinite(weight)]:
            raise ValueError(f"Mixture.weights[{wrong[0]!r}] = {self.weights[wrong[0]]} must be finite")
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

    def check_models(self, loaded: Loaded) -> None:
        """ValueError where a term's model does not belong to the policy's: it reads tokens of other models, compares
        with another MuLan's embedding, or hears at another rate."""
        spoken = json.loads(loaded.lineage)
        for name, model in self.models.items():
            read = model.json_asset(checkpoint.LINEAGE, {str: str}, default={})
            if isinstance(model.config, MuLanConfig):
                read = {"mulan": model.hash}
            for other, found in read.items():
                if found != spoken.get(other, found):
                    raise ValueError(
                        f"the model of reward {name} works with {other} {found[:12]}, and the policy speaks the tokens "
                        f"of {spoken[other][:12]}: give that one's folder, or train on votes for clips of this policy"
                    )
            rate = getattr(model.config, "sample_rate_hz", loaded.studio.sample_rate_hz)
            if rate != loaded.studio.sample_rate_hz:
                raise ValueError(
                    f"the model of reward {name} hears at {rate} Hz, and the codec decodes at "
                    f"{loaded.studio.sample_rate_hz} Hz: train it for that"
                )

    def describe(self) -> dict[str, dict[str, Any]]:
        """What each term declares, for whoever gets a policy that it trained."""
        return {
            term.name: {
                "weight": self.mixture.weights[term.name],
                "range": [str(term.low), str(term.high)],
                "windows": term.windows(self.models[term.name].config),
                "licence": term.licence,
                "hash": self.models[term.name].hash,
            }
            for term in self.mixture.terms
        }

    def score(self, variables: dict[str, Any], rollout: Rollout) -> dict[str, jax.Array]:
        """Each term, f32 [B]."""
        return {
            term.name: term.score(self.models[term.name].config, variables[term.name], rollout).astype(jnp.float32)
            for term in self.mixture.terms
        }

    def units(self, scores: dict[str, np.ndarray]) -> Units:
        """What the terms are measured in, from their scores f32 [B] of the base's clips; (0, 1) if not normalised.

        ValueError where a term has no two finite scores that differ.
        """
        if not self.mixture.normalise:
            return {name: (0.0, 1.0) for name in scores}
        found = {}
        for name, score in scores.items():
            finite = np.asarray(score)[np.isfinite(score)]
            if len(finite) < 2 or finite.std() <= 1e-7 * max(np.abs(finite).max(), 1e-30):
                raise ValueError(
                    f"reward {name} is the same for all of {len(finite)} clips of the base and cannot be normalised: "
                    "leave it out, or set Mixture.normalise=False"
                )
            found[name] = float(finite.mean()), float(finite.std())
        return found

    def total(self, scores: dict[str, jax.Array], units: Units) -> jax.Array:
        """The mixture, f32 [B]."""
        weights = self.mixture.weights
        return sum(weights[name] * ((score - units[name][0]) / units[name][1]) for name, score in scores.items())

    def check(self, scores: dict[str, np.ndarray]) -> None:
        """ValueError where a term left its range; what is not finite is left to the update, which skips it."""
        for term in self.mixture.terms:
            values = np.asarray(scores[term.name])
            outside = values[np.isfinite(values) & ((values < term.low - 1e-4) | (values > term.high + 1e-4))]
            if outside.size:
                raise ValueError(
                    f"reward {term.name} is {outside[0]:.4g}, outside [{term.low}, {term.high}]: mend the term"
                )
