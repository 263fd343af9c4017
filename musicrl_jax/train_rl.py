"""Prompts -> a finetuned policy. Jitted functions, one after the other, in a loop that keeps books:

    player.draw     prompts -> condition, tokens, their log-probs, waveform      on the devices
    player.score    clips -> one number a term, and the reward                   on the devices
    learner.update  log-probs of policy and anchor, values -> gradients -> new policy and value

What an update is stands in rl/learner.py; what a clip is, in systems/.

Legend: B clips, N samples, n prompts of the judge.
"""

import itertools
import json
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from musicrl_jax.arena import monitor as monitors
from musicrl_jax.arena.monitor import Judge, Monitor
from musicrl_jax.core import checkpoint, hosts, lock, sharding
from musicrl_jax.core.keys import Stream
from musicrl_jax.core.metrics import FILE_NAME, MetricWriter
from musicrl_jax.core.progress import Progress
from musicrl_jax.core.run_checkpoints import RunCheckpoints
from musicrl_jax.inputs.prompts import Prompts
from musicrl_jax.losses.optimiser import MOST_SKIPPED
from musicrl_jax.report.curves import read_metrics
from musicrl_jax.rl.config import RLConfig
from musicrl_jax.rl.learner import RLState
from musicrl_jax.rl.rewards import LoadedMixture, Mixture
from musicrl_jax.rl.steps import Run, Step
from musicrl_jax.systems import folder
from musicrl_jax.systems.folder import LoadedSystem
from musicrl_jax.systems.player import Units
from musicrl_jax.systems.system import Tree

UNIT_BATCHES = 4  # of the base's clips, whose scores give the units of normalised rewards


@lock.holds("model_dir")
def train_rl(
    model_dir: str,
    system: str,
    rewards: Mixture,
    prompts: Prompts,
    config: RLConfig,
    monitor: Monitor | None = None,
) -> None:
    """Finetunes a system's policy and writes it to `model_dir`; goes on from the newest checkpoint.

    Policy and value start from the base's weights, and the base stays as the anchor (MusicRL 3.3).
    With a monitor the policy is written that `arena.monitor.RULE` keeps; if that is not the last,
    the last one is written to `model_dir`/last.

    Args:
      model_dir: the run's folder, and that of the finetuned system.
      system: folder of the base.
      rewards: the mixture that is maximised.
      prompts: training prompts, their 'train' split.
      config: how the policy is finetuned.
      monitor: a held-out judge that looks at the policy from time to time and stops an
        over-optimised run.

    Raises:
      ValueError: if a setting is out of range, models do not fit, or model_dir holds another run.
      FloatingPointError: if rewards or gradients are not finite many times in a row.
      hosts.Preempted: if the run was told to stop; its state is saved.
    """
    # Everything is checked before any work.
    directory = Path(model_dir)
    loaded = folder.load(system)
    mixture = rewards.load()
    mixture.check_models(loaded)
    loaded.system.length(config.clip_seconds)
    if monitor is not None:
        monitor.audience.check(loaded.system.sample_rate_hz)
    identity = {
        "hashes": {**loaded.hashes, **mixture.hashes},
        "rewards": checkpoint.describe(rewards),
        "prompts": checkpoint.describe(prompts),
        **checkpoint.describe(config),
        "monitor": checkpoint.describe(monitor),
    }
    checkpoints = RunCheckpoints(directory, identity)
    if checkpoint.has_model(directory):
        print(f"{directory}: trained already")
        monitors.forget(directory)  # of a run that was killed just before its end
        checkpoints.close()
        return

    # Policy, value and anchor, all from the base; what an interrupted run had comes after.
    mesh = sharding.make_mesh(config.fsdp, config.tensor)
    run = Run(loaded, mixture, config, mesh)
    state, anchor = run.start()
    start = checkpoints.latest_step()
    about = checkpoints.notes()
    if start:
        state = checkpoints.restore(state)

    with closing(checkpoints), jax.set_mesh(mesh), MetricWriter(directory, start) as writer:
        # What the base sounds like: units of the rewards, and what the judge compares with.
        units = _units(run, mixture, anchor, prompts, about if start else None)
        about = {"anchor": loaded.hashes["policy"], "units": units, "seed": config.seed}
        judge = None
        if monitor is not None:
            metrics = read_metrics(directory / FILE_NAME)
            judge = monitor.load(directory, partial(run.hear, anchor), metrics)

        # The loop.
        batch = config.batch_size // config.gradient.clips_per_prompt
        batches = prompts.batches("train", batch, config.seed, start_step=start)
        progress = Progress(range(start, config.steps), directory.name, config.steps, start)
        books = _Books(directory.name, config, mixture, writer, int(state.skipped))
        with hosts.stopping_together() as stopping:
            for step in progress:
                if stopping():
                    checkpoints.leave(step, state, about)
                looked = {}
                if judge is not None and judge.due(step, config.steps):
                    stored = loaded.system.stored(sharding.fetch(state.policy))
                    draw = partial(run.hear, state.policy)
                    looked = judge.look(step, draw, loaded.config, stored)
                # The clips of a prompt stand together.
                texts = np.repeat(next(batches), config.gradient.clips_per_prompt).tolist()
                done = run.step(state, anchor, texts, step, units)
                state = done.state
                metrics = books.write(step, done, looked)
                progress.note(f"reward {metrics['reward']:.3f}  kl {metrics['kl']:.2f}")
                if looked and judge.alarm(step, float(metrics["kl"]), *looked.values()):
                    print(
                        f"{directory.name}: the held-out judge has passed its peak; stops, and "
                        f"keeps step {judge.kept}"
                    )
                    break
                if (step + 1) % config.save_every == 0:
                    checkpoints.save(step + 1, state, about)
    _finish(directory, loaded, mixture, config, state, judge, units)


def _units(
    run: Run,
    mixture: LoadedMixture,
    anchor: Tree,
    prompts: Prompts,
    about: dict[str, Any] | None,
) -> Units:
    """Returns centre and spread of each term on clips of the base, or those of the run so far."""
    if about is not None:
        return {name: tuple(unit) for name, unit in about["units"].items()}
    neutral = dict.fromkeys(mixture.names, (0.0, 1.0))
    if not mixture.mixture.normalise:
        return neutral
    parts = []
    batches = prompts.batches("train", run.config.batch_size, run.config.seed)
    for number, texts in enumerate(itertools.islice(batches, UNIT_BATCHES)):
        rollout = run.draw(anchor, texts, number, Stream.UNITS)
        parts.append(sharding.fetch(run.score(rollout, texts, neutral)[1]))
    return mixture.units({name: np.concatenate([part[name] for part in parts]) for name in neutral})


class _Books:
    """Writes the metrics of each step, and gives a run up whose updates are all left out."""

    def __init__(
        self,
        name: str,
        config: RLConfig,
        mixture: LoadedMixture,
        writer: MetricWriter,
        skipped: int,
    ):
        self._name, self._seconds, self._mixture = name, config.clip_seconds, mixture
        self._writer, self._skipped, self._in_a_row = writer, skipped, 0

    def write(self, step: int, done: Step, looked: dict[str, float]) -> dict[str, float]:
        """Returns the metrics of a step; FloatingPointError after too many left-out updates."""
        reward, terms, metrics = sharding.fetch((done.reward, done.terms, done.metrics))
        self._mixture.check(terms)
        numbers = {name: score.mean() for name, score in terms.items()}
        numbers |= {"reward": reward.mean(), "reward_std": reward.std(), **metrics, **looked}
        numbers["kl_per_second"] = numbers["kl"] / self._seconds
        self._writer.write(step, numbers)
        self._in_a_row = self._in_a_row + 1 if metrics["skipped"] > self._skipped else 0
        self._skipped = metrics["skipped"]
        if self._in_a_row > MOST_SKIPPED:
            raise FloatingPointError(
                f"{self._name}: {self._in_a_row} updates in a row had a reward or gradient that is "
                f"not finite, the last at step {step}; mend the reward or lower the learning rate"
            )
        return numbers


def _finish(
    directory: Path,
    loaded: LoadedSystem,
    mixture: LoadedMixture,
    config: RLConfig,
    state: RLState,
    judge: Judge | None,
    units: Units,
) -> None:
    """Writes the finetuned system, and the last policy beside it if the judge keeps another."""
    learned = {
        "anchor": loaded.hashes["policy"],
        "rewards": mixture.describe(),
        "units": units,
        "watched": None if judge is None else judge.describe(),
    }
    assets = {
        checkpoint.ANCHOR: json.dumps(learned).encode(),
        checkpoint.CLIP: json.dumps({"seconds": config.clip_seconds}).encode(),
    }
    policy = sharding.fetch(state.policy)
    if judge is not None and judge.kept is not None:
        folder.save_policy(directory / folder.LAST, loaded, policy, assets)
        kept = judge.kept_policy(type(loaded.config))
        policy = loaded.policy if kept is None else loaded.system.restored(kept.variables)
    folder.save_policy(directory, loaded, policy, assets)
    monitors.forget(directory)
