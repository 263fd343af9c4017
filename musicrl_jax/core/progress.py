"""How far a long stage is: a bar on a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from musicrl_jax.core import hosts

T = TypeVar("T")
LOG_SECONDS = 10.0


class Progress:
    """An iterator over `items` that shows where it is; `note` adds figures behind the count.

    It raises `hosts.Preempted` between two items where the run got SIGTERM; see `hosts.stop_point`.
    """

    def __init__(self, items: Iterable[T], label: str, total: int, initial: int = 0):
        self._items, self._label, self._total, self._done = items, label, total, initial
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total, initial=initial, desc=f"{label:>9}", disable=not self._terminal, leave=True
        )
        self._start = self._last = time.monotonic()
        self._note, self._told = "", -1

    def note(self, text: str) -> None:
        """Figures to show beside the count, such as the loss."""
        self._note = text
        self._bar.set_postfix_str(text, refresh=False)

    def _line(self) -> None:
        elapsed, self._told = time.monotonic() - self._start, self._done
        print(
            f"{self._label:>9}  {self._done}/{self._total}  {elapsed:.0f} s  {self._note}",
            flush=True,
        )

    def __iter__(self) -> Iterator[T]:
        try:
            for item in self._items:
                hosts.stop_point()  # making the item may have taken long
                yield item
                self._done += 1
                self._bar.update(1)
                if not self._terminal and time.monotonic() - self._last > LOG_SECONDS:
                    self._last = time.monotonic()
                    self._line()
                hosts.stop_point()
            if not self._terminal and self._told != self._done:
                self._line()
        finally:
            self._bar.close()
