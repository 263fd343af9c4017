"""Simulated listeners, in place of people. All results say that their listeners are simulated.

`ears` measures a waveform and how well it matches its prompt, without any model of this project. A
listener weighs the measurements in its own way, and chooses with noise.

There are three populations. The preference model learns from the *training panel's* votes. The
*judging panel* rates the finished models: its listeners' weights have another distribution, and
four of its measurements have no weight in the training panel. What the panels share can be learned
from votes; what differs exposes a policy that pleases the training panel alone. The *monitoring
panel* rates policies during finetuning, so that checkpoints are not selected by the judges' taste.

Legend: P clips, M measurements, L listeners.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

# Mean weight of each measurement in the training, the judging and the monitoring panel. Higher
# measurements are better for everyone; `ears` computes them.
WEIGHTS = {
    "consonance": (1.0, 0.7, 0.6),
    "beat": (0.7, 0.5, 0.8),
    "loudness_range": (0.3, 0.2, 0.3),
    "brightness": (0.5, 0.3, 0.4),
    "roughness": (0.8, 0.5, 0.7),
    "key_agreement": (0.4, 0.3, 0.2),
    "tempo_agreement": (0.5, 0.4, 0.3),
    "instrument_agreement": (1.0, 0.8, 0.9),
    "harmonicity": (0.0, 0.6, 0.3),
    "register_agreement": (0.0, 0.5, 0.0),
    "density_agreement": (0.0, 0.4, 0.0),
    "gaps": (0.0, 0.5, 0.4),
}
MEASUREMENTS = tuple(WEIGHTS)


@dataclasses.dataclass(frozen=True)
class Panel:
    """A population of simulated listeners.

    Attributes:
      name: name that its votes are signed with.
      weights: mean weight of each measurement over listeners; 0 for those without a name here.
      spread: standard deviation of the logarithm of a listener's own weights.
      noise: scale of the logistic noise in a choice, in units of utility.
      indifference: a listener abstains if the noisy difference is below this share of the noise.
      size: L.
      seed: seed of the listeners' weights.
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
                f"Panel {self.name}: noise = {self.noise} must be above 0, size = {self.size} at "
                f"least 2, spread = {self.spread} and indifference = {self.indifference} 0 or more"
            )
        if not sum(self.weights.values()) > 0 or min(self.weights.values(), default=0) < 0:
            raise ValueError(
                f"Panel {self.name}: weights must be 0 or more and not all 0: {dict(self.weights)}"
            )

    def listeners(self) -> np.ndarray:
        """Returns each listener's weights, f64 [L, M]; their sum is the same for all listeners."""
        # Log-normal weights around the mean ones.
        mean = np.array([self.weights.get(name, 0.0) for name in MEASUREMENTS])
        normal = np.random.default_rng(self.seed).normal(size=(self.size, len(MEASUREMENTS)))
        own = mean * np.exp(self.spread * normal)
        return own / own.sum(axis=1, keepdims=True) * mean.sum()

    def utilities(self, measurements: np.ndarray) -> np.ndarray:
        """Returns the utility of each clip to each listener: f64 [P, M] -> [L, P]."""
        return self.listeners() @ measurements.T

    def choose(self, a: np.ndarray, b: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns a choice for each pair of utilities: "a", "b" or "abstain"."""
        # A logistic difference, as in the Bradley-Terry model.
        difference = a - b + rng.logistic(scale=self.noise, size=np.shape(a))
        choice = np.where(difference > 0, "a", "b")
        return np.where(np.abs(difference) < self.indifference * self.noise, "abstain", choice)

    def rate(self, utilities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns ratings 1 to 5; real clips have a mean of 4."""
        # A utility of the sum of all weights is worth 1.5 points.
        noisy = utilities + rng.logistic(scale=self.noise, size=np.shape(utilities))
        return np.clip(np.rint(4 + noisy / sum(self.weights.values()) * 1.5), 1, 5)

    def agreement(self, a: np.ndarray, b: np.ndarray) -> float:
        """Returns how often two listeners make the same choice, in [0, 1], if neither abstains.

        An expectation over noise and pairs of listeners; a and b are utilities [L, P] of both clips
        of P pairs.
        """
        for_a, for_b = self._probabilities(a, b)

        # Pairs of different listeners: the square of the sum, without each one with itself.
        def pairs(chances: np.ndarray) -> float:
            return float((chances.sum(axis=0) ** 2 - (chances**2).sum(axis=0)).sum())

        return (pairs(for_a) + pairs(for_b)) / pairs(for_a + for_b)

    def ceiling(self, a: np.ndarray, b: np.ndarray) -> float:
        """Returns the accuracy in [0, 1] of the best guess of a choice by an unknown listener.

        The utilities a and b are [L, P].
        """
        for_a, for_b = (chances.sum(axis=0) for chances in self._probabilities(a, b))
        return float(np.maximum(for_a, for_b).sum() / (for_a + for_b).sum())

    def _probabilities(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns each listener's probability to choose the first clip and the second, [L, P]."""
        # A logistic variable is above x with probability 1 / (1 + exp(x)).
        difference = (a - b) / self.noise
        for_a = 1 / (1 + np.exp(self.indifference - difference))
        for_b = 1 / (1 + np.exp(self.indifference + difference))
        return for_a, for_b


# --- the three populations ---


def training_panel(noise: float = 1.0) -> Panel:
    """Returns the panel whose votes a preference model learns from."""
    return Panel("training panel", _weights(0), noise=noise, seed=1)


def judging_panel(noise: float = 1.0) -> Panel:
    """Returns the panel that rates finished models; it weighs all measurements."""
    return Panel("judging panel", _weights(1), spread=0.7, noise=noise, seed=2)


def monitoring_panel(noise: float = 1.0) -> Panel:
    """Returns the panel that rates policies during finetuning.

    It weighs two measurements that the training panel ignores, and ignores two of the judges'.
    """
    return Panel("monitoring panel", _weights(2), spread=0.6, noise=noise, seed=3)


def _weights(column: int) -> dict[str, float]:
    """Returns the nonzero weights of a column of WEIGHTS."""
    return {name: weights[column] for name, weights in WEIGHTS.items() if weights[column]}
