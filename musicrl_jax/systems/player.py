"""Draws and scores clips with any system, sharded by row over a mesh: once for all verbs.

Legend: B clips, S tokens of a clip.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from musicrl_jax.core import sharding
from musicrl_jax.core.keys import Stream, row_keys, step_key
from musicrl_jax.systems.system import (
    Beginning,
    MusicSystem,
    Rollout,
    SampledTokens,
    Sampling,
    Text,
    Tree,
    Weights,
    roll_out,
)

# XLA's effort O1, by platform, for conditions, decoders and rewards. Compiling them for a TPU takes
# a quarter of the time or less, and a step of seconds 0.05 to 0.09 s more. In loops of thousands of
# small steps, as sampling has, it costs several times as much.
LITTLE_EFFORT = {"tpu": {"optimization_level": 19}}


Units = Mapping[str, tuple[float, float]]  # centre and spread of each term


class Scorer(Protocol):
    """What scores clips: a mixture of rewards with its models."""

    variables: Mapping[str, Tree]

    def read(self, prompts: Sequence[str]) -> Mapping[str, Text]:
        """Reads the prompts on the host, for each term in its own way."""

    def score(
        self, variables: Mapping[str, Tree], rollout: Rollout, texts: Mapping[str, Text]
    ) -> dict[str, jax.Array]:
        """Returns each term's scores, f32 [B]; traced under jit."""

    def total(self, scores: Mapping[str, jax.Array], units: Units) -> jax.Array:
        """Returns the reward, f32 [B]; traced under jit."""


class Player:
    """The jitted functions that draw and score clips of one system.

    One function a network, since one of all needs 5 GiB more while it samples on a v5e, is compiled
    with one effort, and is no faster. `compute_copy` comes first: it brings each device what it
    reads in loops of thousands of steps, which would otherwise all-gather in each of them.

    Attributes:
      system: as it computes on the mesh's platform.
      mesh: devices over which rows are sharded.
      rows: B of every batch.
      mixture: the rewards, if clips are scored.
      jitted: the functions that take the frozen parts which `MusicSystem.USES` names, by name.
    """

    def __init__(
        self,
        system: MusicSystem,
        mesh: Mesh,
        rows: int,
        clip_seconds: float,
        sampling: Sampling,
        dtype: str = "float32",
        mixture: Scorer | None = None,
    ):
        """Builds the functions, and compiles nothing.

        Raises ValueError if rows do not divide among the devices, or the clip is no whole frames.
        """
        sharding.rows_a_shard(mesh, rows)
        self.system, self.mesh, self.rows, self.mixture = system, mesh, rows, mixture
        length = system.length(clip_seconds)
        by_row, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
        little_effort = LITTLE_EFFORT.get(mesh.devices.flat[0].platform)
        key = jax.eval_shape(lambda: jax.random.key(0))
        rules = sharding.SAMPLING_RULES

        def drawn_policy(key: jax.Array) -> Tree:
            return system.compute_copy(Weights(system.init(key), {}), dtype).policy

        _, self.policy_sharding = sharding.shapes_and_shardings(
            mesh, drawn_policy, key, rules=rules
        )

        def keys(
            seed: jax.Array, step: jax.Array, stream: jax.Array, first: jax.Array
        ) -> jax.Array:
            return row_keys(step_key(seed, step, stream), rows, first)

        def sample(
            policy: Tree,
            condition: Tree,
            keys: jax.Array,
            temperatures: jax.Array | None = None,
            beginning: Beginning | None = None,
        ) -> SampledTokens:
            by_clip = sampling
            if temperatures is not None:
                by_clip = Sampling(temperatures[:, None], sampling.top_k)
            return system.sample(policy, condition, keys, length, by_clip, beginning)

        def reward(
            scorers: Mapping[str, Tree], rollout: Rollout, texts: Mapping[str, Text], units: Units
        ) -> tuple[jax.Array, dict[str, jax.Array]]:
            terms = mixture.score(scorers, rollout, texts)
            return mixture.total(terms, units), terms

        def kl(policy: Tree, other: Tree, rollout: Rollout) -> jax.Array:
            return system.kl(policy, other, rollout.condition, rollout.sampled, sampling)

        self.keys = jax.jit(keys, out_shardings=by_row)
        self.compute_copy = jax.jit(
            lambda weights: system.compute_copy(weights, dtype),
            out_shardings=Weights(self.policy_sharding, whole),
        )
        self.sample = jax.jit(sample, out_shardings=by_row)
        by_little = partial(jax.jit, out_shardings=by_row, compiler_options=little_effort)
        self.jitted = {
            "condition": by_little(system.condition),
            "codes": jax.jit(system.codes, out_shardings=by_row),
            "decode": by_little(system.decode),
        }
        self.gather_scorers = jax.jit(lambda scorers: scorers, out_shardings=whole)
        self.reward = by_little(reward)
        self.kl = jax.jit(kl, out_shardings=by_row)

    # --- the stages of a rollout, each with the frozen parts that it needs ---

    def condition(self, frozen: Mapping[str, Tree], text: Text) -> Tree:
        """As `MusicSystem.condition`."""
        return self.jitted["condition"](self.used(frozen, "condition"), text)

    def codes(self, frozen: Mapping[str, Tree], tokens: jax.Array, keys: jax.Array) -> Tree:
        """As `MusicSystem.codes`."""
        return self.jitted["codes"](self.used(frozen, "codes"), tokens, keys)

    def decode(self, frozen: Mapping[str, Tree], codes: Tree) -> jax.Array:
        """As `MusicSystem.decode`."""
        return self.jitted["decode"](self.used(frozen, "decode"), codes)

    def used(self, frozen: Mapping[str, Tree], function: str) -> dict[str, Tree]:
        """Returns the frozen parts that a function of the system needs."""
        return {name: frozen[name] for name in self.system.USES[function]}

    # --- whole batches ---

    def place(self, policy: Tree, frozen: Mapping[str, Tree]) -> Weights:
        """Returns weights from the host as they are sampled with, on the devices."""
        whole = sharding.replicated(self.mesh)
        weights = Weights(policy, dict(frozen))
        return self.compute_copy(sharding.put(weights, jax.tree.map(lambda _: whole, weights)))

    def put(self, rows: Any) -> Any:
        """Returns arrays [B, ...], the same on every host, sharded by row."""
        leaves, shape = jax.tree.flatten(rows)
        batch = {str(i): np.asarray(leaf) for i, leaf in enumerate(leaves)}
        return jax.tree.unflatten(shape, list(sharding.put_batch(self.mesh, batch).values()))

    def draw(
        self,
        weights: Weights,
        prompts: Sequence[str],
        seed: int,
        step: int,
        stream: Stream,
        first_row: int = 0,
    ) -> Rollout:
        """Draws a clip for each of B prompts.

        Args:
          weights: what `place` or `compute_copy` returned.
          prompts: B texts, the same on every host.
          seed, step, stream: of the keys.
          first_row: number of the first clip in its step.
        """
        keys = self.keys(np.int32(seed), np.int32(step), np.int32(stream), np.uint32(first_row))
        return roll_out(self, weights, self.put(self.system.read(prompts)), keys)

    def score(
        self,
        scorers: Mapping[str, Tree],
        rollout: Rollout,
        prompts: Sequence[str],
        units: Units,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns (the reward f32 [B], each term f32 [B]) of clips.

        Args:
          scorers: the mixture's variables, on the devices.
          rollout: what `draw` returned for
          prompts: B texts.
          units: centre and spread of each term.
        """
        texts = self.put(self.mixture.read(prompts))
        return self.reward(self.gather_scorers(scorers), rollout, texts, units)

    def draw_by_seed(
        self,
        weights: Weights,
        text: Text,
        seeds: np.ndarray,
        candidates: np.ndarray,
        temperatures: np.ndarray,
        beginning: Beginning,
    ) -> Rollout:
        """Draws clips by their own numbers, as generate and the service do.

        Args:
          weights: what `place` returned.
          text: what the system read of B prompts.
          seeds, candidates: uint32 [B]; clips of one prompt and seed differ by the candidate.
          temperatures: f32 [B].
          beginning: of each clip.
        """
        text, numbers, beginning = self.put((text, (seeds, candidates, temperatures), beginning))
        keys = _keys_by_seed(numbers[0], numbers[1])
        return roll_out(self, weights, text, keys, numbers[2], beginning)


def keys_by_seed(seeds: jax.Array, candidates: jax.Array) -> jax.Array:
    """Returns a key for each clip, [B], from its seed and the candidate's number, uint32 [B]."""

    def key(seed: jax.Array, candidate: jax.Array) -> jax.Array:
        return jax.random.fold_in(step_key(seed, 0, Stream.GENERATION), candidate)

    return jax.vmap(key)(seeds, candidates)


_keys_by_seed = jax.jit(keys_by_seed)
