"""The jitted functions of a run of RL: `train_rl` calls them, and the planner compiles them.

Legend: B clips, n prompts, N samples.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from musicrl_jax.core import sharding
from musicrl_jax.core.keys import Stream
from musicrl_jax.rl.config import RLConfig
from musicrl_jax.rl.learner import ComputeCopy, Learner, RLState
from musicrl_jax.rl.rewards import LoadedMixture
from musicrl_jax.systems.folder import LoadedSystem
from musicrl_jax.systems.player import Player, Units
from musicrl_jax.systems.system import Rollout, Tree, Weights


class Step(NamedTuple):
    """Results of a step: next state, rewards f32 [B], scores f32 [B] by reward term, metrics."""

    state: RLState
    reward: jax.Array
    terms: dict[str, jax.Array]
    metrics: dict[str, jax.Array]


class Run:
    """The player and the learner of one run, jitted on its mesh; their weights are arguments.

    Between steps the state is sharded over fsdp. Sampling and updates read compute copies, which
    are all-gathered first: a program that both computes and gathers a thousand arrays takes minutes
    longer to compile.

    Attributes:
      player: draws and scores clips.
      learner: the update as a pure function.
      shapes, shardings: of the learner's state.
      copy_shardings: shardings of the weights that an update computes with.
    """

    def __init__(self, loaded: LoadedSystem, mixture: LoadedMixture, config: RLConfig, mesh: Mesh):
        """Builds the functions without compiling them.

        Raises ValueError if the devices of the mesh do not divide the batch.
        """
        # The player.
        system = loaded.system.tuned(mesh.devices.flat[0].platform, config.remat)
        self.config, self.mesh, self._loaded, self._mixture = config, mesh, loaded, mixture
        clips = config.batch_size, config.clip_seconds, config.sampling
        self.player = Player(system, mesh, *clips, config.dtype, mixture)

        # The learner: its state at rest, and all-gathered over fsdp.
        self.learner = learner = Learner(system, config)
        key = jax.eval_shape(lambda: jax.random.key(0))
        self.shapes, self.shardings = sharding.shapes_and_shardings(mesh, learner.create, key)
        _, copies = sharding.shapes_and_shardings(
            mesh, learner.create, key, rules=sharding.SAMPLING_RULES
        )
        self.copy_shardings = ComputeCopy(copies.policy, copies.policy, copies.value)

        def compute_copy(state: RLState, anchor: Tree) -> ComputeCopy:
            # Copies the arrays, since `update` donates those of the state.
            return jax.tree.map(jnp.copy, learner.compute_copy(state, anchor))

        self.compute_copy = jax.jit(compute_copy, out_shardings=self.copy_shardings)
        self.update = jax.jit(
            partial(learner.update, shardings=self.shardings, copy_shardings=self.copy_shardings),
            donate_argnums=0,
            out_shardings=(self.shardings, sharding.replicated(mesh)),
        )

    def start(self) -> tuple[RLState, Tree]:
        """Returns the state before the first step and the anchor, both with the base's weights.

        Puts the frozen models and the rewards on the devices.
        """
        # The state is created sharded, so that no device ever holds all of it.
        mesh, learner = self.mesh, self.learner
        key = jax.random.key(self.config.seed)
        state, _ = sharding.create_sharded(mesh, learner.create, key)
        anchor = sharding.put(self._loaded.policy, self.shardings.policy)
        state = jax.jit(learner.start_from, out_shardings=self.shardings)(state, anchor)
        # Models that no update changes.
        self._frozen, self._scorers = (
            sharding.put(tree, sharding.spread(mesh, tree))
            for tree in (self._loaded.frozen, self._mixture.variables)
        )
        return state, anchor

    def draw(self, policy: Tree, prompts: Sequence[str], step: int, stream: Stream) -> Rollout:
        """Samples a clip for each of B prompts."""
        weights = self.player.compute_copy(Weights(policy, self._frozen))
        return self.player.draw(weights, prompts, self.config.seed, step, stream)

    def score(
        self, rollout: Rollout, prompts: Sequence[str], units: Units
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns (reward f32 [B], terms f32 [B] each) of a rollout."""
        return self.player.score(self._scorers, rollout, prompts, units)

    def step(
        self, state: RLState, anchor: Tree, prompts: Sequence[str], step: int, units: Units
    ) -> Step:
        """Samples, scores and updates; donates the state."""
        rollout = self.draw(state.policy, prompts, step, Stream.ROLLOUT)
        reward, terms = self.score(rollout, prompts, units)
        # The first rewards set the baseline.
        if step == 0:
            baseline = jax.jit(self.learner.with_baseline, out_shardings=self.shardings)
            state = baseline(state, reward)
        # The copy is made apart from the update, which compiles faster without all-gathers.
        copy = self.compute_copy(state, anchor)
        state, metrics = self.update(state, copy, rollout, reward)
        return Step(state, reward, terms, metrics)

    def monitor_clips(self, policy: Tree, prompts: Sequence[str]) -> np.ndarray:
        """Samples a clip for each of n prompts, with the same keys in every call: f32 [n, N]."""
        rows, wavs = self.config.batch_size, []
        for number in range(-(-len(prompts) // rows)):
            # The last batch starts again with the first prompts.
            places = np.arange(number * rows, (number + 1) * rows) % len(prompts)
            batch = [prompts[place] for place in places]
            wavs.append(sharding.fetch(self.draw(policy, batch, number, Stream.MONITOR).mono))
        return np.concatenate(wavs)[: len(prompts)]
