"""Draws clips with a system in place of a bundle.

Legend: B clips, F frames of a clip, K tokens of a frame.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from musicrl_jax.core import checkpoint, sharding
from musicrl_jax.serving.bundle import Clips
from musicrl_jax.systems import folder as folders
from musicrl_jax.systems.player import Player
from musicrl_jax.systems.system import Beginning, Sampling, Text

UNRECORDED_SECONDS = 5.0  # of clips, if a policy does not record what it was trained on; the demo's
TEMPERATURE = 0.99  # of a system; a bundle has its own
# Rows that a device draws at a time, however few are needed: the order of a sum, and so a clip's
# bits, may depend on their number. A CPU takes as long for each; others take little longer for 8.
ROWS = {"cpu": 1, "gpu": 8, "tpu": 8}


class SystemPlayer:
    """A system on all devices of all hosts, with the interface of a `Bundle` that has no rewards.

    Attributes:
      manifest: as `Bundle.manifest`.
      rows: B of each batch.
    """

    def __init__(self, folder: str, top_k: int | None):
        """Reads the system's folder, and places its weights on the devices."""
        loaded = folders.load(folder)
        seconds = loaded.clip_seconds
        if seconds is None:
            seconds = UNRECORDED_SECONDS
            print(
                f"{folder} does not record the length of the clips that it was trained on: "
                f"{seconds:g} s is assumed"
            )
        mesh = sharding.make_mesh()
        self.rows = mesh.size * ROWS[jax.default_backend()]
        sampling = Sampling(TEMPERATURE, top_k)
        self._player = Player(loaded.system, mesh, self.rows, seconds, sampling)
        with jax.set_mesh(mesh):
            self._weights = self._player.place(loaded.policy, loaded.frozen)
        self.manifest: dict[str, Any] = {
            "clip_seconds": seconds,
            "frames": loaded.system.length(seconds) // loaded.system.frame_tokens,
            "places": loaded.system.frame_tokens,
            "sample_rate_hz": loaded.system.sample_rate_hz,
            "temperature": TEMPERATURE,
            "top_k": top_k,
            "rewards": {},
            "sha256": checkpoint.content_hash(loaded.hashes),
        }

    def encode(self, prompts: Sequence[str]) -> list[Text]:
        """Reads prompts, each as a row of its own; ValueError if one is empty."""
        text = self._player.system.read(prompts)
        return [{name: array[row] for name, array in text.items()} for row in range(len(prompts))]

    @property
    def streams(self) -> bool:
        """Whether the system can draw a clip in chunks."""
        return self._player.system.STREAM_FRAMES > 0

    def stream(self, text: Text, seed: int, temperature: float) -> Iterator[Clips]:
        """Yields the chunks of a clip as `Bundle.stream` does; on one host alone."""
        # The rows of a batch are copies of one clip.
        rows = jax.tree.map(lambda array: np.repeat(array[None], self.rows, axis=0), text)
        seeds, temperatures = np.full(self.rows, seed, np.uint32), np.float32(temperature)
        chunks = self._player.stream_by_seed(
            self._weights,
            rows,
            seeds,
            np.zeros_like(seeds),
            np.full(self.rows, temperatures),
        )
        while True:
            # The mesh is set for a chunk alone: other code runs between two.
            with jax.set_mesh(self._player.mesh):
                chunk = next(chunks, None)
            if chunk is None:
                return
            tokens, wav = sharding.fetch(chunk)
            tokens = tokens[:1].reshape(1, -1, self.manifest["places"])
            yield Clips(tokens, wav[:1, 0] if wav.shape[1] == 1 else wav[:1], {})

    def draw(
        self,
        text: Text,
        seeds: Sequence[int],
        candidates: Sequence[int],
        temperatures: Sequence[float],
        beginnings: np.ndarray,
        beginning_frames: Sequence[int],
    ) -> Clips:
        """Draws clips as `Bundle.draw` does, on all hosts together."""
        length = np.asarray(beginning_frames, np.int32) * self.manifest["places"]
        start = Beginning(beginnings.reshape(len(beginnings), -1).astype(np.int32), length)
        with jax.set_mesh(self._player.mesh):
            rollout = self._player.draw_by_seed(
                self._weights,
                text,
                np.asarray(seeds, np.uint32),
                np.asarray(candidates, np.uint32),
                np.asarray(temperatures, np.float32),
                start,
            )
            tokens, wav = sharding.fetch((rollout.sampled.tokens, rollout.wav))
        wav = wav[:, 0] if wav.shape[1] == 1 else wav
        return Clips(tokens.reshape(beginnings.shape), wav, {})
