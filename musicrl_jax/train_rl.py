"""Prompts -> a finetuned policy. Three jitted functions, one after the other, around a loop that only keeps books:

    rollout   prompts -> MuLan tokens -> the policy's tokens -> fine levels -> waveform       on the device
    reward    waveform -> one number a term                                                   on the device
    update    log-probs of policy and anchor, values -> gradients -> new policy and value     on the device, donated

Legend: B clips, S = F K tokens of a clip in the order in which they are drawn, V codes.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from musicrl_jax.core import checkpoint, sharding
from musicrl_jax.core.keys import row_keys, step_key
from musicrl_jax.core.metrics import MetricWriter
from musicrl_jax.core.progress import Progress
from musicrl_jax.core.state import Optimiser, moved
from musicrl_jax.inputs.prompts import Prompts
from musicrl_jax.losses.policy_gradient import policy_loss, value_loss
from musicrl_jax.models.musiclm import MusicLM, Value
from musicrl_jax.rl import rollout as rollouts
from musicrl_jax.rl.rewards import Mixture
from musicrl_jax.rl.rollout import Rollout
from musicrl_jax.rl.sample import log_probs, token_log_probs, values

MOST_SKIPPED = 10  # updates without a finite reward and gradient, before a run gives up


@flax.struct.dataclass
class RLState:
    """Everything an update reads and writes.

    Attributes:
      step: int32 [], the updates done.
      skipped: int32 [], the updates left out because a reward or a gradient was not finite.
      policy, value: weights.
      policy_opt, value_opt: the optimisers' moments.
    """

    step: jax.Array
    skipped: jax.Array
    policy: Any
    value: Any
    policy_opt: Any
    value_opt: Any


@dataclasses.dataclass(frozen=True)
class Learner:
    """KL-anchored REINFORCE with a learned value, as one pure step.

    Attributes:
      policy, value: the modules.
      policy_transform, value_transform: how the weights of each move.
      kl_strength: a in J = (1 - a) E[R] - a KL.
      temperature: of the policy, the same in sampling and here.
    """

    policy: MusicLM
    value: Value
    policy_transform: optax.GradientTransformation
    value_transform: optax.GradientTransformation
    kl_strength: float
    temperature: float

    def create(self, key: jax.Array) -> RLState:
        """A state of the right shapes; `started` puts the base's weights into it."""
        config = self.policy.config
        tokens = jnp.zeros((1, 1, config.layout.depth), jnp.int32)
        mulan = jnp.zeros((1, config.mulan_levels), jnp.int32)
        policy = self.policy.init(key, tokens, mulan)["params"]
        value = self.value.init(key, tokens, mulan)["params"]
        zero = jnp.zeros((), jnp.int32)
        return RLState(zero, zero, policy, value, self.policy_transform.init(policy), self.value_transform.init(value))

    def started(self, state: RLState, base: Any) -> RLState:
        """Policy and the value's trunk with the base's weights (MusicRL 3.3)."""
        return state.replace(
            policy=jax.tree.map(jnp.copy, base),
            value={**state.value, "trunk": jax.tree.map(jnp.copy, base["trunk"])},
        )

    def with_baseline(self, state: RLState, reward: jax.Array) -> RLState:
        """V starts at the first rollout's mean reward f32 [B]; from 0, all that was drawn first would be pushed up."""
        finite = jnp.isfinite(reward)
        mean = jnp.where(finite, reward, 0.0).sum() / jnp.maximum(finite.sum(dtype=jnp.float32), 1.0)
        return state.replace(value={**state.value, "offset": mean})

    def update(
        self, state: RLState, anchor: Any, rollout: Rollout, reward: jax.Array
    ) -> tuple[RLState, dict[str, jax.Array]]:
        """One update of policy and value: reward f32 [B] -> (the next state, metrics f32 [] each).

        Where a reward or a gradient is not finite nothing moves, and the update is counted in `skipped`.
        """
        tokens = _by_clip(rollout.tokens)
        log_anchor = _by_clip(log_probs(self.policy, anchor, rollout.tokens, rollout.mulan, self.temperature))

        def critic(weights: Any) -> Any:
            judged = _by_clip(values(self.value, weights, rollout.tokens, rollout.mulan))
            loss, metrics = value_loss(judged, reward)
            return loss, (judged, {"value_loss": loss, **metrics})

        # Recomputing the forward pass keeps [B, S, V] activations out of memory, and lets it compile to the anchor's
        # very operations: as long as the weights are equal so are the log-probs, and the KL is 0 to the bit.
        @jax.checkpoint
        def scored(weights: Any) -> jax.Array:
            return _by_clip(log_probs(self.policy, weights, rollout.tokens, rollout.mulan, self.temperature))

        def actor(weights: Any, baseline: jax.Array) -> Any:
            log_policy = scored(weights)
            loss, metrics = policy_loss(log_policy, log_anchor, tokens, reward, baseline, self.kl_strength)
            drift = jnp.abs(token_log_probs(log_policy, tokens) - _by_clip(rollout.log_probs)).max()
            return loss, {**metrics, "sampler_drift": drift}

        (_, (baseline, value_metrics)), value_gradients = jax.value_and_grad(critic, has_aux=True)(state.value)
        policy_gradients, metrics = jax.grad(actor, has_aux=True)(state.policy, baseline)
        policy_norm, value_norm = optax.tree.norm(policy_gradients), optax.tree.norm(value_gradients)
        policy, policy_opt = moved(self.policy_transform, policy_gradients, state.policy_opt, state.policy)
        value, value_opt = moved(self.value_transform, value_gradients, state.value_opt, state.value)
        step = state.step + 1
        taken = RLState(step, state.skipped, policy, value, policy_opt, value_opt)
        left_out = state.replace(step=step, skipped=state.skipped + 1)
        finite = jnp.isfinite(policy_norm + value_norm) & jnp.isfinite(reward).all()
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), taken, left_out)
        norms = {"policy_norm": policy_norm, "value_norm": value_norm, "skipped": state.skipped.astype(jnp.float32)}
        return state, {**metrics, **value_metrics, **norms}


def _by_clip(x: jax.Array) -> jax.Array:
    """[B, F, K, ...] -> [B, S, ...]."""
    return x.reshape(len(x), -1, *x.shape[3:])


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
    temperature: float = 0.99,
    seed: int = 0,
    fsdp: int = 1,
    tensor: int = 1,
    save_every: int = 10,
) -> None:
    """Finetunes a base policy and writes it to `model_dir`/model; goes on from the newest checkpoint there, if any.

    Policy and value start from the base's weights, and the base stays as the anchor (MusicRL 3.3).

    Args:
      model_dir: the run's folder.
      base, fine, codec, mulan: folders of the checkpoints that turn a prompt into sound.
      rewards: the mixture that is maximised.
      prompts: what is asked for in training; its 'train' split.
      steps: updates in all.
      batch_size: clips a step, over all devices.
      clip_seconds: length of the clips.
      kl_strength: a in J = (1 - a) E[R] - a KL; KL in nats a clip.
      policy_optimiser, value_optimiser: how each moves.
      temperature: of the policy, in sampling and in scoring alike.
      seed: of prompts' order and of sampling.
      fsdp, tensor: sizes of the mesh's axes.
      save_every: steps between two checkpoints.

    Raises:
      ValueError: where a setting is out of range, the models do not fit, or model_dir holds another run.
    """
    if not 0 <= kl_strength < 1:
        raise ValueError(f"train_rl.kl_strength={kl_strength} must lie in [0, 1)")
    if not 0 < temperature < math.inf:
        raise ValueError(f"train_rl.temperature={temperature} must be above 0 and finite")
    directory = Path(model_dir)
    loaded = rollouts.load(base, fine, codec, mulan)
    mixture = rewards.load()
    if Path(prompts.vocabulary).read_bytes() != loaded.vocabulary:
        raise ValueError(
            f"Prompts.vocabulary={prompts.vocabulary!r} is not the one that {mulan} was trained with: use that"
        )
    studio, frames = loaded.studio, loaded.studio.frames(clip_seconds)
    identity = {
        "hashes": {**loaded.hashes, **mixture.hashes},
        "rewards": checkpoint.describe(rewards),
        "prompts": checkpoint.describe(prompts),
        "batch_size": batch_size,
        "clip_seconds": clip_seconds,
        "kl_strength": kl_strength,
        "temperature": temperature,
        "policy_optimiser": dataclasses.asdict(policy_optimiser),
        "value_optimiser": dataclasses.asdict(value_optimiser),
        "seed": seed,
        "steps": steps,
    }
    checkpoints = checkpoint.RunCheckpoints(directory, identity)
    if checkpoint.has_model(directory):
        print(f"{directory}: trained already")
        checkpoints.close()
        return

    # Policy, value and anchor, all from the base.
    mesh = sharding.make_mesh(fsdp, tensor)
    replicated = sharding.replicated(mesh)
    config = studio.musiclm.config
    transforms = policy_optimiser.build(steps), value_optimiser.build(steps)
    learner = Learner(studio.musiclm, Value(config), *transforms, kl_strength, temperature)
    state, shardings = sharding.born_sharded(mesh, learner.create, jax.random.key(seed))
    anchor = jax.device_put(loaded.policy, shardings.policy)
    state = learner.started(state, anchor)
    frozen = jax.device_put(loaded.frozen, replicated)
    scorers = jax.device_put(mixture.variables, replicated)
    start = checkpoints.latest_step()
    if start:
        state = checkpoints.restore(state)

    # The three functions.
    def draw(policy: Any, frozen: Any, text: jax.Array, step: jax.Array) -> Rollout:
        keys = row_keys(step_key(seed, step, stream=3), len(text))
        return studio.rollout(policy, frozen, text, keys, frames, temperature)

    rollout_step = jax.jit(draw, out_shardings=sharding.batch_sharding(mesh))
    reward_step = jax.jit(mixture.score, out_shardings=sharding.batch_sharding(mesh))
    update_step = jax.jit(learner.update, donate_argnums=0, out_shardings=(shardings, replicated))

    # The loop.
    batches = prompts.batches("train", batch_size, seed, start_step=start)
    progress = Progress(range(start, steps), directory.name, steps, start)
    with jax.set_mesh(mesh), MetricWriter(directory, start) as writer:
        for step in progress:
            text = sharding.put_batch(mesh, next(batches))["text"]
            rollout = rollout_step(state.policy, frozen, text, jnp.int32(step))
            reward, terms = reward_step(scorers, rollout)
            if step == 0:
                state = learner.with_baseline(state, reward)
            state, metrics = update_step(state, anchor, rollout, reward)
            reward, terms, metrics = jax.device_get((reward, terms, metrics))
            mixture.check(terms)
            numbers = {name: score.mean() for name, score in terms.items()}
            numbers |= {"reward": reward.mean(), "reward_std": reward.std(), **metrics}
            numbers["kl_per_second"] = numbers["kl"] / clip_seconds
            writer.write(step, numbers)
            if metrics["skipped"] > MOST_SKIPPED:
                raise FloatingPointError(
                    f"{directory.name}: {MOST_SKIPPED + 1} updates had a reward or gradient that is not finite, the "
                    f"last at step {step}; mend the reward or lower the learning rate"
                )
            progress.note(f"reward {numbers['reward']:.3f}  kl {numbers['kl']:.2f}")
            if (step + 1) % save_every == 0:
                checkpoints.save(step + 1, state)
    checkpoints.close()
    checkpoint.save_model(directory, config, {"params": state.policy}, {rollouts.LINEAGE: loaded.lineage})
