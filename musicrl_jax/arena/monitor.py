"""A held-out judge that looks at a policy while it is finetuned: the alarm against over-optimisation of a reward.

It sees validation prompts, on which nothing is trained, and listeners whom no reward model has heard of. What it
says decides which checkpoint is kept, by RULE, and nothing else.
"""

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from musicrl_jax.arena.audience import Audience, Hearing
from musicrl_jax.core import checkpoint
from musicrl_jax.inputs.prompts import Prompts

LOOKS = "looks"  # in a run's folder: the policies that the judge looked at, until one is kept
JUDGED = "judge_gain", "judge_error"  # the judge's metrics
Draw = Callable[[Sequence[str]], np.ndarray]  # n prompts -> clips f32 [n, N]

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

    def load(
        self, directory: Path, draw_base: Draw, metrics: Mapping[str, tuple[Any, Any]]
    ) -> "Judge":
        """Fits the ears, hears the base, and recalls what earlier attempts of the run let it see.

        Args:
          directory: of the run.
          draw_base: draws clips by the base.
          metrics: (steps, values) by name, of the run so far.
        """
        prompts = self.prompts.unique("validation")[: self.count]
        if len(prompts) < 2:
            raise ValueError(
                f"Monitor.prompts: split 'validation' has {len(prompts)} prompts, and a mean needs two"
            )
        hearing = self.audience.load()
        base = hearing.utilities(draw_base(prompts), prompts)
        judge = Judge(self, hearing, directory / LOOKS, prompts, base)
        by_step = [dict(zip(*metrics.get(name, ((), ())), strict=True)) for name in ("kl", *JUDGED)]
        # A damaged line may have lost one of the three.
        for step in sorted(set.intersection(*map(set, by_step))):
            judge.alarm(int(step), *(float(values[step]) for values in by_step))
        return judge


@dataclasses.dataclass
class Judge:
    """A monitor at work: it knows how the base sounded, and remembers what it saw.

    Attributes:
      monitor: its settings.
      hearing: what the listeners hear.
      folder: where copies of the policies go that it looked at.
      prompts: n of them.
      base: worth of the base's clips to the listeners, f64 [n].
      looks: step, KL, gain over the base and its standard error, of each look.
      kept: step of the policy that an alarm keeps, 0 for the base; None without an alarm.
    """

    monitor: Monitor
    hearing: Hearing
    folder: Path
    prompts: list[str]
    base: np.ndarray
    looks: list[tuple[int, float, float, float]] = dataclasses.field(default_factory=list)
    kept: int | None = None

    def due(self, step: int, steps: int) -> bool:
        """Tells whether the judge looks before this step of a run of so many."""
        return step > 0 and step % self.monitor.every(steps) == 0

    def look(self, step: int, draw: Draw, config: Any, variables: Any) -> dict[str, float]:
        """Hears the policy, keeps a copy of it, and returns the metrics of the look.

        The mean gain over the base and its standard error are taken prompt by prompt, with the same
        random keys at every look.
        """
        gains = self.hearing.utilities(draw(self.prompts), self.prompts) - self.base
        checkpoint.save_model(self.folder / f"{step}", config, variables)
        error = gains.std(ddof=1) / np.sqrt(len(gains))
        return dict(zip(JUDGED, (float(gains.mean()), float(error)), strict=True))

    def alarm(self, step: int, kl: float, gain: float, error: float) -> bool:
        """Remembers a look, and tells whether training has to stop.

        A look that says nothing, at no distance from the base or without an error, is left out.

        Args:
          step: updates of the policy that was looked at.
          kl: of that policy to the base, in nats a clip.
          gain, error: as `look` returned them.
        """
        if kl > 0 and error > 0:
            self.looks.append((step, kl, gain, error))
        if len(self.looks) < 4:
            return False
        steps, kls, gains, errors = map(np.array, zip(*self.looks, strict=True))
        peak = over_optimised(np.sqrt(kls), gains, errors, self.monitor.z)
        if peak is None:
            return False
        distances = np.abs(np.array([0.0, *np.sqrt(kls)]) - peak)
        self.kept = int([0, *steps][np.argmin(distances)])
        return True

    def kept_policy(self, config_class: type) -> checkpoint.Model | None:
        """Returns the policy that an alarm keeps; None if that is the base."""
        if not self.kept:
            return None
        return checkpoint.load_model(self.folder / f"{self.kept}", config_class)

    def describe(self) -> dict[str, Any]:
        """Returns how often it looked, the step it keeps and how far that is from the base."""
        described: dict[str, Any] = {"looks": len(self.looks), "kept": self.kept}
        if self.kept is not None:
            described["kl"] = {0: 0.0, **{step: kl for step, kl, *_ in self.looks}}[self.kept]
        return described


def over_optimised(
    distances: np.ndarray, gains: np.ndarray, errors: np.ndarray, z: float = 3.0
) -> float | None:
    """Where a held-out judge's score has passed its peak: the alarm against over-optimisation of a reward.

    A judge that the policy does not learn from rises and then falls as the policy moves away from its base; over the
    distance d = sqrt(KL) it follows d (alpha - beta d) closely (2210.10760, section 3.3). That curve, fitted to what
    was seen so far by weighted least squares, says where the peak is. Whether there is one it does not decide, for it
    would find one in a judge that only levels off: the alarm goes off where the newest quarter of the points lies
    below the quarter nearest to the peak by `z` standard errors.

    Args:
      distances: f64 [n], n >= 3, of the checkpoints seen so far, the newest last; above 0.
      gains: f64 [n], the judge's mean score of each less that of the base.
      errors: f64 [n], their standard errors; above 0.
      z: how sure to be.

    Returns:
      The distance of the peak, 0 where the base is best, or None where there is no alarm.
    """
    design = np.stack([distances, -np.square(distances)], axis=1) / errors[:, None]
    alpha, beta = np.linalg.lstsq(design, gains / errors)[0]
    weights = 1 / np.square(errors)
    size = max(len(distances) // 4, 2)
    late = np.arange(len(distances))[-size:]
    last = np.average(gains[late], weights=weights[late])
    if alpha <= 0:  # down from the start: the peak is the base
        # All gains are over the same clips of the base, whose error no number of looks averages out.
        return 0.0 if -last > z * errors[late].min() else None
    if beta <= 0 or alpha / (2 * beta) >= distances[-1]:
        return None
    peak = alpha / (2 * beta)
    near = np.argsort(np.abs(distances - peak), kind="stable")[:size]
    if set(near) & set(late):
        return None
    fall = np.average(gains[near], weights=weights[near]) - last
    error = np.sqrt(1 / weights[near].sum() + 1 / weights[late].sum())
    return float(peak) if fall > z * error else None


def forget(directory: Path) -> None:
    """Removes the copies of policies that a run's judge looked at."""
    shutil.rmtree(directory / LOOKS, ignore_errors=True)
