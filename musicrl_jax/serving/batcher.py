"""Queues clips for the device, and draws them in batches on a thread.

Legend: R rows of a batch, F frames of a clip, K tokens in a frame, C channels, N samples.
"""

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

from musicrl_jax.serving.bundle import Bundle

NOT_FINITE = (
    "the clip, or a reward of it, has numbers that are not finite: try another seed; if this "
    "happens often, train the model again"
)


class Full(Exception):
    """Raised when the queue is full.

    Attributes:
      retry_after: expected seconds until there is room.
    """

    def __init__(self, retry_after: float):
        super().__init__(f"too many clips wait; room is expected in {retry_after:.0f} s")
        self.retry_after = retry_after


class Closed(Exception):
    """Raised when the service stops and takes no more clips."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A clip to draw: one row of a batch.

    Attributes:
      text: the prompt as `Bundle.encode` reads it, an array or a pytree.
      seed, candidate: as in `Bundle.draw`.
      temperature: of the policy.
      beginning: int32 [F, K], tokens that the clip begins with, or None.
      beginning_frames: number of frames of `beginning` to use.
      scored: whether to compute its rewards.
    """

    text: Any
    seed: int
    candidate: int
    temperature: float
    beginning: np.ndarray | None = None
    beginning_frames: int = 0
    scored: bool = False


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip: tokens int32 [F, K], wav f32 [N] or [C, N], and its rewards if it was scored."""

    tokens: np.ndarray
    wav: np.ndarray
    scores: dict[str, float]


class Stream:
    """A clip that is drawn part by part. It has a place in the queue until it is closed."""

    def __init__(self, batcher: "Batcher", parts: Iterator[bytes]):
        """Stores the arguments of `Batcher.stream`."""
        self._batcher, self._parts = batcher, parts
        self._begun, self._pending = False, None

    def next(self) -> "Future[bytes]":
        """Queues the next part, in front if the stream has begun; b'' after the last.

        Raises Closed if the batcher is closed.
        """
        self._pending = self._batcher.queue_part(self._parts, self._begun)
        self._begun = True
        return self._pending

    def close(self) -> None:
        """Gives the place back, and takes a part that waits out of the queue."""
        if self._pending is not None:
            self._pending.cancel()
        self._batcher.end(self)


class Batcher:
    """Takes single clips and draws them together. Streams take turns with batches, each alone.

    Every batch is filled up to R rows. So there is one compiled function, and a clip does not
    depend on the others of its batch.
    """

    def __init__(
        self,
        bundle: Bundle,
        rows: int,
        window_seconds: float,
        most_waiting: int,
        on_batch: Callable[[int, float], None] = lambda clips, seconds: None,
    ):
        """Starts the thread.

        Args:
          bundle: draws the clips.
          rows: R.
          window_seconds: time that a clip waits for others.
          most_waiting: most clips that may wait, beside those that are being drawn. An open stream
            counts as one that waits.
          on_batch: is called after each batch but the first, which compiles, with its clips and
            the seconds that it took; a part of a stream is a batch of one clip.
        """
        self._bundle, self._rows, self._on_batch = bundle, rows, on_batch
        self._window_seconds, self._most_waiting = window_seconds, most_waiting
        self._queue: deque[tuple[Row | Iterator[bytes], Future[Any]]] = deque()
        self._streams: set[Stream] = set()
        self._changed = threading.Condition()
        self._closed = self._compiled = False
        self._seconds = 1.0  # of the last batch; a guess until one is drawn
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of clips that wait and are not cancelled."""
        with self._changed:
            return sum(not future.cancelled() for _, future in self._queue)

    def submit(self, *rows: Row, begun: bool = False) -> list["Future[Clip]"]:
        """Queues all rows or none. Cancelling a future takes its clip out of the queue.

        Args:
          rows: the clips to draw.
          begun: whether they continue a piece. Such rows are never refused, and are drawn next.

        Raises:
          Full: there is no room for all.
          Closed: the batcher is closed.
        """
        with self._changed:
            self._check_room(0 if begun else len(rows))
            return self._add(rows, begun)

    def stream(self, parts: Iterator[bytes]) -> Stream:
        """Opens a stream, whose parts are drawn when they are asked for; close it in the end.

        Raises:
          Full: there is no place for it.
          Closed: the batcher is closed.
        """
        with self._changed:
            self._check_room(1)
            stream = Stream(self, parts)
            self._streams.add(stream)
        return stream

    def queue_part(self, parts: Iterator[bytes], begun: bool) -> "Future[bytes]":
        """Queues the next part of an open stream; raises Closed if the batcher is closed."""
        with self._changed:
            self._check_room(0)
            return self._add([parts], begun)[0]

    def end(self, stream: Stream) -> None:
        """Frees the place of a stream."""
        with self._changed:
            self._streams.discard(stream)

    def _check_room(self, clips: int) -> None:
        """Raises Closed or, if there is no room for new clips, Full; locked by the caller."""
        if self._closed:
            raise Closed("the service stops")
        # Drop cancelled clips now, so that they take no room in the queue.
        self._queue = deque(each for each in self._queue if not each[1].cancelled())
        # Parts of streams are counted by their streams, whether or not one waits.
        rows = sum(isinstance(work, Row) for work, _ in self._queue)
        over = rows + len(self._streams) + clips - self._most_waiting
        if clips and over > 0:
            raise Full(max(1.0, self._seconds * -(-over // self._rows)))

    def _add(self, works: Sequence[Row | Iterator[bytes]], begun: bool) -> list["Future[Any]"]:
        """Queues work; what continues a clip or piece goes in front, in its own order."""
        entries = [(work, Future()) for work in works]
        if begun:
            self._queue.extendleft(reversed(entries))
        else:
            self._queue.extend(entries)
        self._changed.notify_all()
        return [future for _, future in entries]

    def close(self) -> None:
        """Takes no more clips, and returns when all that waited are drawn."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next_batch():
            start = time.monotonic()
            # A part of a stream comes alone.
            work, future = batch[0]
            if not isinstance(work, Row):
                self._draw_part(work, future, start)
                continue
            try:
                clips = draw(self._bundle, [row for row, _ in batch], self._rows)
            except Exception as error:  # each client of the batch must get an answer
                clips = [error] * len(batch)
            else:
                if self._compiled:  # the first batch compiles, so its time says nothing
                    self._seconds = time.monotonic() - start
                    self._on_batch(len(batch), self._seconds)
                self._compiled = True
            # A clip that is not finite fails alone.
            for (_, future), clip in zip(batch, clips, strict=True):
                if isinstance(clip, Exception):
                    future.set_exception(clip)
                else:
                    future.set_result(dataclasses.replace(clip, wav=np.clip(clip.wav, -1.0, 1.0)))

    def _draw_part(self, parts: Iterator[bytes], future: "Future[bytes]", start: float) -> None:
        """Draws the next part of a stream; an error goes to its client alone."""
        try:
            part = next(parts, b"")
        except Exception as error:  # the client must get an answer
            future.set_exception(error)
        else:
            if part and self._compiled:
                self._on_batch(1, time.monotonic() - start)
            future.set_result(part)

    def _next_batch(self) -> list[tuple[Row | Iterator[bytes], "Future[Any]"]]:
        """Waits for work, and returns up to R clips or one part; [] once closed and empty."""
        with self._changed:
            while True:
                # Wait for a first clip, then for others that may join it.
                while not self._queue and not self._closed:
                    self._changed.wait()
                self._changed.wait_for(self._is_ready, self._window_seconds)

                # Take a batch, without clips that were cancelled. A part of a stream is alone.
                batch = []
                while self._queue and len(batch) < self._rows:
                    alone = not isinstance(self._queue[0][0], Row)
                    if alone and batch:
                        break
                    work, future = self._queue.popleft()
                    if future.set_running_or_notify_cancel():
                        batch.append((work, future))
                        if alone:
                            break
                if batch or (self._closed and not self._queue):
                    return batch

    def _is_ready(self) -> bool:
        """Returns whether a batch need not wait for more clips; locked by the caller."""
        is_part = bool(self._queue) and not isinstance(self._queue[0][0], Row)
        return is_part or len(self._queue) >= self._rows or self._closed


def draw(bundle: Bundle, batch: Sequence[Row], rows: int) -> list[Clip | FloatingPointError]:
    """Draws a batch that is filled up to R rows.

    Args:
      bundle: a bundle, or another object with its `manifest`, `draw` and `score`.
      batch: 1 to R rows.
      rows: R.

    Returns:
      The clip of each row, or the error of that row alone.
    """
    # Fill up the batch, and draw it.
    filled = [*batch, *[batch[0]] * (rows - len(batch))]
    zeros = np.zeros((bundle.manifest["frames"], bundle.manifest["places"]), np.int32)
    beginnings = [zeros if row.beginning is None else row.beginning for row in filled]
    clips = bundle.draw(
        jax.tree.map(lambda *texts: np.stack(texts), *[row.text for row in filled]),
        [row.seed for row in filled],
        [row.candidate for row in filled],
        [row.temperature for row in filled],
        np.stack(beginnings),
        [row.beginning_frames for row in filled],
    )
    scores = bundle.score(clips) if any(row.scored for row in batch) else {}

    # Take it apart.
    scores = {name: np.asarray(score) for name, score in scores.items()}
    tokens, wavs = np.asarray(clips.tokens), np.asarray(clips.wav)
    results: list[Clip | FloatingPointError] = []
    for i, row in enumerate(batch):
        rewards = {name: float(score[i]) for name, score in scores.items()} if row.scored else {}
        if np.isfinite(wavs[i]).all() and np.isfinite(list(rewards.values())).all():
            results.append(Clip(tokens[i], wavs[i], rewards))
        else:
            results.append(FloatingPointError(NOT_FINITE))
    return results
