"""Text-to-music systems from Python: load one, generate clips, score them.

Legend: B clips, C channels, N samples.
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from musicrl_jax import generate as verb
from musicrl_jax.core import sharding
from musicrl_jax.rl.rewards import LoadedMixture, Mixture
from musicrl_jax.serving import batcher, bundle
from musicrl_jax.serving.composition import NEXT_WINDOW, Piece
from musicrl_jax.systems import folder as folders
from musicrl_jax.systems.folder import LoadedSystem
from musicrl_jax.systems.player import Player
from musicrl_jax.systems.system import Beginning, Rollout, Sampling


def load(folder: str, top_k: int | None = None) -> "System":
    """Loads a system or a bundle onto the devices.

    Args:
      folder: of a system, base or finetuned, or of a bundle.
      top_k: see `systems.system.Sampling`; by default none, or the bundle's own.

    Raises:
      ValueError: parts of the system do not belong together, or a bundle has another top_k.
      FileNotFoundError: a model is missing.
    """
    sharding.reserve_threads()
    return System(folder, top_k)


class System:
    """A system or a bundle that plays.

    Attributes:
      folder: where it was loaded from.
      sample_rate_hz: sample rate of its clips.
      clip_seconds: length of the clips that it was trained on or exported for.
    """

    def __init__(self, folder: str, top_k: int | None = None):
        self.folder = str(folder)
        self._player, self._rows = verb._player(self.folder, top_k)
        self.sample_rate_hz: int = self._player.manifest["sample_rate_hz"]
        self.clip_seconds: float = self._player.manifest["clip_seconds"]
        self._scorer: tuple[Mixture, LoadedMixture, Player] | None = None

    def __repr__(self) -> str:
        return f"System({self.folder!r}, {self.sample_rate_hz} Hz, {self.clip_seconds:g} s)"

    @functools.cached_property
    def loaded(self) -> LoadedSystem:
        """The model with its weights on the host; ValueError for a bundle, which has none."""
        if bundle.is_one(self.folder):
            raise ValueError(f"{self.folder} is a bundle: load the folder of the system itself")
        return folders.load(self.folder)

    def generate(
        self,
        prompts: str | Sequence[str],
        seed: int = 0,
        clip_seconds: float | None = None,
        temperature: float | None = None,
        candidates: int = 1,
    ) -> np.ndarray:
        """Generates a clip for each prompt.

        A clip is the one that `musicrl generate` writes for the same prompt, seed and settings,
        before its loudness is set.

        Args:
          prompts: B texts, or one.
          seed: of the sampling, from 0 to 2**32 - 1.
          clip_seconds: length; by default `clip_seconds` of the system. A longer clip is drawn in
            windows.
          temperature: of the policy; by default 0.99, or the bundle's own.
          candidates: clips to choose the one of the best reward from; more than 1 needs a bundle
            with rewards.

        Returns:
          f32 [B, C, N], in about [-1, 1].

        Raises:
          ValueError: a prompt is empty, a setting is out of range, or samples are not finite.
        """
        # Check the settings, as the verb does.
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        manifest = self._player.manifest
        seed = int(bundle.whole("seed", seed))
        candidates = int(bundle.whole("candidates", candidates, NEXT_WINDOW - 1))
        if candidates < 1 or (candidates > 1 and not manifest["rewards"]):
            raise ValueError(
                f"candidates={candidates} must be 1, or more for a bundle with rewards: `musicrl "
                "export` the system with rewards, and load the bundle"
            )
        seconds = verb._seconds(clip_seconds, manifest)
        temperature = manifest["temperature"] if temperature is None else temperature
        temperature = Sampling(temperature).temperature  # raises ValueError if it is not above 0

        # Draw as many prompts at a time as fill a batch.
        texts = self._player.encode(prompts)
        clips = []
        size = max(1, self._rows // candidates)
        for start in range(0, len(prompts), size):
            pieces = []
            for text in texts[start : start + size]:
                pieces.append(Piece(manifest, text, seed, seconds, temperature, candidates))
            self._draw(pieces)
            clips += [np.atleast_2d(piece.best()[0]) for piece in pieces]
        return np.stack(clips)

    def _draw(self, pieces: Sequence[Piece]) -> None:
        """Draws all windows of pieces of one length; ValueError if samples are not finite."""
        # Each window continues the one before.
        while window := list(itertools.chain.from_iterable(piece.rows() for piece in pieces)):
            results = []
            for start in range(0, len(window), self._rows):
                rows = window[start : start + self._rows]
                results += batcher.draw(self._player, rows, self._rows)
            if any(isinstance(result, FloatingPointError) for result in results):
                raise ValueError(
                    f"{self.folder} draws samples, or rewards, that are not finite: train its "
                    "decoder again, with a lower Optimiser.learning_rate"
                )
            count = len(window) // len(pieces)
            for number, piece in enumerate(pieces):
                piece.add(results[number * count : (number + 1) * count])

    def rollout(self, prompts: Sequence[str], seed: int = 0) -> Rollout:
        """Draws a whole clip for each prompt, with its tokens and all else that rewards read.

        `wav` is what `generate` returns by default, to a float's rounding.

        Raises ValueError for a bundle, which holds no model code, and for an empty prompt.
        """
        # All devices draw the same number of rows: the last prompt fills them up.
        system, player = self.loaded.system, self._player._player
        rows = _filled(len(prompts), player.mesh)
        text = system.read([prompts[row] for row in rows])
        # The arguments of `generate`, with no beginning.
        seeds, first = np.full(len(rows), seed, np.uint32), np.zeros(len(rows), np.uint32)
        temperatures = np.full(len(rows), self._player.manifest["temperature"], np.float32)
        empty = np.zeros((len(rows), system.length(self.clip_seconds)), np.int32)
        beginning = Beginning(empty, np.zeros(len(rows), np.int32))
        # The rows of the prompts alone.
        with jax.set_mesh(player.mesh):
            rollout = player.draw_by_seed(
                self._player._weights, text, seeds, first, temperatures, beginning
            )
        return _take(rollout, np.arange(len(prompts)))

    def score(
        self, prompts: Sequence[str], clips: np.ndarray | Rollout, rewards: Mixture
    ) -> dict[str, np.ndarray]:
        """Returns the scores of clips by rewards.

        Args:
          prompts: B texts.
          clips: waveforms, f32 [B, C, N], or what `rollout` returned. A reward that reads tokens
            needs the latter.
          rewards: the terms and their weights; terms are not normalised.

        Returns:
          f32 [B] by name: the score of each term, and their weighted sum as 'reward'.

        Raises:
          ValueError: for a bundle, rewards of another system, normalised rewards, or a reward that
            reads tokens, of waveforms.
        """
        # The rewards' models and jitted functions stay for the next call with the same rewards.
        if rewards.normalise:
            raise ValueError("Mixture.normalise=True needs clips of a base: set it to False")
        if self._scorer is None or self._scorer[0] != rewards:
            mixture = rewards.load()
            mixture.check_models(self.loaded)
            system, mesh = self.loaded.system, self._player._player.mesh
            settings = system, mesh, self._rows, self.clip_seconds, Sampling()
            self._scorer = rewards, mixture, Player(*settings, mixture=mixture)
        _, mixture, player = self._scorer

        # Every device scores the same number of rows; the last clip fills them up.
        rows = _filled(len(prompts), player.mesh)
        texts = [prompts[row] for row in rows]
        with jax.set_mesh(player.mesh):
            if isinstance(clips, Rollout):
                rollout = _take(clips, rows)
            else:
                wav = player.put(_waveforms(clips, len(prompts))[rows])
                text = player.put(player.system.read(texts))
                condition = player.condition(self._player._weights.frozen, text)
                rollout = Rollout(condition, None, None, wav)
            try:
                total, terms = player.score(
                    mixture.variables, rollout, texts, dict.fromkeys(mixture.names, (0.0, 1.0))
                )
            except AttributeError as error:
                if rollout.sampled is None:
                    raise ValueError(
                        "a reward reads tokens, which waveforms have not: score what `rollout` "
                        "returns"
                    ) from error
                raise
        scores = sharding.fetch({**terms, "reward": total})
        return {name: score[: len(prompts)] for name, score in scores.items()}


@jax.jit
def _take(rollout: Rollout, rows: np.ndarray) -> Rollout:
    """Returns the given rows of a rollout, by one program instead of several for each array."""
    return jax.tree.map(lambda leaf: leaf[rows], rollout)


def _filled(count: int, mesh: Mesh) -> np.ndarray:
    """Returns the numbers of `count` rows, the last one repeated until all devices have as many."""
    return np.minimum(np.arange(-(-count // mesh.size) * mesh.size), count - 1)


def _waveforms(clips: np.ndarray, count: int) -> np.ndarray:
    """Returns `count` waveforms f32 [B, C, N]; ValueError if they are not."""
    wav = np.asarray(clips, np.float32)
    if wav.ndim != 3 or len(wav) != count:
        raise ValueError(f"clips has shape {wav.shape} and must be [{count}, channels, samples]")
    return wav
