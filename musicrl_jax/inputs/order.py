"""Order of training examples: a pure function of (seed, position), without state or buffer.

Positions 0, 1, 2, ... number the examples that training reads. A mixture assigns each position to a
component in blocks. Every block holds exactly the same number of examples of each component, in an
order of its own. The examples of a component run through its records epoch after epoch, and each
epoch is a new permutation. Any position can be computed without those before it.

Random words come from Philox seeded through SeedSequence, which NumPy keeps fixed between versions.
Permutations are stable argsorts of these words, so a seed gives the same order for ever.

Legend: P positions, C components, R records of a component.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from enum import IntEnum
from fractions import Fraction

import numpy as np

LONGEST_BLOCK = 10_000_000  # examples


class Stream(IntEnum):
    """Independent random streams of one seed."""

    SCHEDULE = 0
    PERMUTATION = 1
    KEY = 2


@dataclasses.dataclass(frozen=True)
class BatchOrder:
    """Which batches are read.

    Attributes:
      batch_size: B, at least 1.
      seed: of the order, at least 0.
      start_step: number of the first batch, at least 0.
      epochs: passes over the data; the last batch may be smaller. None reads full batches without
        end.
      rows: the rows of each batch that this host reads; None reads all.
    """

    batch_size: int
    seed: int
    start_step: int = 0
    epochs: int | None = None
    rows: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.start_step < 0 or self.seed < 0:
            raise ValueError(
                f"batch_size {self.batch_size} must be at least 1, start_step {self.start_step} "
                f"and seed {self.seed} at least 0"
            )

    @property
    def row_count(self) -> int:
        """Number of rows of each batch that are read."""
        return self.batch_size if self.rows is None else len(self.rows)

    def check_count(self, count: int, examples: str, remedy: str) -> None:
        """Raises ValueError if full batches are larger than a split of `count` examples.

        `examples` describes the examples and names their split and folder.
        """
        if self.epochs is None and self.batch_size > count:
            raise ValueError(
                f"batch_size {self.batch_size} is more than the {count} {examples}: {remedy}"
            )


# --- Orders ---


def _words(stream: Stream, component: int, seed: int, first: int, count: int) -> np.ndarray:
    """Returns words first, first + 1, ... of an endless random stream: uint64 [count]."""
    # Only the last entry, the seed, may be wider than 32 bits, so no two triples collide.
    bits = np.random.Philox(np.random.SeedSequence([stream, component, seed]))
    # A Philox step makes four words.
    bits.advance(first // 4)
    return bits.random_raw(first % 4 + count)[first % 4 :]


@functools.lru_cache(maxsize=32)
def permutation(seed: int, component: int, epoch: int, size: int) -> np.ndarray:
    """Returns the order of a component's records in one epoch: int64 [R], read-only, cached."""
    words = _words(Stream.PERMUTATION, component, seed, epoch * size, size)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False
    return order


def shuffled(seed: int, component: int, ordinal: np.ndarray, size: int) -> np.ndarray:
    """Returns the record of each of a component's examples.

    Args:
      seed: of the order.
      component: number of the component.
      ordinal: int64 [P], number of each example among those of the component.
      size: R.

    Returns:
      int64 [P] in [0, R).
    """
    epoch, offset = np.divmod(np.asarray(ordinal, np.int64), size)
    index = np.empty_like(offset)
    # A batch may span epochs, each with its own permutation.
    for e in np.unique(epoch):
        here = epoch == e
        index[here] = permutation(seed, component, int(e), size)[offset[here]]
    return index


def block_counts(rates: Sequence[float]) -> tuple[int, ...]:
    """Returns how many examples each component has in a block.

    They are the smallest integers in the ratio of the rates: rates 1.0 and 0.3 give 10 and 3.
    Raises ValueError if a rate is not positive or the block would be longer than LONGEST_BLOCK.
    """
    if not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise ValueError(
            f"rates {list(rates)} must all be positive: remove the data sets that you do not use"
        )
    # Exact fractions: 0.1 + 0.2 is not 0.3 in floats.
    exact = [Fraction(str(rate)) for rate in rates]
    denominator = math.lcm(*(rate.denominator for rate in exact))
    whole = [int(rate * denominator) for rate in exact]
    counts = tuple(count // math.gcd(*whole) for count in whole)
    if sum(counts) > LONGEST_BLOCK:
        raise ValueError(
            f"rates {list(rates)} repeat only after {sum(counts)} examples: round them"
        )
    return counts


@functools.lru_cache(maxsize=256)
def _block(seed: int, block: int, counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (component, its examples earlier in the block), int64 [sum(counts)] each."""
    length = sum(counts)
    # A random permutation of the block's slots.
    slots = np.argsort(_words(Stream.SCHEDULE, 0, seed, block * length, length), kind="stable")
    component = np.repeat(np.arange(len(counts)), counts)[slots]
    ordinal = np.empty(length, np.int64)
    for c, count in enumerate(counts):
        ordinal[component == c] = np.arange(count)
    return component, ordinal


# --- Mixtures ---


def schedule(
    seed: int, position: np.ndarray, rates: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the component of each position and the number of its examples before that position.

    Both are int64 [P], as `position` is.
    """
    counts = block_counts(rates)
    block, offset = np.divmod(np.asarray(position, np.int64), sum(counts))
    component, ordinal = np.empty_like(block), np.empty_like(block)
    for b in np.unique(block):
        here = block == b
        components, ordinals = _block(seed, int(b), counts)
        component[here] = components[offset[here]]
        ordinal[here] = int(b) * np.array(counts)[component[here]] + ordinals[offset[here]]
    return component, ordinal


def positions(
    batch_size: int,
    start_step: int = 0,
    end: int | None = None,
    rows: np.ndarray | None = None,
    steps: int = 1,
) -> Iterator[np.ndarray]:
    """Yields the positions of consecutive batches, int64 [P], those of `steps` batches at a time.

    Args:
      batch_size: B.
      start_step: number of the first batch.
      end: the first position that is not read; None reads without end.
      rows: the rows that are read of each batch; None reads all.
      steps: batches at a time.
    """
    rows = np.arange(batch_size) if rows is None else np.asarray(rows, np.int64)
    for step in itertools.count(start_step, steps):
        if end is not None and step * batch_size >= end:
            return
        position = (np.arange(step, step + steps)[:, None] * batch_size + rows).ravel()
        yield position if end is None else position[position < end]


def example_at(
    seed: int, position: np.ndarray, sizes: Sequence[int], rates: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the component and the record at each position of a mixture, int64 [P] each.

    With rates equal to the sizes, every sum(sizes) positions hold every record of every component
    exactly once.

    Args:
      seed: of the order.
      position: int64 [P].
      sizes: R of each component.
      rates: how often each component is read, in any unit.
    """
    component, ordinal = schedule(seed, position, rates)
    index = np.empty_like(ordinal)
    for c in np.unique(component):
        here = component == c
        index[here] = shuffled(seed, int(c), ordinal[here], sizes[c])
    return component, index


def example_keys(seed: int, component: int, ordinal: np.ndarray) -> np.ndarray:
    """Returns keys of a component's examples for `tf.random.stateless_*`: int64 [P, 2]."""
    # TensorFlow takes int64, so the first word keeps 63 of its 64 bits.
    stream = int(_words(Stream.KEY, component, seed, 0, 1)[0] >> np.uint64(1))
    ordinal = np.asarray(ordinal, np.int64)
    return np.stack([np.full_like(ordinal, stream), ordinal], axis=1)
