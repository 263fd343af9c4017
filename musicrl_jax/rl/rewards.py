"""Reward terms and their weighted sum.

A term is a frozen dataclass with the members of `Term`; users may write their own. Mark a field
that names a file or folder by `dataclasses.field(metadata=checkpoint.PATH)`: its content is then
part of the run's identity. `systems/scorers.py` has the terms of this project's models.

Legend: B clips.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from musicrl_jax.core import checkpoint
from musicrl_jax.systems.folder import LoadedSystem
from musicrl_jax.systems.player import Units
from musicrl_jax.systems.system import Rollout, Text, Tree


class Term(Protocol):
    """The members of a reward term.

    Attributes:
      name: name of the term, unique in a mixture.
      low, high: range of its scores.
      licence: licence of its model's weights.
    """

    name: str
    low: float
    high: float
    licence: str

    def load(self, read: checkpoint.Reader = checkpoint.load_model) -> checkpoint.Model:
        """Returns the term's model; `read` reads a checkpoint's folder."""

    def windows(self, model: Any) -> str:
        """Describes which part of a clip the term scores."""

    def lineage(self, model: checkpoint.Model) -> dict[str, str]:
        """Returns the hashes of the models whose tokens or embeddings the term reads."""

    def read(self, model: checkpoint.Model, prompts: Sequence[str]) -> Text:
        """Reads prompts on the host, arrays [B, ...]; {} if the term ignores them."""

    def score(self, model: Any, variables: Tree, rollout: Rollout, text: Text) -> jax.Array:
        """Returns scores in [low, high], f32 [B]; traced under jit.

        Args:
          model: config of the model that `load` returned.
          variables: weights of that model.
          rollout: B clips.
          text: the prompts as `read` returned them.
        """


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A weighted sum of terms.

    Attributes:
      terms: the terms, with unique names.
      weights: a weight for each term's name.
      normalise: whether terms are first scaled to mean 0 and standard deviation 1 over clips of
        the base, so that weights are comparable. MusicRL adds the terms unscaled.
    """

    terms: tuple[Term, ...]
    weights: dict[str, float]
    normalise: bool = False

    def __post_init__(self) -> None:
        names = [term.name for term in self.terms]
        if not names:
            raise ValueError("Mixture.terms is empty: add a term")
        if len(set(names)) < len(names):
            raise ValueError(f"Mixture.terms has a name twice: {names}; make names unique")
        for name, weight in self.weights.items():
            if not math.isfinite(weight):
                raise ValueError(f"Mixture.weights[{name!r}] = {weight} must be finite")
        if set(names) != set(self.weights):
            raise ValueError(
                f"Mixture.weights is for {sorted(self.weights)}, and Mixture.terms are "
                f"{sorted(names)}: make them match"
            )

    def load(self, read: checkpoint.Reader = checkpoint.load_model) -> "LoadedMixture":
        """Reads every term's model."""
        return LoadedMixture(self, {term.name: term.load(read) for term in self.terms})


@dataclasses.dataclass(frozen=True)
class LoadedMixture:
    """A mixture with the model of each term, by the term's name."""

    mixture: Mixture
    models: dict[str, checkpoint.Model]

    # --- models ---

    @property
    def variables(self) -> dict[str, Tree]:
        """Weights of the models, an argument of the jitted reward."""
        return {name: model.variables for name, model in self.models.items()}

    @property
    def hashes(self) -> dict[str, str]:
        """Content hash of each term's model."""
        return {name: model.hash for name, model in self.models.items()}

    @property
    def names(self) -> list[str]:
        """Names of the terms."""
        return [term.name for term in self.mixture.terms]

    def check_models(self, loaded: LoadedSystem) -> None:
        """Raises ValueError if a term's model was trained for another system.

        Its tokens or embeddings may come from other models, or its sample rate may be another.
        """
        system_rate = loaded.system.sample_rate_hz
        for term in self.mixture.terms:
            # Tokens and embeddings.
            model = self.models[term.name]
            for name, term_hash in term.lineage(model).items():
                system_hash = loaded.lineage.get(name, term_hash)
                if term_hash != system_hash:
                    raise ValueError(
                        f"the model of reward {term.name} reads tokens of {name} {term_hash[:12]}, "
                        f"and the policy's are of {system_hash[:12]}: give that model's folder, or "
                        "train on votes for clips of this policy"
                    )
            # The sample rate, if the term's model reads waveforms.
            rate = getattr(model.config, "sample_rate_hz", system_rate)
            if rate != system_rate:
                raise ValueError(
                    f"the model of reward {term.name} needs {rate} Hz, and the codec decodes at "
                    f"{system_rate} Hz: train it at that rate"
                )

    def describe(self) -> dict[str, dict[str, Any]]:
        """Returns weight, range, windows, licence and hash of each term, as JSON holds them."""
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

    # --- scores ---

    def read(self, prompts: Sequence[str]) -> dict[str, Text]:
        """Reads prompts on the host, once for each term."""
        return {
            term.name: term.read(self.models[term.name], prompts) for term in self.mixture.terms
        }

    def score(
        self, variables: Mapping[str, Tree], rollout: Rollout, texts: Mapping[str, Text]
    ) -> dict[str, jax.Array]:
        """Returns each term's scores, f32 [B]."""
        scores = {}
        for term in self.mixture.terms:
            name, config = term.name, self.models[term.name].config
            score = term.score(config, variables[name], rollout, texts[name])
            scores[name] = score.astype(jnp.float32)
        return scores

    def units(self, scores: Mapping[str, np.ndarray]) -> Units:
        """Returns mean and standard deviation of each term's scores f32 [B] of clips of the base.

        They are (0, 1) if terms are not normalised. Raises ValueError if all finite scores of a
        term are equal.
        """
        if not self.mixture.normalise:
            return {name: (0.0, 1.0) for name in scores}
        units = {}
        for name, score in scores.items():
            finite = np.asarray(score)[np.isfinite(score)]
            # Rounding may give equal scores a tiny standard deviation.
            if len(finite) < 2 or finite.std() <= 1e-7 * max(np.abs(finite).max(), 1e-30):
                raise ValueError(
                    f"reward {name} has one score for all of {len(finite)} clips of the base and "
                    "cannot be normalised: remove it, or set Mixture.normalise=False"
                )
            units[name] = float(finite.mean()), float(finite.std())
        return units

    def total(self, scores: Mapping[str, jax.Array], units: Units) -> jax.Array:
        """Returns the weighted sum, f32 [B]."""
        terms = []
        for name, score in scores.items():
            centre, spread = units[name]
            terms.append(self.mixture.weights[name] * ((score - centre) / spread))
        return sum(terms)

    def check(self, scores: Mapping[str, np.ndarray]) -> None:
        """Raises ValueError if a score is outside its term's range.

        Ignores non-finite scores: the update skips them.
        """
        for term in self.mixture.terms:
            values = scores[term.name][np.isfinite(scores[term.name])]
            # float32 may leave the range by rounding.
            outside = values[(values < term.low - 1e-4) | (values > term.high + 1e-4)]
            if outside.size:
                raise ValueError(
                    f"reward {term.name} is {outside[0]:.4g}, outside [{term.low}, {term.high}]: "
                    "correct the term's score or its range"
                )
