"""Shows the progress of a long stage: a bar on a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from musicrl_jax.core import hosts

T = TypeVar("T")
LOG_SECONDS = 10.0  # between two lines of a log


class Progress:
    """An iterator over `items` that shows the count; `note` adds figures behind it.

    Raises `hosts.Preempted` between two items if the run got SIGTERM; see `hosts.stop_point`.
    """

    def __init__(self, items: Iterable[T], label: str, total: int, initial: int = 0):
        self._items, self._label, self._total, self._done = items, label, total, initial
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total, initial=initial, desc=f"{label:>9}", disable=not self._terminal
        )
        self._start = self._last = time.monotonic()
        # The last note, and the count in the last line.
        self._note, self._logged = "", -1

    def note(self, text: str) -> None:
        """Shows figures beside the count, such as the loss."""
        self._note = text
        self._bar.set_postfix_str(text, refresh=False)

    def _log(self) -> None:
        self._last, self._logged = time.monotonic(), self._done
        count = f"{self._label:>9}  {self._done}/{self._total}"
        print(f"{count}  {self._last - self._start:.0f} s  {self._note}", flush=True)

    def __iter__(self) -> Iterator[T]:
        try:
            for item in self._items:
                hosts.stop_point()  # computing the item may have taken long
                yield item
                self._done += 1
                self._bar.update(1)
                if not self._terminal and time.monotonic() - self._last > LOG_SECONDS:
                    self._log()
                hosts.stop_point()
            # The last count, unless its line is already there.
            if not self._terminal and self._logged != self._done:
                self._log()
        finally:
            self._bar.close()
