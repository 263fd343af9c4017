"""A held-out judge that looks at a policy while it is finetuned: the alarm against over-optimisation of a reward.

It sees validation prompts, on which nothing is trained, and listeners whom no reward model has heard of. What it
says decides which checkpoint is kept, by RULE, and nothing else.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from musicrl_jax.arena.audience import Audience, Hearing
from musicrl_jax.core.statistics import over_optimised
from musicrl_jax.inputs import pieces
from musicrl_jax.inputs.prompts import Prompts

RULE = (
    "Training stops at the alarm, and of the policies that the judge looked at the one nearest to the peak of its "
    "fitted curve is kept, or the base where that is nearest; without an alarm the last policy is."
)


@dataclasses.dataclass(frozen=True)
class Monitor:
    """Who looks, at what and how often.

    Attributes:
      audience: listeners that no reward was trained on.
      prompts: the first `count` of the 'validation' split are played.
      looks: about so many over a run, evenly; four at least are needed for an alarm, and the more the finer. Each keeps
        a copy of the policy until the run is over.
      count: clips a look, of one prompt each.
      z: how many standard errors the judge must be below its peak for an alarm.
    """

    audience: Audience
    prompts: Prompts
    looks: int = 16
    count: int = 64
    z: float = 3.0

    def __post_init__(self) -> None:
        if self.looks < 4 or self.count < 2 or not self.z > 0:
            raise ValueError(
                f"Monitor: looks = {self.looks} must be 4 or more, count = {self.count} 2 or more, z = {self.z} above 0"
            )

    def every(self, steps: int) -> int:
        """Steps between two looks in a run of so many."""
        return max(1, steps // (self.looks + 1))

    def load(self, vocabulary: bytes, draw: Callable[[np.ndarray], np.ndarray]) -> "Judge":
        """Fits the ears and hears the base: `draw` plays it, pieces int32 [n, L] -> f32 [n, N]."""
        asked = self.prompts.unique("validation")[: self.count]
        if len(asked) < 2:
            raise ValueError(f"Monitor.prompts: split 'validation' has {len(asked)} prompts, and a mean needs two")
        judge = Judge(self, self.audience.load(), asked, pieces.encode(vocabulary, asked, self.prompts.text_length))
        judge.base = judge.hear(draw)
        return judge


@dataclasses.dataclass
class Judge:
    """A monitor at work: it knows how the base sounded, and remembers what it saw."""

    monitor: Monitor
    hearing: Hearing
    asked: list[str]
    text: np.ndarray  # int32 [n, L]
    base: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0))  # f64 [n]
    seen: list[tuple[int, float, float, float]] = dataclasses.field(default_factory=list)  # step, KL, gain, error

    def hear(self, draw: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """What a policy is worth to the listeners, clip by clip, f64 [n]."""
        return self.hearing.utilities(draw(self.text), self.asked)

    def look(self, draw: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
        """(mean gain over the base, its standard error), prompt by prompt with the same random keys."""
        gains = self.hear(draw) - self.base
        return float(gains.mean()), float(gains.std(ddof=1) / np.sqrt(len(gains)))

    def alarmed(self, step: int, kl: float, gain: float, error: float) -> int | None:
        """Remembers a look at the policy after `step` updates, at a KL in nats a clip from the base; where that sets
        off the alarm, the step of the look that is nearest to the peak, 0 for the base. A look that says nothing, at
        no distance or without an error, is left out."""
        if kl > 0 and error > 0:
            self.seen.append((step, kl, gain, error))
        if len(self.seen) < 4:
            return None
        steps, kls, gains, errors = map(np.array, zip(*self.seen, strict=True))
        peak = over_optimised(np.sqrt(kls), gains, errors, self.monitor.z)
        if peak is None:
            return None
        return int([0, *steps][np.argmin(np.abs(np.array([0.0, *np.sqrt(kls)]) - peak))])
