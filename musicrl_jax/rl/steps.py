"""The functions of a run of RL on its mesh: what `train_rl` calls, and what the planner compiles.

Legend: B clips, C channels, N samples.
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
    """What became of a step: the next state, rewards f32 [B], terms f32 [B] each, and metrics."""

    state: RLState
    reward: jax.Array
    terms: dict[str, jax.Array]
    metrics: dict[str, jax.Array]


class Run:
    """One run: its player, its learner and their jitted functions, without weights.

    The state rests sharded over fsdp. What computes in long loops, as sampling does, gets a copy
    that is all-gathered first; a program that computes takes minutes longer to compile if it also
    fetches a thousand arrays.

    Attributes:
      player: draws and scores clips.
      learner: the update as a pure function.
      shapes, shardings: of the learner's state.
      copy_shardings: of the weights that an update computes with.
    """

    def __init__(self, loaded: LoadedSystem, mixture: LoadedMixture, config: RLConfig, mesh: Mesh):
        """Builds the functions, and compiles nothing; ValueError if the batch does not divide."""
        system = loaded.system.tuned(mesh.devices.flat[0].platform, config.remat)
        self.config, self.mesh, self._loaded, self._mixture = config, mesh, loaded, mixture
        self.player = Player(
            system,
            mesh,
            config.batch_size,
            config.clip_seconds,
            config.sampling,
            config.dtype,
            mixture,
        )
        self.learner = learner = Learner(system, config)
        key = jax.eval_shape(lambda: jax.random.key(0))
        self.shapes, self.shardings = sharding.shapes_and_shardings(mesh, learner.create, key)
        rules = sharding.SAMPLING_RULES
        gathered = sharding.shapes_and_shardings(mesh, learner.create, key, rules=rules)[1]
        self.copy_shardings = ComputeCopy(gathered.policy, gathered.policy, gathered.value)
        whole = sharding.replicated(mesh)

        def compute_copy(state: RLState, anchor: Tree) -> ComputeCopy:
            # The state itself is donated to the update.
            return jax.tree.map(jnp.copy, learner.compute_copy(state, anchor))

        self.compute_copy = jax.jit(compute_copy, out_shardings=self.copy_shardings)
        self.update = jax.jit(
            partial(learner.update, layout=self.shardings, gathered=gathered),
            donate_argnums=0,
            out_shardings=(self.shardings, whole),
        )

    def start(self) -> tuple[RLState, Tree]:
        """Returns the state before the first step and the anchor, both with the base's weights."""
        mesh, learner = self.mesh, self.learner
        key = jax.random.key(self.config.seed)
        state, _ = sharding.create_sharded(mesh, learner.create, key)
        anchor = sharding.put(self._loaded.policy, self.shardings.policy)
        state = jax.jit(learner.started, out_shardings=self.shardings)(state, anchor)
        self._frozen, self._scorers = (
            sharding.put(tree, sharding.spread(mesh, tree))
            for tree in (self._loaded.frozen, self._mixture.variables)
        )
        return state, anchor

    def draw(self, policy: Tree, prompts: Sequence[str], step: int, stream: Stream) -> Rollout:
        """Draws a clip for each of B prompts."""
        weights = self.player.compute_copy(Weights(policy, self._frozen))
        return self.player.draw(weights, prompts, self.config.seed, step, stream)

    def score(
        self, rollout: Rollout, prompts: Sequence[str], units: Units
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns (the reward, each term) of a rollout, f32 [B]."""
        return self.player.score(self._scorers, rollout, prompts, units)

    def step(
        self, state: RLState, anchor: Tree, prompts: Sequence[str], step: int, units: Units
    ) -> Step:
        """Draws, scores and updates; the state is given away."""
        rollout = self.draw(state.policy, prompts, step, Stream.ROLLOUT)
        reward, terms = self.score(rollout, prompts, units)
        if step == 0:
            baseline = jax.jit(self.learner.with_baseline, out_shardings=self.shardings)
            state = baseline(state, reward)
        copy = self.compute_copy(state, anchor)
        state, metrics = self.update(state, copy, rollout, reward)
        return Step(state, reward, terms, metrics)

    def hear(self, policy: Tree, prompts: Sequence[str]) -> np.ndarray:
        """Draws a clip for each of n prompts, with the same keys at every call: f32 [n, N]."""
        rows = self.config.batch_size
        batches = -(-len(prompts) // rows)
        wavs = []
        for number in range(batches):
            chosen = [prompts[i % len(prompts)] for i in range(number * rows, (number + 1) * rows)]
            rollout = self.draw(policy, chosen, number, Stream.MONITOR)
            wavs.append(sharding.fetch(rollout.mono))
        return np.concatenate(wavs)[: len(prompts)]
