"""Simulated listeners, for where no people are. Wherever their votes are shown, these two words stand beside them.

`ears` turns a waveform and what its prompt asked for into measurements, none of which comes from a model of this
project. A listener weighs them in a way of their own, and chooses with noise.

Three populations are apart. The *training panel* votes on the clips that a preference model learns from; the *judging
panel* judges the finished models: other listeners, whose weights are drawn from another distribution, and who hear four
things that no one of the training panel hears. What they have in common is what makes a preference worth learning; what
they have not is where a policy that only pleases the first shows. The *monitoring panel* looks at a policy while it is
finetuned: a third population, lest policies be kept by the judges' own taste.

Legend: P clips, M measurements, L listeners.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

# What there is to hear, higher being better for everyone; `ears` says how each is measured.
MEASUREMENTS = (
    "consonance",
    "beat",
    "loudness_range",
    "brightness",
    "roughness",
    "key_agreement",
    "tempo_agreement",
    "instrument_agreement",
    "harmonicity",
    "register_agreement",
    "density_agreement",
    "gaps",
)


@dataclasses.dataclass(frozen=True)
class Panel:
    """A population of simulated listeners.

    Attributes:
      name: what its votes are signed with.
      weights: what a listener gives each measurement on average; what is not named is not heard.
      spread: how far a listener's own weights are from that: the standard deviation of their logarithm.
      noise: of a choice, in units of utility: the scale of a logistic distribution.
      indifference: a listener abstains where the noisy difference is smaller than this share of the noise.
      size: L.
      seed: of the listeners' weights.
    """

    name: str
    weights: Mapping[str, float]
    spread: float = 0.5
    noise: float = 1.0
    indifference: float = 0.2
    size: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.weights) - set(MEASUREMENTS)):
            raise ValueError(f"Panel.weights: {unknown[0]!r} is none of {MEASUREMENTS}")
        if not (self.noise > 0 and self.size >= 2 and self.spread >= 0 and self.indifference >= 0):
            raise ValueError(
                f"Panel {self.name}: noise = {self.noise} must be above 0, size = {self.size} at least 2, spread = "
                f"{self.spread} and indifference = {self.indifference} not below 0"
            )
        if not sum(self.weights.values()) > 0 or min(self.weights.values(), default=0) < 0:
            raise ValueError(
                f"Panel {self.name}: weights must be 0 or more and not all 0: {dict(self.weights)}"
            )

    def listeners(self) -> np.ndarray:
        """Each listener's weights, f64 [L, M]; they add up to the same for all."""
        mean = np.array([self.weights.get(name, 0.0) for name in MEASUREMENTS])
        own = mean * np.exp(
            self.spread
            * np.random.default_rng(self.seed).normal(size=(self.size, len(MEASUREMENTS)))
        )
        return own / own.sum(axis=1, keepdims=True) * mean.sum()

    def utilities(self, measured: np.ndarray) -> np.ndarray:
        """What each clip is worth to each listener: f64 [P, M] -> [L, P]."""
        return self.listeners() @ measured.T

    def choose(self, a: np.ndarray, b: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A choice for each pair of utilities: "a", "b" or "abstain"."""
        felt = a - b + rng.logistic(scale=self.noise, size=np.shape(a))
        choice = np.where(felt > 0, "a", "b")
        return np.where(np.abs(felt) < self.indifference * self.noise, "abstain", choice)

    def rate(self, utilities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Ratings from 1 to 5: 4 is what a real clip gets on average."""
        unit = sum(self.weights.values())
        felt = (
            4 + (utilities + rng.logistic(scale=self.noise, size=np.shape(utilities))) / unit * 1.5
        )
        return np.clip(np.rint(felt), 1, 5)

    def agreement(self, a: np.ndarray, b: np.ndarray) -> float:
        """How often two different listeners who both choose make the same choice: utilities [L, P] of both clips of P
        pairs -> [0, 1]. An expectation, not a draw.
        """
        for_a, for_b = self._chances(a, b)

        def of_two(chances: np.ndarray) -> float:
            return float((chances.sum(axis=0) ** 2 - (chances**2).sum(axis=0)).sum())

        return (of_two(for_a) + of_two(for_b)) / of_two(for_a + for_b)

    def ceiling(self, a: np.ndarray, b: np.ndarray) -> float:
        """How often a choice can be foretold at most, by one who does not know the listener: [L, P] twice -> [0, 1]."""
        for_a, for_b = (chances.sum(axis=0) for chances in self._chances(a, b))
        return float(np.maximum(for_a, for_b).sum() / (for_a + for_b).sum())

    def _chances(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How likely each listener is to choose the first clip, and the second: [L, P] twice -> [L, P] twice."""
        difference = (a - b) / self.noise
        first, second = (
            1 / (1 + np.exp(self.indifference - side)) for side in (difference, -difference)
        )
        return first, second


JUDGES_HEAR = {
    "consonance": 0.7,
    "beat": 0.5,
    "loudness_range": 0.2,
    "brightness": 0.3,
    "roughness": 0.5,
    "key_agreement": 0.3,
    "tempo_agreement": 0.4,
    "instrument_agreement": 0.8,
    "harmonicity": 0.6,
    "register_agreement": 0.5,
    "density_agreement": 0.4,
    "gaps": 0.5,
}


def training_panel(noise: float = 1.0) -> Panel:
    """Those whose votes a preference model learns from."""
    weights = {
        "consonance": 1.0,
        "beat": 0.7,
        "loudness_range": 0.3,
        "brightness": 0.5,
        "roughness": 0.8,
        "key_agreement": 0.4,
        "tempo_agreement": 0.5,
        "instrument_agreement": 1.0,
    }
    return Panel("training panel", weights, noise=noise, seed=1)


def judging_panel(noise: float = 1.0) -> Panel:
    """Those who judge the finished models; the last four of what they hear is not heard by the training panel."""
    return Panel("judging panel", JUDGES_HEAR, spread=0.7, noise=noise, seed=2)


def monitoring_panel(noise: float = 1.0) -> Panel:
    """Those who look at a policy while it is finetuned: a third population, who hear two things that no one of the
    training panel hears, and miss two that the judges hear.
    """
    weights = {
        "consonance": 0.6,
        "beat": 0.8,
        "loudness_range": 0.3,
        "brightness": 0.4,
        "roughness": 0.7,
        "key_agreement": 0.2,
        "tempo_agreement": 0.3,
        "instrument_agreement": 0.9,
        "harmonicity": 0.3,
        "gaps": 0.4,
    }
    return Panel("monitoring panel", weights, spread=0.6, noise=noise, seed=3)
