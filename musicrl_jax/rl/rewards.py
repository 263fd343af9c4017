"""Reward terms and their mixture.

A term is a frozen dataclass; a user's own has the members of `Term`. A field of it that names a
folder or a file is marked `dataclasses.field(metadata=checkpoint.PATH)`, so that a run is another
one if their content changes. `systems/scorers.py` has the terms of this project's models.

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
    """What a reward term offers.

    Attributes:
      name: of the term; a mixture has each once.
      low, high: range of its scores.
      licence: that its model stands under.
    """

    name: str
    low: float
    high: float
    licence: str

    def load(self, read: checkpoint.Reader = checkpoint.load_model) -> checkpoint.Model:
        """Returns the term's model; `read` reads a checkpoint's folder."""

    def windows(self, model: Any) -> str:
        """Says in words which part of a clip is judged."""

    def lineage(self, model: checkpoint.Model) -> dict[str, str]:
        """Returns the hashes of the models whose tokens or embeddings the term works with."""

    def read(self, model: checkpoint.Model, prompts: Sequence[str]) -> Text:
        """Reads prompts on the host, arrays [B, ...]; {} if the term does not need them."""

    def score(self, model: Any, variables: Tree, rollout: Rollout, text: Text) -> jax.Array:
        """Returns scores in [low, high], f32 [B]; traced under jit.

        `model` is the config of the model that `load` returned, `variables` its weights, and `text`
        what `read` returned.
        """


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
            raise ValueError(
                f"Mixture.weights[{wrong[0]!r}] = {self.weights[wrong[0]]} must be finite"
            )
        if set(names) != set(self.weights):
            raise ValueError(
                f"Mixture.weights is for {sorted(self.weights)}, Mixture.terms are {sorted(names)}; make them match"
            )

    def load(self, read: checkpoint.Reader = checkpoint.load_model) -> "LoadedMixture":
        """Reads every term's model."""
        return LoadedMixture(self, {term.name: term.load(read) for term in self.terms})


@dataclasses.dataclass(frozen=True)
class LoadedMixture:
    """A mixture with its models, by the name of their term."""

    mixture: Mixture
    models: dict[str, checkpoint.Model]

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
        """Raises ValueError if a term's model does not belong to the system.

        It may work with the tokens or embeddings of other models, or at another sample rate.
        """
        rate = loaded.system.sample_rate_hz
        for term in self.mixture.terms:
            model = self.models[term.name]
            for name, hash_ in term.lineage(model).items():
                spoken = loaded.lineage.get(name, hash_)
                if hash_ != spoken:
                    raise ValueError(
                        f"the model of reward {term.name} works with {name} {hash_[:12]}, and the "
                        f"policy speaks the tokens of {spoken[:12]}: give that one's folder, or "
                        "train on votes for clips of this policy"
                    )
            heard = getattr(model.config, "sample_rate_hz", rate)
            if heard != rate:
                raise ValueError(
                    f"the model of reward {term.name} hears at {heard} Hz, and the codec decodes at "
                    f"{rate} Hz: train it for that"
                )

    def describe(self) -> dict[str, dict[str, Any]]:
        """Returns what each term declares, for users of a policy that was trained on it."""
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

    def read(self, prompts: Sequence[str]) -> dict[str, Text]:
        """Reads prompts on the host, for each term in its own way."""
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
        """Returns centre and spread of each term's scores f32 [B] of the base's clips.

        (0, 1) if not normalised. Raises ValueError if a term has no two finite scores that differ.
        """
        if not self.mixture.normalise:
            return {name: (0.0, 1.0) for name in scores}
        units = {}
        for name, score in scores.items():
            finite = np.asarray(score)[np.isfinite(score)]
            if len(finite) < 2 or finite.std() <= 1e-7 * max(np.abs(finite).max(), 1e-30):
                raise ValueError(
                    f"reward {name} is the same for all of {len(finite)} clips of the base and "
                    "cannot be normalised: leave it out, or set Mixture.normalise=False"
                )
            units[name] = float(finite.mean()), float(finite.std())
        return units

    def total(self, scores: Mapping[str, jax.Array], units: Units) -> jax.Array:
        """Returns the mixture, f32 [B]."""
        weights = self.mixture.weights
        return sum(
            weights[name] * ((score - units[name][0]) / units[name][1])
            for name, score in scores.items()
        )

    def check(self, scores: dict[str, np.ndarray]) -> None:
        """ValueError where a term left its range; what is not finite is left to the update, which skips it."""
        for term in self.mixture.terms:
            values = np.asarray(scores[term.name])
            outside = values[
                np.isfinite(values) & ((values < term.low - 1e-4) | (values > term.high + 1e-4))
            ]
            if outside.size:
                raise ValueError(
                    f"reward {term.name} is {outside[0]:.4g}, outside [{term.low}, {term.high}]: mend the term"
                )
