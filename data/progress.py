"""Progress of a long build: a bar on a terminal, a plain line now and then in a log."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10

Item = TypeVar("Item")


def progress(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """The items, one by one, while stderr tells how many of `total` are done."""
    if sys.stderr.isatty():
        yield from tqdm(items, desc=what, total=total)
        return
    start = told = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if done == total or now - told > _SECONDS_BETWEEN_LINES:
            told = now
            print(f"{what}: {done}/{total} after {now - start:.0f} s", file=sys.stderr, flush=True)
