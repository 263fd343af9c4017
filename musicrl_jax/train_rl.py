"""Finetunes the policy of a system by RL. Read this file first.

Each step calls jitted functions, one after the other; this file only does the bookkeeping:

    player.draw     prompts -> condition, tokens, their log-probs, waveform
    player.score    clips -> the score of each reward term, and the reward
    learner.update  log-probs of policy and anchor, values -> gradients -> new policy and value

`systems/` defines how a system makes clips, and `rl/learner.py` what an update is.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

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
from musicrl_jax.report.curves import read_metrics, run_curves
from musicrl_jax.report.live import CLIPS, LiveCharts
from musicrl_jax.rl.config import RLConfig
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
    """Finetunes a system, and writes the finetuned one to `model_dir`; resumes an interrupted run.

    Policy and value start from the base's weights; the base is the anchor (MusicRL 3.3). If the
    judge chooses an earlier policy, by `arena.monitor.RULE`, the last goes to `model_dir`/last.

    Args:
      model_dir: folder of the run, and of the finetuned system.
      system: folder of the base.
      rewards: rewards to maximise.
      prompts: prompts; training uses their 'train' split.
      config: settings of the finetuning.
      monitor: held-out judge that stops the run once the rewards are over-optimised.

    Raises:
      ValueError: if a setting is out of range, models do not belong together, there are no training
        prompts, or model_dir has another run.
      FloatingPointError: if rewards or gradients are not finite many times in a row.
      hosts.Preempted: if the run was told to stop; its state is saved.
    """
    # Check everything before any work.
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
    start = checkpoints.latest_step()
    prompts_per_step = config.batch_size // config.gradient.clips_per_prompt
    batches = prompts.batches("train", prompts_per_step, config.seed, start_step=start)

    # Policy, value and anchor start from the base's weights. An interrupted run goes on.
    mesh = sharding.make_mesh(config.fsdp, config.tensor)
    run = Run(loaded, mixture, config, mesh)
    state, anchor = run.start()
    if start:
        state = checkpoints.restore(state)

    with closing(checkpoints), jax.set_mesh(mesh), MetricWriter(directory, start) as writer:
        # Clips of the base. Each reward is centred and scaled by its scores on them, and the judge
        # compares with them.
        if start:
            units = {name: tuple(unit) for name, unit in checkpoints.notes()["units"].items()}
        else:
            units = _base_units(run, mixture, anchor, prompts)
        record = {"anchor": loaded.hashes["policy"], "units": units, "seed": config.seed}
        judge = None
        if monitor is not None:
            metrics = read_metrics(directory / FILE_NAME)
            judge = monitor.load(directory, partial(run.monitor_clips, anchor), metrics)
        show = _shower(run, anchor, prompts, mixture, writer, directory)

        # The loop.
        progress = Progress(range(start, config.steps), directory.name, config.steps, start)
        log = _MetricLog(directory.name, writer, mixture, config.clip_seconds, int(state.skipped))
        with hosts.stopping_together() as stopping:
            for step in progress:
                if stopping():
                    checkpoints.leave(step, state, record)

                # Now and then the held-out judge listens to the policy.
                judgement = {}
                if judge is not None and judge.due(step, config.steps):
                    variables = loaded.system.stored(sharding.fetch(state.policy))
                    draw = partial(run.monitor_clips, state.policy)
                    judgement = judge.look(step, draw, loaded.config, variables)

                # Sample, score and update. The clips of a prompt are neighbours in the batch.
                texts = np.repeat(next(batches), config.gradient.clips_per_prompt).tolist()
                result = run.step(state, anchor, texts, step, units)
                state = result.state

                # Metrics, the judge's alarm and checkpoints.
                metrics = log.write(step, result, judgement)
                show(step, state.policy)
                progress.note(f"reward {metrics['reward']:.3f}  kl {metrics['kl']:.2f}")
                if judgement and judge.alarm(step, float(metrics["kl"]), *judgement.values()):
                    print(
                        f"{directory.name}: the held-out judge has passed its peak; stops, and "
                        f"keeps step {judge.selected_step}"
                    )
                    break
                if (step + 1) % config.save_every == 0:
                    checkpoints.save(step + 1, state, record)

    # The finetuned system, with a record of how it was trained.
    record = {
        "anchor": loaded.hashes["policy"],
        "rewards": mixture.describe(),
        "units": units,
        "watched": None if judge is None else judge.describe(),
    }
    assets = {
        checkpoint.ANCHOR: json.dumps(record).encode(),
        checkpoint.CLIP: json.dumps({"seconds": config.clip_seconds}).encode(),
    }
    _save(directory, loaded, sharding.fetch(state.policy), judge, assets)


def _base_units(run: Run, mixture: LoadedMixture, anchor: Tree, prompts: Prompts) -> Units:
    """Returns centre and spread of each reward term on clips of the base."""
    neutral = dict.fromkeys(mixture.names, (0.0, 1.0))
    if not mixture.mixture.normalise:
        return neutral
    parts = []
    batches = prompts.batches("train", run.config.batch_size, run.config.seed)
    for number, texts in enumerate(itertools.islice(batches, UNIT_BATCHES)):
        rollout = run.draw(anchor, texts, number, Stream.UNITS)
        _, terms = run.score(rollout, texts, neutral)
        parts.append(sharding.fetch(terms))
    return mixture.units({name: np.concatenate([part[name] for part in parts]) for name in neutral})


def _shower(
    run: Run,
    anchor: Tree,
    prompts: Prompts,
    mixture: LoadedMixture,
    writer: MetricWriter,
    directory: Path,
) -> Callable[[int, Tree], None]:
    """Returns a function that shows a step and its policy, beside clips of the base."""
    config = run.config
    if not config.show_every:
        return lambda step, policy: None
    # Fixed prompts, of the validation split if it has any.
    texts = (prompts.unique("validation") or prompts.unique("train"))[:CLIPS]
    charts = LiveCharts(
        writer,
        directory,
        config.batch_size,
        run.player.system.sample_rate_hz,
        texts,
        "Clips of the base, and of the policy after these steps, from the same random numbers.",
        lambda log: run_curves(directory.name, log, mixture.names),
    )
    base = run.monitor_clips(anchor, texts)  # once: its clips stay the same

    def show(step: int, policy: Tree) -> None:
        charts.end_step(step)
        if (step + 1) % config.show_every == 0 or step == config.steps - 1:
            charts.show(step, {"base": base, "policy": run.monitor_clips(policy, texts)})

    return show


@dataclasses.dataclass
class _MetricLog:
    """Writes the metrics of each step, and ends a run whose updates are all skipped."""

    name: str
    writer: MetricWriter
    mixture: LoadedMixture
    clip_seconds: float
    skipped: int  # updates since the start of the run
    skipped_in_a_row: int = 0

    def write(self, step: int, result: Step, judgement: dict[str, float]) -> dict[str, float]:
        """Writes and returns metrics; raises FloatingPointError after too many skipped updates."""
        reward, terms, metrics = sharding.fetch((result.reward, result.terms, result.metrics))
        self.mixture.check(terms)
        metrics = {
            **{name: scores.mean() for name, scores in terms.items()},
            "reward": reward.mean(),
            "reward_std": reward.std(),
            **metrics,
            **judgement,
            "kl_per_second": metrics["kl"] / self.clip_seconds,
        }
        self.writer.write(step, metrics)
        for name, scores in terms.items():
            self.writer.histogram(step, name, scores)

        # A few skipped updates are no harm.
        skips = metrics["skipped"] > self.skipped
        self.skipped = metrics["skipped"]
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skips else 0
        if self.skipped_in_a_row > MOST_SKIPPED:
            raise FloatingPointError(
                f"{self.name}: {self.skipped_in_a_row} updates in a row had a reward or gradient "
                f"that is not finite, the last at step {step}; mend the reward or lower the "
                "learning rate"
            )
        return metrics


def _save(
    directory: Path,
    loaded: LoadedSystem,
    policy: Tree,
    judge: Judge | None,
    assets: dict[str, bytes],
) -> None:
    """Writes the finetuned system; if the judge chose an earlier policy, also the last one."""
    if judge is not None and judge.selected_step is not None:
        # The finetuned system's folder holds its last policy too, to compare both.
        folder.save_policy(directory / folder.LAST, loaded, policy, assets)
        chosen = judge.selected_policy(type(loaded.config))
        policy = loaded.policy if chosen is None else loaded.system.restored(chosen.variables)
    folder.save_policy(directory, loaded, policy, assets)
    monitors.forget(directory)
