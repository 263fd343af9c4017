"""Clips that wait for the device, and the thread that draws them, a batch at a time.

Legend: R rows of a batch, F frames of a clip, K tokens in a frame, C channels, N samples.
"""

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

from musicrl_jax.serving.bundle import Bundle

Told = Callable[[int, float], None]  # of a batch: its clips, and the seconds that it took


class Full(Exception):
    """As many clips wait as may.

    Attributes:
      retry_after: seconds until there is room again, by the pace so far.
    """

    def __init__(self, retry_after: float):
        super().__init__(f"too many clips wait; room is expected in {retry_after:.0f} s")
        self.retry_after = retry_after


class Closed(Exception):
    """No more clips are taken: the service stops."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A row of a batch.

    Attributes:
      text: of one prompt, an array or a pytree of them, as `Bundle.encode` reads it.
      seed, candidate: as in `Bundle.draw`.
      temperature: of the policy.
      given: int32 [F, K], how the clip begins, or None.
      given_frames: so many frames of it.
      scored: whether its rewards are wanted.
    """

    text: Any
    seed: int
    candidate: int
    temperature: float
    given: np.ndarray | None = None
    given_frames: int = 0
    scored: bool = False


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What became of a row: tokens int32 [F, K], wav f32 [N] or [C, N], and its rewards, if they were wanted."""

    tokens: np.ndarray
    wav: np.ndarray
    scores: dict[str, float]


class Batcher:
    """Takes single clips and draws them together.

    Every batch has R rows, filled up where fewer wait: the compiled function is then one and the same, and a clip does
    not depend on how many were drawn with it.
    """

    def __init__(
        self,
        bundle: Bundle,
        rows: int,
        window_seconds: float,
        most_waiting: int,
        told: Told = lambda rows, seconds: None,
    ):
        """Args:
        bundle: what draws.
        rows: R.
        window_seconds: how long the first that waits waits for others.
        most_waiting: clips, beyond those that are being drawn.
        told: is called after each batch but the first, which compiles.
        """
        self._bundle, self._rows, self._window, self._most, self._told = (
            bundle,
            rows,
            window_seconds,
            most_waiting,
            told,
        )
        self._waiting: deque[tuple[Wanted, Future[Drawn]]] = deque()
        self._news = threading.Condition()
        self._closed = self._compiled = False
        self._seconds = 1.0  # that a batch takes, until one was drawn
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Clips that wait, and are still wanted."""
        with self._news:
            return sum(not future.cancelled() for _, future in self._waiting)

    def submit(self, *wanted: Wanted, begun: bool = False) -> list["Future[Drawn]"]:
        """All of them or none; cancelling a future takes its clip out of the queue. Full or Closed where it cannot.

        What goes on from clips that were drawn already (`begun`) is never refused, and is drawn next.
        """
        with self._news:
            if self._closed:
                raise Closed("the service stops")
            self._waiting = deque(each for each in self._waiting if not each[1].cancelled())
            over = len(self._waiting) + len(wanted) - self._most
            if over > 0 and not begun:
                raise Full(max(1.0, self._seconds * -(-over // self._rows)))
            futures = [Future() for _ in wanted]
            new = list(zip(wanted, futures, strict=True))
            if begun:
                self._waiting.extendleft(reversed(new))
            else:
                self._waiting.extend(new)
            self._news.notify_all()
        return futures

    def close(self) -> None:
        """Takes no more, and returns when all that waited is drawn."""
        with self._news:
            self._closed = True
            self._news.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next():
            start = time.monotonic()
            try:
                drawn = self._draw([wanted for wanted, _ in batch])
            except Exception as error:  # whoever waits for it must hear of it
                for _, future in batch:
                    future.set_exception(error)
                continue
            seconds = time.monotonic() - start
            if self._compiled:  # the first batch says nothing of the pace
                self._seconds = seconds
                self._told(len(batch), seconds)
            self._compiled = True
            for (_, future), found in zip(batch, drawn, strict=True):
                if isinstance(found, Exception):
                    future.set_exception(found)
                else:
                    future.set_result(found)

    def _next(self) -> list[tuple[Wanted, "Future[Drawn]"]]:
        """The next batch; [] once closed and empty."""
        with self._news:
            while True:
                while not self._waiting and not self._closed:
                    self._news.wait()
                until = time.monotonic() + self._window
                while (
                    len(self._waiting) < self._rows
                    and not self._closed
                    and (left := until - time.monotonic()) > 0
                ):
                    self._news.wait(left)
                batch = []
                while self._waiting and len(batch) < self._rows:
                    wanted, future = self._waiting.popleft()
                    if future.set_running_or_notify_cancel():
                        batch.append((wanted, future))
                if batch or (self._closed and not self._waiting):
                    return batch

    def _draw(self, batch: list[Wanted]) -> list[Drawn | FloatingPointError]:
        """Each row's clip, in [-1, 1], or what is wrong with that row alone."""
        found = draw(self._bundle, batch, self._rows)
        return [
            each
            if isinstance(each, Exception)
            else dataclasses.replace(each, wav=np.clip(each.wav, -1.0, 1.0))
            for each in found
        ]


def draw(bundle: Bundle, batch: Sequence[Wanted], rows: int) -> list[Drawn | FloatingPointError]:
    """Draws a batch that is filled up to `rows`; returns each row's clip, or what is wrong with that row alone.

    Args:
      bundle: what draws: a bundle, or what has its `about`, `draw` and `score`.
      batch: from 1 to `rows` rows.
      rows: R.
    """
    about = bundle.about
    filled = [*batch, *[batch[0]] * (rows - len(batch))]
    nothing = np.zeros((about["frames"], about["places"]), np.int32)
    clips = bundle.draw(
        jax.tree.map(lambda *texts: np.stack(texts), *[row.text for row in filled]),
        [row.seed for row in filled],
        [row.candidate for row in filled],
        [row.temperature for row in filled],
        np.stack([nothing if row.given is None else row.given for row in filled]),
        [row.given_frames for row in filled],
    )
    scores = bundle.score(clips) if any(row.scored for row in batch) else {}
    scores = {name: np.asarray(score) for name, score in scores.items()}
    tokens, wavs = np.asarray(clips.tokens), np.asarray(clips.wav)
    results: list[Drawn | FloatingPointError] = []
    for i, row in enumerate(batch):
        rewards = {name: float(score[i]) for name, score in scores.items()} if row.scored else {}
        if np.isfinite(wavs[i]).all() and np.isfinite(list(rewards.values())).all():
            results.append(Drawn(tokens[i], wavs[i], rewards))
        else:
            results.append(
                FloatingPointError(
                    "the clip, or a reward of it, has numbers that are not finite: try another seed; a checkpoint that "
                    "does so often is to be trained again"
                )
            )
    return results
