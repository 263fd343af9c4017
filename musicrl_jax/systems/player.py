"""Samples and scores clips with any system on a mesh, where each device computes its own rows.

Legend: B clips, S tokens of a clip.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from musicrl_jax.core import hosts, sharding
from musicrl_jax.core.keys import Stream, row_keys, step_key
from musicrl_jax.systems.sampling import Beginning, SampledTokens, Sampling
from musicrl_jax.systems.system import MusicSystem, Rollout, Text, Tree, Weights

# XLA's effort O1, by platform, for conditions, decoders and rewards. Compiling them for a TPU takes
# a quarter of the time or less, and a step of seconds 0.05 to 0.09 s more. Loops of thousands of
# small steps, as in sampling, would run several times slower.
LITTLE_EFFORT = {"tpu": {"optimization_level": 19}}

Units = Mapping[str, tuple[float, float]]  # centre and spread of each reward term


# --- the jitted functions ---


class Scorer(Protocol):
    """A mixture of rewards with its models; `rl.rewards.LoadedMixture` is one."""

    variables: Mapping[str, Tree]

    def read(self, prompts: Sequence[str]) -> Mapping[str, Text]:
        """Reads the prompts on the host, for each term in its own way."""

    def score(
        self, variables: Mapping[str, Tree], rollout: Rollout, texts: Mapping[str, Text]
    ) -> dict[str, jax.Array]:
        """Returns the scores of each term, f32 [B]; traced under jit."""

    def total(self, scores: Mapping[str, jax.Array], units: Units) -> jax.Array:
        """Returns the mixture, f32 [B]; traced under jit."""


class Player:
    """The jitted functions that sample and score clips of one system.

    Each network is a function of its own. One function of all networks would need 5 GiB more on a
    v5e while it samples, would be compiled with one effort, and would not be faster.

    Attributes:
      system: the system, tuned for the mesh's platform.
      mesh: devices over which rows are sharded.
      rows: B of every batch.
      mixture: the rewards; None if clips are not scored.
      length: S of every clip.
      jitted: the system's functions that take frozen parts, by name; see `MusicSystem.USES`.
      compute_copy: all-gathers weights before sampling. Otherwise each of the thousands of steps of
        sampling would all-gather them.
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

        Raises ValueError if the devices cannot share the rows evenly, or if the clip is not a whole
        number of frames.
        """
        sharding.rows_a_shard(mesh, rows)
        self.system, self.mesh, self.rows, self.mixture = system, mesh, rows, mixture
        length = system.length(clip_seconds)

        # Results are sharded by row, weights over the tensor axis alone.
        by_row, replicated = sharding.batch_sharding(mesh), sharding.replicated(mesh)
        effort = LITTLE_EFFORT.get(mesh.devices.flat[0].platform)
        jit = functools.partial(jax.jit, out_shardings=by_row)
        jit_with_little_effort = functools.partial(jit, compiler_options=effort)

        def init_policy(key: jax.Array) -> Tree:
            return system.compute_copy(Weights(system.init(key), {}), dtype).policy

        key, rules = jax.eval_shape(lambda: jax.random.key(0)), sharding.SAMPLING_RULES
        self.policy_sharding = sharding.shapes_and_shardings(mesh, init_policy, key, rules=rules)[1]
        self.compute_copy = jax.jit(
            lambda weights: system.compute_copy(weights, dtype),
            out_shardings=Weights(self.policy_sharding, replicated),
        )
        self.gather_scorers = jax.jit(lambda scorers: scorers, out_shardings=replicated)

        # Sampling.
        def sample(
            policy: Tree,
            condition: Tree,
            keys: jax.Array,
            temperatures: jax.Array | None = None,
            beginning: Beginning | None = None,
        ) -> SampledTokens:
            # Clips share the player's temperature, or have one each.
            by_clip = sampling
            if temperatures is not None:
                by_clip = Sampling(temperatures[:, None], sampling.top_k)
            return system.sample(policy, condition, keys, length, by_clip, beginning)

        # A chunk of streamed clips.
        def stream(
            weights: Weights,
            state: Tree,
            keys: jax.Array,
            temperatures: jax.Array,
            first: jax.Array,
            frames: int,
        ) -> tuple[jax.Array, jax.Array, Tree]:
            by_clip = Sampling(temperatures[:, None], sampling.top_k)
            return system.stream(weights, state, keys, (first, frames), length, by_clip)

        self.length, self.sample = length, jit(sample)
        self.start_stream = jit(
            lambda policy, condition: system.start_stream(policy, condition, length)
        )
        self.stream = jit(stream, static_argnums=5)
        self.keys = jit(
            lambda seed, step, stream, first: row_keys(step_key(seed, step, stream), rows, first)
        )
        self.jitted = {
            "condition": jit_with_little_effort(system.condition),
            "codes": jit(system.codes),
            "decode": jit_with_little_effort(system.decode),
        }

        # Scoring.
        def reward(
            scorers: Mapping[str, Tree], rollout: Rollout, texts: Mapping[str, Text], units: Units
        ) -> tuple[jax.Array, dict[str, jax.Array]]:
            terms = mixture.score(scorers, rollout, texts)
            return mixture.total(terms, units), terms

        def kl(policy: Tree, other: Tree, rollout: Rollout) -> jax.Array:
            return system.kl(policy, other, rollout.condition, rollout.sampled, sampling)

        self.reward, self.kl = jit_with_little_effort(reward), jit(kl)

    # --- the stages of a rollout, as in MusicSystem ---

    def condition(self, frozen: Mapping[str, Tree], text: Text) -> Tree:
        """Computes `MusicSystem.condition`."""
        return self.jitted["condition"](self.used(frozen, "condition"), text)

    def codes(self, frozen: Mapping[str, Tree], tokens: jax.Array, keys: jax.Array) -> Tree:
        """Computes `MusicSystem.codes`."""
        return self.jitted["codes"](self.used(frozen, "codes"), tokens, keys)

    def decode(self, frozen: Mapping[str, Tree], codes: Tree) -> jax.Array:
        """Computes `MusicSystem.decode`."""
        return self.jitted["decode"](self.used(frozen, "decode"), codes)

    def used(self, frozen: Mapping[str, Tree], function: str) -> dict[str, Tree]:
        """Returns the frozen parts that a function of the system takes."""
        return {name: frozen[name] for name in self.system.USES[function]}

    # --- whole batches ---

    def place(self, policy: Tree, frozen: Mapping[str, Tree]) -> Weights:
        """Puts weights from the host onto the devices, and returns their compute copy."""
        weights, replicated = Weights(policy, dict(frozen)), sharding.replicated(self.mesh)
        return self.compute_copy(sharding.put(weights, jax.tree.map(lambda _: replicated, weights)))

    def put(self, rows: Any) -> Any:
        """Puts arrays [B, ...] onto the mesh; see `put_rows`."""
        return put_rows(self.mesh, rows)

    def draw(
        self,
        weights: Weights,
        prompts: Sequence[str],
        seed: int,
        step: int,
        stream: Stream,
        first_row: int = 0,
    ) -> Rollout:
        """Samples a clip for each of B prompts.

        Args:
          weights: output of `place` or `compute_copy`.
          prompts: B texts, the same on every host.
          seed: seed of the run.
          step: step of the run.
          stream: purpose of the clips.
          first_row: number of the first clip within the step.
        """
        keys = self.keys(np.int32(seed), np.int32(step), np.int32(stream), np.uint32(first_row))
        return roll_out(self, weights, self.put(self.system.read(prompts)), keys)

    def draw_by_seed(
        self,
        weights: Weights,
        text: Text,
        seeds: np.ndarray,
        candidates: np.ndarray,
        temperatures: np.ndarray,
        beginning: Beginning,
    ) -> Rollout:
        """Samples clips with a seed and a temperature each, as `generate` and the service do.

        Args:
          weights: output of `place`.
          text: output of `MusicSystem.read` for B prompts.
          seeds: uint32 [B].
          candidates: uint32 [B], to tell clips of the same prompt and seed apart.
          temperatures: f32 [B].
          beginning: how the clips begin.
        """
        arrays = text, seeds, candidates, temperatures, beginning
        text, seeds, candidates, temperatures, beginning = self.put(arrays)
        keys = _keys_by_seed(seeds, candidates)
        return roll_out(self, weights, text, keys, temperatures, beginning)

    def stream_by_seed(
        self,
        weights: Weights,
        text: Text,
        seeds: np.ndarray,
        candidates: np.ndarray,
        temperatures: np.ndarray,
    ) -> Iterator[tuple[jax.Array, jax.Array]]:
        """Yields the chunks of clips: tokens int32 [B, s] and waveforms f32 [B, C, n].

        The arguments are those of `draw_by_seed`. Raises ValueError if the system cannot stream.
        """
        chunks = self.system.stream_chunks(self.length // self.system.frame_tokens)
        text, seeds, candidates, temperatures = self.put((text, seeds, candidates, temperatures))
        keys = _keys_by_seed(seeds, candidates)
        state = self.start_stream(weights.policy, self.condition(weights.frozen, text))
        first = 0
        for frames in chunks:
            # The next chunk replaces the state.
            position = np.int32(first)
            tokens, wav, state = self.stream(weights, state, keys, temperatures, position, frames)
            yield tokens, wav
            first += frames

    def score(
        self, scorers: Mapping[str, Tree], rollout: Rollout, prompts: Sequence[str], units: Units
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the reward f32 [B] of clips, and each term f32 [B].

        Args:
          scorers: the mixture's variables, on the devices.
          rollout: output of `draw` for the prompts.
          prompts: B texts, the same on every host.
          units: centre and spread of each term.
        """
        texts = self.put(self.mixture.read(prompts))
        return self.reward(self.gather_scorers(scorers), rollout, texts, units)


# --- their parts ---


def roll_out(
    stages: MusicSystem | Player, weights: Weights, text: Text, keys: jax.Array, *sampling: Any
) -> Rollout:
    """Samples a clip for each prompt. A clip depends on its prompt and key alone.

    Args:
      stages: a system to trace, or a player.
      weights: output of `compute_copy`.
      text: output of `MusicSystem.read` for B prompts.
      keys: random keys [B].
      *sampling: the arguments of `stages.sample` after the keys.
    """
    condition = stages.condition(weights.frozen, text)
    sampled = stages.sample(weights.policy, condition, keys, *sampling)
    codes = stages.codes(weights.frozen, sampled.tokens, keys)
    return Rollout(condition, sampled, codes, stages.decode(weights.frozen, codes))


def keys_by_seed(seeds: jax.Array, candidates: jax.Array) -> jax.Array:
    """Returns a key [B] for each clip, from its seed and candidate number, both uint32 [B]."""

    def key(seed: jax.Array, candidate: jax.Array) -> jax.Array:
        return jax.random.fold_in(step_key(seed, 0, Stream.GENERATION), candidate)

    return jax.vmap(key)(seeds, candidates)


_keys_by_seed = jax.jit(keys_by_seed)


def put_rows(mesh: Mesh, rows: Any) -> Any:
    """Puts arrays [B, ...], the same on every host, onto the mesh, sharded by row."""
    _wait_for_all_hosts()
    leaves, structure = jax.tree.flatten(rows)
    batch = {str(number): np.asarray(leaf) for number, leaf in enumerate(leaves)}
    return jax.tree.unflatten(structure, sharding.put_batch(mesh, batch).values())


@functools.cache  # waits once in a process
def _wait_for_all_hosts() -> None:
    """Waits until every host has its first batch.

    Some hosts may load models or libraries for minutes. Gloo fails if a host reaches the first
    collective 30 s after another.
    """
    hosts.wait_for_all("first batch")
