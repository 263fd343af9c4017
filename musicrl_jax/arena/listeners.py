"""Simulated listeners, for where no people are. Wherever their votes are shown, these two words stand beside them.

`ears` turns a waveform and what its prompt asked for into measurements, none of which comes from a model of this
project. A listener weighs them in a way of their own, and chooses with noise.

Two populations are apart. The *training panel* votes on the clips that a preference model learns from; the *judging
panel* judges the finished models: other listeners, whose weights are drawn from another distribution, and who hear four
things that no one of the training panel hears. What they have in common is what makes a preference worth learning; what
they have not is where a policy that only pleases the first shows. The *monitoring panel* looks at a policy while it is
finetuned: of the judges' kind, and other listeners than they.

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
        if self.noise <= 0 or self.size < 2:
            raise ValueError(f"Panel {self.name}: noise = {self.noise} must be above 0, size = {self.size} at least 2")

    def listeners(self) -> np.ndarray:
        """Each listener's weights, f64 [L, M]; they add up to the same for all."""
        mean = np.array([self.weights.get(name, 0.0) for name in MEASUREMENTS])
        own = mean * np.exp(self.spread * np.random.default_rng(self.seed).normal(size=(self.size, len(MEASUREMENTS))))
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
        felt = 4 + (utilities + rng.logistic(scale=self.noise / 2, size=np.shape(utilities))) / unit * 1.5
        return np.clip(np.rint(felt), 1, 5)

    def agreement(self, a: np.ndarray, b: np.ndarray) -> float:
        """How often two different listeners make the same choice, where neither abstains: utilities [L, P] of both
        clips of P pairs -> [0, 1]. An expectation, not a draw."""
        share = self._share(a, b)
        total, listeners = share.sum(axis=0), len(share)
        both_a = total**2 - (share**2).sum(axis=0)
        both_b = (listeners - total) ** 2 - ((1 - share) ** 2).sum(axis=0)
        return float(((both_a + both_b) / (listeners * (listeners - 1))).mean())

    def ceiling(self, a: np.ndarray, b: np.ndarray) -> float:
        """How often a choice can be foretold at most, by one who does not know the listener: [L, P] twice -> [0, 1]."""
        share = self._share(a, b).mean(axis=0)
        return float(np.maximum(share, 1 - share).mean())

    def _share(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """How likely each listener is to choose the first clip, where it does not abstain: [L, P] twice -> [L, P]."""
        edge, difference = self.indifference, (a - b) / self.noise
        for_a, for_b = (1 / (1 + np.exp(edge - side)) for side in (difference, -difference))  # past the indifference
        return for_a / (for_a + for_b)


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
    """Those who look at a policy while it is finetuned: drawn as the judges are, and others."""
    return Panel("monitoring panel", JUDGES_HEAR, spread=0.7, noise=noise, seed=3)
