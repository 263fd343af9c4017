"""A held-out judge that rates a policy during finetuning, to detect over-optimisation of a reward.

It uses validation prompts, which nothing is trained on, and listeners unknown to every reward
model. By RULE it selects the policy that is kept, and has no other influence.
"""

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from musicrl_jax.arena.audience import Audience, LoadedAudience
from musicrl_jax.core import checkpoint
from musicrl_jax.inputs.prompts import Prompts

LOOKS = "looks"  # in a run's folder: copies of the rated policies, until one is selected
JUDGE_METRICS = "judge_gain", "judge_error"  # names of the judge's metrics
Draw = Callable[[Sequence[str]], np.ndarray]  # n prompts -> clips f32 [n, N]

RULE = (
    "Training stops at the alarm, and the rated policy nearest to the peak of the judge's fitted "
    "curve is kept, or the base if it is nearest. Without an alarm the last policy is kept."
)


@dataclasses.dataclass(frozen=True)
class Monitor:
    """Settings of the held-out judge.

    Attributes:
      audience: listeners that no reward was trained on.
      prompts: prompts of which the first `count` of the 'validation' split are used.
      looks: approximate number of looks, evenly over a run. An alarm needs 4 or more. Each look
        stores a copy of the policy until the run ends.
      count: prompts in a look, with one clip each.
      z: standard errors that the judge must fall below its peak for an alarm.
    """

    audience: Audience
    prompts: Prompts
    looks: int = 16
    count: int = 64
    z: float = 3.0

    def __post_init__(self) -> None:
        if self.looks < 4 or self.count < 2 or not self.z > 0:
            raise ValueError(
                f"Monitor: looks = {self.looks} must be 4 or more, count = {self.count} 2 or more, "
                f"z = {self.z} above 0"
            )

    def every(self, steps: int) -> int:
        """Returns the steps between two looks in a run of `steps`."""
        return max(1, steps // (self.looks + 1))

    def load(
        self, directory: Path, draw_base: Draw, metrics: Mapping[str, tuple[Any, Any]]
    ) -> "Judge":
        """Fits the ears, rates the base, and repeats the looks of an interrupted run.

        Args:
          directory: folder of the run.
          draw_base: draws clips by the base.
          metrics: (steps, values) by name, of the run so far.
        """
        # The base's utilities on the prompts.
        prompts = self.prompts.unique("validation")[: self.count]
        if len(prompts) < 2:
            raise ValueError(
                f"Monitor.prompts: split 'validation' has {len(prompts)} prompts: give it 2 or more"
            )
        audience = self.audience.load()
        base = audience.utilities(draw_base(prompts), prompts)
        judge = Judge(self, audience, directory / LOOKS, prompts, base)
        # Earlier looks, from the run's metrics.
        names = "kl", *JUDGE_METRICS
        by_step = [dict(zip(*metrics.get(name, ((), ())), strict=True)) for name in names]
        # A damaged line of the metrics may lack one of the three.
        for step in sorted(set.intersection(*map(set, by_step))):
            judge.alarm(int(step), *(float(values[step]) for values in by_step))
        return judge


@dataclasses.dataclass
class Judge:
    """State of the held-out judge during a run.

    Attributes:
      monitor: its settings.
      audience: the listeners.
      folder: where copies of the rated policies are stored.
      prompts: n prompts.
      base: utilities of the base's clips, f64 [n].
      looks: step, KL, gain over the base and its standard error, of each look.
      selected_step: step of the policy that an alarm selects, 0 for the base; None without alarm.
    """

    monitor: Monitor
    audience: LoadedAudience
    folder: Path
    prompts: list[str]
    base: np.ndarray
    looks: list[tuple[int, float, float, float]] = dataclasses.field(default_factory=list)
    selected_step: int | None = None

    def due(self, step: int, steps: int) -> bool:
        """Tells whether the judge looks before this step of a run of `steps`."""
        return step > 0 and step % self.monitor.every(steps) == 0

    def look(self, step: int, draw: Draw, config: Any, variables: Any) -> dict[str, float]:
        """Rates the policy, stores a copy of it, and returns the metrics of the look.

        They are the mean gain over the base and its standard error over prompts. Every look uses
        the same random keys.
        """
        gains = self.audience.utilities(draw(self.prompts), self.prompts) - self.base
        checkpoint.save_model(self.folder / f"{step}", config, variables)
        error = gains.std(ddof=1) / np.sqrt(len(gains))
        return dict(zip(JUDGE_METRICS, (float(gains.mean()), float(error)), strict=True))

    def alarm(self, step: int, kl: float, gain: float, error: float) -> bool:
        """Records a look, and tells whether training must stop.

        Ignores a look at a policy equal to the base, or without a standard error.

        Args:
          step: updates of the rated policy.
          kl: its KL to the base, in nats a clip.
          gain: its mean gain, from `look`.
          error: the gain's standard error, from `look`.
        """
        if kl > 0 and error > 0:
            self.looks.append((step, kl, gain, error))
        if len(self.looks) < 4:
            return False
        # Select the rated policy nearest to the peak. The base, at distance 0, is a candidate too.
        steps, kls, gains, errors = map(np.array, zip(*self.looks, strict=True))
        peak = overoptimisation_peak(np.sqrt(kls), gains, errors, self.monitor.z)
        if peak is None:
            return False
        distances = np.abs(np.array([0.0, *np.sqrt(kls)]) - peak)
        self.selected_step = int([0, *steps][np.argmin(distances)])
        return True

    def selected_policy(self, config_class: type) -> checkpoint.Model | None:
        """Returns the policy that an alarm selects; None if that is the base."""
        if not self.selected_step:
            return None
        return checkpoint.load_model(self.folder / f"{self.selected_step}", config_class)

    def describe(self) -> dict[str, Any]:
        """Returns the number of looks, and the selected step with its KL to the base."""
        described: dict[str, Any] = {"looks": len(self.looks), "kept": self.selected_step}
        if self.selected_step is not None:
            kl_by_step = {0: 0.0, **{step: kl for step, kl, *_ in self.looks}}
            described["kl"] = kl_by_step[self.selected_step]
        return described


def overoptimisation_peak(
    distances: np.ndarray, gains: np.ndarray, errors: np.ndarray, z: float = 3.0
) -> float | None:
    """Returns the peak of a judge's score if the score has fallen below it: the alarm.

    While a policy moves away from its base, the score of a judge that it does not learn from first
    rises and then falls. It follows d (alpha - beta d) closely, with the distance d = sqrt(KL)
    (2210.10760, section 3.3). A weighted least-squares fit of that curve gives the peak. The fit
    alone is no evidence: it has a peak even if the score only levels off. The alarm also requires
    that the newest quarter of the points lies `z` standard errors below the quarter nearest to the
    peak.

    Args:
      distances: f64 [n], n >= 3, of the checkpoints so far, the newest last; above 0.
      gains: f64 [n], the judge's mean score of each minus the base's.
      errors: f64 [n], their standard errors; above 0.
      z: standard errors below the peak.

    Returns:
      The distance of the peak, 0 if the base is best, or None without an alarm.
    """
    # The fitted curve.
    design = np.stack([distances, -np.square(distances)], axis=1) / errors[:, None]
    alpha, beta = np.linalg.lstsq(design, gains / errors)[0]

    # The newest points against those nearest to the peak.
    weights = 1 / np.square(errors)
    size = max(len(distances) // 4, 2)
    late = np.arange(len(distances))[-size:]
    last = np.average(gains[late], weights=weights[late])
    if alpha <= 0:  # the score falls from the start: the base is the peak
        # All gains share the error of the base's clips, so that averaging does not reduce it.
        return 0.0 if -last > z * errors[late].min() else None
    # No peak yet: the curve still rises.
    if beta <= 0 or alpha / (2 * beta) >= distances[-1]:
        return None
    peak = alpha / (2 * beta)
    near = np.argsort(np.abs(distances - peak), kind="stable")[:size]
    # The newest points are those at the peak: nothing has fallen.
    if set(near) & set(late):
        return None
    fall = np.average(gains[near], weights=weights[near]) - last
    error = np.sqrt(1 / weights[near].sum() + 1 / weights[late].sum())
    return float(peak) if fall > z * error else None


def forget(directory: Path) -> None:
    """Removes the copies of the policies that a run's judge rated."""
    shutil.rmtree(directory / LOOKS, ignore_errors=True)
