"""Draws clips of several policies for the same prompts, and measures them.

Legend: P prompts, S clips (seeds) of a prompt, B clips of a batch, T tokens of a clip, C channels,
N samples, F frames of the features, D their width, M measurements by listeners.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from musicrl_jax.arena.audience import LoadedAudience
from musicrl_jax.arena.figures import Arrays
from musicrl_jax.core import checkpoint, hosts, sharding
from musicrl_jax.core.keys import Stream
from musicrl_jax.core.progress import Progress
from musicrl_jax.inputs.clips import Clips
from musicrl_jax.systems.folder import LoadedSystem
from musicrl_jax.systems.player import LITTLE_EFFORT, Player, Scorer
from musicrl_jax.systems.system import MusicSystem, Rollout, Sampling, Tree, Weights

FIRST_SEED_ONLY = "heard", "features"  # arrays of one clip for each prompt
Total = Callable[[Arrays], np.ndarray]  # the terms of clips, f32 [...] by name -> rewards [...]


class Features(Protocol):
    """Features by which sets of clips are compared; a frozen dataclass."""

    def load(self) -> checkpoint.Model:
        """Returns the model that computes them."""

    def features(self, model: Any, variables: Tree, wav: jax.Array) -> jax.Array:
        """Returns f32 [B, F, D] of f32 [B, N]; `model` is the config. Traced under jit."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Settings of a comparison.

    Attributes:
      clip_seconds: length of the clips, as in training.
      sampling: the distribution of the policies, as in training.
      count: P, held-out prompts, or all if there are fewer.
      seeds: S, clips of each prompt and system.
      batch_size: B, clips at a time, rounded up to a multiple of the devices.
      seed: of the sampling and the raters, with other random streams than training.
      raters: R, listeners that rate the clips of a prompt and seed; others for each.
      best_of: if above 1, adds an entry for best-of-n: of n clips of the base, the one with the
        highest reward.
    """

    clip_seconds: float
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    count: int = 64
    seeds: int = 1
    batch_size: int = dataclasses.field(default=32, metadata=checkpoint.NO_IDENTITY)
    seed: int = 0
    raters: int = 3
    best_of: int = 1

    def __post_init__(self) -> None:
        for name in ("count", "seeds", "batch_size", "raters", "best_of"):
            if getattr(self, name) < 1:
                raise ValueError(f"EvaluationConfig.{name}={getattr(self, name)} must be 1 or more")
        if self.seed < 0:
            raise ValueError(f"EvaluationConfig.seed={self.seed} must be 0 or more")


class Bench:
    """Draws clips of each policy for the same prompts with the same noise, and measures them.

    Attributes:
      mesh: all devices of all hosts, over which rows are sharded.
      system: draws the clips.
      prompts: P of them.
    """

    def __init__(
        self,
        base: LoadedSystem,
        scorer: Scorer,
        features: Features,
        encoder: checkpoint.Model,
        audience: LoadedAudience | None,
        prompts: Sequence[str],
        config: EvaluationConfig,
    ):
        mesh = self.mesh = sharding.make_mesh()
        platform = mesh.devices.flat[0].platform
        self.system: MusicSystem = base.system.tuned(platform)
        self.prompts, self._config = prompts, config
        self._frozen, self._audience = base.frozen, audience

        # The jitted functions.
        rows = sharding.round_up_rows(mesh, config.batch_size)
        settings = config.clip_seconds, config.sampling
        self._player = Player(self.system, mesh, rows, *settings, mixture=scorer)
        self._features = jax.jit(
            functools.partial(features.features, encoder.config),
            out_shardings=sharding.batch_sharding(mesh),
            compiler_options=LITTLE_EFFORT.get(platform),
        )

        # Their weights. The KL is measured to the base.
        variables = scorer.variables, encoder.variables
        self._scorers, self._encoder = sharding.put(variables, sharding.spread(mesh, variables))
        self._anchor = self._place(base.policy).policy

    # --- whole sets of clips ---

    def play(
        self, name: str, policy: Tree, draws: Sequence[int] = (0,), total: Total | None = None
    ) -> Arrays:
        """Draws and measures clips of all prompts and seeds.

        Args:
          name: of the system, for the progress bar.
          policy: its weights.
          draws: numbers of the clips to draw; of several, the one with the highest reward counts.
          total: the reward of clips, for several draws.

        Returns:
          Arrays [P, S, ...]; of the first seed only, 'heard', the clips, int16 [P, N], and
          'features', [P, F, D].
        """
        # Clips are numbered seed by seed.
        weights, rows = self._place(policy), self._player.rows
        count, clips = len(self.prompts), len(self.prompts) * self._config.seeds
        parts = []
        for first in Progress(range(0, clips, rows), name, -(-clips // rows)):
            # Lazily: only two candidates' arrays are in memory at a time.
            candidates = (self._measure(weights, first, draw) for draw in draws)
            part = functools.reduce(functools.partial(_better, total), candidates)
            wav = part.pop("wav")
            if self._audience is not None:
                part["measured"] = self._listen(wav, self._texts(first))
            part["heard"] = np.rint(np.clip(wav, -1, 1) * 32767).astype(np.int16)
            if first >= count:
                part = {key: part[key] for key in part if key not in FIRST_SEED_ONLY}
            parts.append(part)

        # Seed by seed -> prompt by prompt.
        joined = {}
        for key in parts[0]:
            array = np.concatenate([part[key] for part in parts if key in part])
            if key in FIRST_SEED_ONLY:
                joined[key] = array[:count]
            else:
                array = array[:clips].reshape(self._config.seeds, count, *array.shape[1:])
                # A view would sum in another order than the arrays that a resumed run reads.
                joined[key] = np.ascontiguousarray(array.swapaxes(0, 1))
        return joined

    def measure_real(self, clips: Clips) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns features of the real test clips, [clips, F, D], and measurements of the first P.

        Those are f64 [P, M]; None without listeners.
        """
        rows, count, parts, measured = self._player.rows, len(self.prompts), [], []
        # Listeners compare a clip with its caption.
        captioned = dataclasses.replace(clips, with_captions=True)
        for batch in captioned.batches("test", rows, seed=0, epochs=1):
            hosts.stop_point()
            size = len(batch["audio"])
            wav = np.resize(batch["audio"], (rows, batch["audio"].shape[1]))  # repeats the clips
            features = self._features(self._encoder, self._player.put(wav))
            if self._audience is not None and len(parts) * rows < count:
                measured.append(self._listen(wav, np.resize(batch["caption"], rows))[:size])
            parts.append(sharding.fetch(features)[:size])
        return np.concatenate(parts), np.concatenate(measured)[:count] if measured else None

    def first_clips(self, policy: Tree, chosen: Iterable[int]) -> dict[int, np.ndarray]:
        """Draws the first clips of some prompts, f32 [N] by the prompt's number."""
        weights, rows, wavs = self._place(policy), self._player.rows, {}
        for first in sorted({row // rows * rows for row in chosen}):
            wav = sharding.fetch(self._draw(weights, first, 0).mono)
            wavs |= {row: wav[row - first] for row in chosen if first <= row < first + rows}
        return wavs

    # --- a batch ---

    def _place(self, policy: Tree) -> Weights:
        return self._player.place(policy, self._frozen)

    def _texts(self, first: int) -> list[str]:
        """Returns the prompts of a batch; they repeat for each seed and to fill the last batch."""
        numbers = range(first, first + self._player.rows)
        return [self.prompts[number % len(self.prompts)] for number in numbers]

    def _draw(self, weights: Weights, first: int, draw: int) -> Rollout:
        seed, texts = self._config.seed, self._texts(first)
        return self._player.draw(weights, texts, seed, draw, Stream.EVALUATION, first)

    def _measure(self, weights: Weights, first: int, draw: int) -> Arrays:
        """Draws a batch and returns its clips, f32 [B, N], with all measurements by the devices."""
        rollout = self._draw(weights, first, draw)
        neutral = dict.fromkeys(self._scorers, (0.0, 1.0))
        scores = self._player.score(self._scorers, rollout, self._texts(first), neutral)[1]
        kl = self._player.kl(weights.policy, self._anchor, rollout)
        features = self._features(self._encoder, rollout.mono)
        arrays = sharding.fetch({"wav": rollout.mono, **scores, "kl": kl, "features": features})
        return arrays | _kl_figures(arrays["kl"], self.system)

    def _listen(self, wav: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """Returns the listeners' measurements, f64 [B, M]; each host does its own rows."""
        own = sharding.own_rows(self.mesh, len(wav))
        measured = self._audience.measure(wav[own], [texts[row] for row in own])
        return sharding.gather_rows(self.mesh, measured, len(wav))


def _kl_figures(kl: np.ndarray, system: MusicSystem) -> Arrays:
    """Returns sums of KL f32 [B, T]: by clip, by token of a frame, by second."""
    frames = kl.reshape(len(kl), -1, system.frame_tokens)
    # A frame belongs to the second in which it starts; 1e-6 absorbs rounding.
    seconds = (np.arange(frames.shape[1]) * system.frame_seconds + 1e-6).astype(int)
    by_second = [frames[:, seconds == n].sum(axis=(1, 2)) for n in range(seconds[-1] + 1)]
    return {
        "kl": kl.sum(axis=1),
        "kl_by_level": frames.sum(axis=1),
        "kl_by_second": np.stack(by_second, axis=1),
    }


def _better(total: Total, one: Arrays, other: Arrays) -> Arrays:
    """Returns, clip by clip, the one with the higher reward."""
    wins = total(other) > total(one)
    better = {}
    for name, array in one.items():
        better[name] = np.where(wins.reshape(-1, *[1] * (array.ndim - 1)), other[name], array)
    return better
