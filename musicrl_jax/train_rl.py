"""Prompts -> a finetuned policy. Jitted functions, one after the other, in a loop that only keeps books:

    rollout   prompts -> MuLan tokens -> the policy's tokens -> fine levels -> waveform       on the device
    reward    waveform -> one number a term                                                   on the device
    update    log-probs of policy and anchor, values -> gradients -> new policy and value     on the device, donated

They stand in rl/steps.py, of the rollout one for each arrow; what an update is stands in rl/learner.py.

Legend: B clips, L text pieces, N samples, n prompts of the judge.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from musicrl_jax.arena.monitor import Judge, Monitor
from musicrl_jax.core import checkpoint, hosts, lock, sharding
from musicrl_jax.core.metrics import FILE_NAME, MetricWriter
from musicrl_jax.core.progress import Progress
from musicrl_jax.core.run_checkpoints import RunCheckpoints
from musicrl_jax.losses.optimiser import MOST_SKIPPED, Optimiser, in_dtype
from musicrl_jax.inputs import pieces
from musicrl_jax.inputs.prompts import Prompts
from musicrl_jax.losses.policy_gradient import PolicyGradient
from musicrl_jax.models.layers import stacked, unstacked
from musicrl_jax.models.musiclm import MusicLMConfig
from musicrl_jax.report.curves import read_metrics
from musicrl_jax.rl import rollout as rollouts
from musicrl_jax.rl.rewards import Mixture, Units
from musicrl_jax.rl.rollout import Rollout
from musicrl_jax.rl.sample import Sampling
from musicrl_jax.rl.steps import build

UNIT_BATCHES = 4  # of the base's clips, one a prompt, that say in which units rewards are normalised
LOOKS = "looks"  # the policies that the held-out judge looked at, until one is kept
JUDGED = "judge_gain", "judge_error"  # the held-out judge's metrics


@lock.holds("model_dir")
def train_rl(
    model_dir: str,
    base: str,
    fine: str,
    codec: str,
    mulan: str,
    rewards: Mixture,
    prompts: Prompts,
    steps: int,
    batch_size: int,
    clip_seconds: float,
    kl_strength: float,
    policy_optimiser: Optimiser,
    value_optimiser: Optimiser,
    gradient: PolicyGradient,
    updates: int = 1,
    kl_target: float | None = None,
    temperature: float = 0.99,
    top_k: int | None = None,
    microbatches: int = 1,
    remat: bool = False,
    dtype: str = "float32",
    seed: int = 0,
    fsdp: int = 1,
    tensor: int = 1,
    save_every: int = 10,
    monitor: Monitor | None = None,
) -> None:
    """Finetunes a base policy and writes it to `model_dir`/model; goes on from the newest checkpoint there, if any.

    Policy and value start from the base's weights, and the base stays as the anchor (MusicRL 3.3). With a monitor the
    policy that is written is the one that `arena.monitor.RULE` keeps; where that is not the last, the last one is
    written to `model_dir`/last/model.

    Args:
      model_dir: the run's folder.
      base, fine, codec, mulan: folders of the checkpoints that turn a prompt into sound.
      rewards: the mixture that is maximised.
      prompts: what is asked for in training; its 'train' split.
      steps: rollouts in all.
      batch_size: clips a step, over all devices; prompts times `gradient.clips_per_prompt`.
      clip_seconds: length of the clips.
      kl_strength: a in J = (1 - a) E[R] - a KL; KL in nats a clip. Where it starts, if there is a target.
      policy_optimiser, value_optimiser: how each moves; the value's is not used without a value.
      gradient: which policy gradient; by default the paper's, with the exact gradient of its KL.
      updates: of each rollout; more than 1 needs the clipped surrogate.
      kl_target: nats a second of music that kl_strength is adapted to; None keeps it.
      temperature, top_k: of the policy, in sampling and in scoring alike; see `rl.sample.Sampling`.
      microbatches: parts of a batch that are differentiated one after the other, to save memory.
      remat: saves memory for time, as in `models.transformer.Transformer`.
      dtype: of the products with the weights in the update and in SoundStorm, 'float32' or 'bfloat16'; clips are drawn
        in float32 (on a TPU the compiler reads weights and caches as bfloat16 even so), and what is learned,
        softmaxes, losses, rewards and the codec are in it too. The metric sampler_drift says what that changes.
      seed: of prompts' order and of sampling.
      fsdp, tensor: sizes of the mesh's axes.
      save_every: steps between two checkpoints.
      monitor: a held-out judge that looks at the policy from time to time and stops an over-optimised run.

    Raises:
      ValueError: where a setting is out of range, the models do not fit, or model_dir holds another run.
      FloatingPointError: where rewards or gradients are not finite many times in a row.
      hosts.Preempted: where the run was told to stop; its state is saved.
    """
    if not 0 <= kl_strength < 1:
        raise ValueError(f"train_rl.kl_strength={kl_strength} must lie in [0, 1)")
    Sampling(temperature, top_k)  # refuses what is out of range
    if updates < 1 or (updates > 1 and gradient.surrogate != "clipped"):
        raise ValueError(
            f"train_rl.updates={updates} must be 1, or more with PolicyGradient.surrogate='clipped', "
            f"which is {gradient.surrogate!r}"
        )
    if kl_target is not None and not (0 < kl_target < math.inf and kl_strength > 0):
        raise ValueError(
            f"train_rl.kl_target={kl_target} must be above 0 and finite, or None, and kl_strength={kl_strength}, where "
            "it starts, above 0"
        )
    if min(steps, batch_size, save_every) < 1:
        raise ValueError(
            f"train_rl: steps={steps}, batch_size={batch_size} and save_every={save_every} must be 1 or more"
        )
    if batch_size % gradient.clips_per_prompt:
        raise ValueError(f"train_rl.batch_size={batch_size} is no multiple of PolicyGradient.group={gradient.group}")
    if microbatches < 1 or batch_size % microbatches:
        raise ValueError(f"train_rl.microbatches={microbatches} must divide batch_size={batch_size}")
    in_dtype({}, dtype)  # refuses another
    directory = Path(model_dir)
    loaded = rollouts.load(base, fine, codec, mulan)
    mixture = rewards.load()
    mixture.check_models(loaded)
    if pieces.content(prompts.vocabulary) != loaded.vocabulary:
        raise ValueError(
            f"Prompts.vocabulary={prompts.vocabulary!r} is not the one that {mulan} was trained with: use that"
        )
    studio = loaded.studio
    identity = {
        "hashes": {**loaded.hashes, **mixture.hashes},
        "rewards": checkpoint.describe(rewards),
        "prompts": checkpoint.describe(prompts),
        "batch_size": batch_size,
        "clip_seconds": clip_seconds,
        "kl_strength": kl_strength,
        "gradient": dataclasses.asdict(gradient),
        "updates": updates,
        "kl_target": kl_target,
        "temperature": temperature,
        "top_k": top_k,
        "dtype": dtype,
        "policy_optimiser": dataclasses.asdict(policy_optimiser),
        "value_optimiser": dataclasses.asdict(value_optimiser),
        "monitor": checkpoint.describe(monitor),
        "seed": seed,
        "steps": steps,
    }
    if monitor is not None:
        monitor.audience.check(studio.sample_rate_hz)
    checkpoints = RunCheckpoints(directory, identity)
    if checkpoint.has_model(directory):
        print(f"{directory}: trained already")
        shutil.rmtree(directory / LOOKS, ignore_errors=True)  # of a run that was killed just before its end
        checkpoints.close()
        return

    # Policy, value and anchor, all from the base.
    mesh = sharding.make_mesh(fsdp, tensor)
    config = studio.musiclm.config
    learner, functions = build(
        loaded,
        mixture,
        mesh,
        steps=steps,
        batch_size=batch_size,
        clip_seconds=clip_seconds,
        kl_strength=kl_strength,
        policy_optimiser=policy_optimiser,
        value_optimiser=value_optimiser,
        gradient=gradient,
        updates=updates,
        kl_target=kl_target,
        temperature=temperature,
        top_k=top_k,
        microbatches=microbatches,
        remat=remat,
        dtype=dtype,
    )
    state, shardings = sharding.born_sharded(mesh, learner.create, jax.random.key(seed))
    anchor = sharding.put(stacked(loaded.policy), shardings.policy)
    state = jax.jit(learner.started, out_shardings=shardings)(state, anchor)
    frozen, scorers = (sharding.put(tree, sharding.spread(mesh, tree)) for tree in (loaded.frozen, mixture.variables))
    start = checkpoints.latest_step()
    about = checkpoints.about()
    if start:
        state = checkpoints.restore(state)

    def played(policy: Any, asked: np.ndarray, step: int, stream: int = 3) -> Rollout:
        text = sharding.put_batch(mesh, {"text": asked})["text"]
        keys = functions.keys(*(np.int32(number) for number in (seed, step, stream)))
        return functions.rollout(*functions.gather(policy, frozen), text, keys)

    def scored(rollout: Rollout, units: Units) -> tuple[jax.Array, dict[str, jax.Array]]:
        return functions.reward(functions.gather_scorers(scorers), rollout, units)

    def heard(policy: Any, text: np.ndarray) -> np.ndarray:
        """A clip for each of the judge's prompts, with the same keys at every look: [n, L] -> f32 [n, N]."""
        rows = np.arange(-(-len(text) // batch_size) * batch_size) % len(text)
        parts = rows.reshape(-1, batch_size)
        wavs = [sharding.fetch(played(policy, text[part], number, stream=6).wav) for number, part in enumerate(parts)]
        return np.concatenate(wavs)[: len(text)]

    # The loop.
    per_prompt = gradient.clips_per_prompt
    with closing(checkpoints), jax.set_mesh(mesh), MetricWriter(directory, start) as writer:
        units = {term.name: (0.0, 1.0) for term in rewards.terms}
        if start:
            units = {name: tuple(unit) for name, unit in about["units"].items()}
        elif rewards.normalise:
            asked = islice(prompts.batches("train", batch_size, seed), UNIT_BATCHES)
            first = (played(anchor, batch["text"], number, stream=7) for number, batch in enumerate(asked))
            found = [sharding.fetch(scored(rollout, units)[1]) for rollout in first]
            units = mixture.units({name: np.concatenate([part[name] for part in found]) for name in found[0]})
        about = {"anchor": loaded.hashes["policy"], "units": units, "seed": seed}
        judge = None if monitor is None else _judge(monitor, loaded.vocabulary, directory, partial(heard, anchor))
        batches = prompts.batches("train", batch_size // per_prompt, seed, start_step=start)
        progress = Progress(range(start, steps), directory.name, steps, start)
        kept, in_a_row, skipped = None, 0, int(state.skipped)
        with hosts.stopping_together() as stopping:
            for step in progress:
                if stopping():
                    checkpoints.leave(step, state, about)
                seen = {}
                if judge is not None and step and step % monitor.every(steps) == 0:
                    seen = dict(zip(JUDGED, judge.look(partial(heard, state.policy)), strict=True))
                    heard_now = {"params": unstacked(sharding.fetch(state.policy))}
                    checkpoint.save_model(directory / LOOKS / f"{step}", config, heard_now)
                asked = np.repeat(next(batches)["text"], per_prompt, axis=0)  # clips of a prompt stand together
                rollout = played(state.policy, asked, step)
                reward, terms = scored(rollout, units)
                if step == 0:
                    state = jax.jit(learner.with_baseline, out_shardings=shardings)(state, reward)
                state, metrics = functions.update(state, functions.gather_learner(state, anchor), rollout, reward)
                reward, terms, metrics = sharding.fetch((reward, terms, metrics))
                mixture.check(terms)
                numbers = {name: score.mean() for name, score in terms.items()}
                numbers |= {"reward": reward.mean(), "reward_std": reward.std(), **metrics, **seen}
                numbers["kl_per_second"] = numbers["kl"] / clip_seconds
                writer.write(step, numbers)
                in_a_row, skipped = in_a_row + 1 if metrics["skipped"] > skipped else 0, metrics["skipped"]
                if in_a_row > MOST_SKIPPED:
                    raise FloatingPointError(
                        f"{directory.name}: {in_a_row} updates in a row had a reward or gradient that is not "
                        f"finite, the last at step {step}; mend the reward or lower the learning rate"
                    )
                progress.note(f"reward {numbers['reward']:.3f}  kl {numbers['kl']:.2f}")
                if seen and (kept := judge.alarmed(step, float(metrics["kl"]), *seen.values())) is not None:
                    print(f"{directory.name}: the held-out judge has passed its peak; stops, and keeps step {kept}")
                    break
                if (step + 1) % save_every == 0:
                    checkpoints.save(step + 1, state, about)
    watched = None if judge is None else {"looks": len(judge.seen), "kept": kept}
    if watched and kept is not None:
        watched["kl"] = {0: 0.0, **{step: kl for step, kl, *_ in judge.seen}}[kept]
    told = {"anchor": loaded.hashes["policy"], "rewards": mixture.describe(), "units": units, "watched": watched}
    assets = {checkpoint.LINEAGE: loaded.lineage, checkpoint.ANCHOR: json.dumps(told).encode()}
    assets[checkpoint.CLIP] = json.dumps({"seconds": clip_seconds}).encode()
    final = {"params": unstacked(sharding.fetch(state.policy))}
    if kept is not None:
        checkpoint.save_model(directory / rollouts.LAST, config, final, assets)
        looked = directory / LOOKS / f"{kept}"
        final = checkpoint.load_model(looked, MusicLMConfig).variables if kept else {"params": loaded.policy}
    checkpoint.save_model(directory, config, final, assets)
    shutil.rmtree(directory / LOOKS, ignore_errors=True)


def _judge(monitor: Monitor, vocabulary: bytes, directory: Path, heard: Callable[[np.ndarray], np.ndarray]) -> Judge:
    """The monitor's judge, who has heard the base and remembers what earlier attempts of this run let it see."""
    judge = monitor.load(vocabulary, heard)
    metrics = read_metrics(directory / FILE_NAME)
    by_step = [dict(zip(*metrics.get(name, ((), ())), strict=True)) for name in ("kl", *JUDGED)]
    for step in sorted(set.intersection(*map(set, by_step))):  # a damaged line may have lost one of the three
        judge.alarmed(int(step), *(float(values[step]) for values in by_step))
    return judge
