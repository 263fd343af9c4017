"""Which record comes when: a pure function of (seed, position), with no state to save and no buffer to fill.

Positions 0, 1, 2, ... number the examples that training sees. A mixture gives each position to a component
in blocks: every block holds exactly the same number of each component, in an order of its own. Inside a
component the examples run through its records epoch after epoch, each epoch a permutation of its own. Any
position is reached directly, whatever comes before it.

Random words are those of Philox seeded through SeedSequence, which NumPy keeps fixed between versions, and
permutations are their stable argsort, so an order lasts as long as its seed.

Legend: P positions, C components, R records of a component.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np

# The uses of randomness, each a stream of its own.
_SCHEDULE, _PERMUTATION, _KEY = 0, 1, 2
LONGEST_BLOCK = 10_000_000


def _words(stream: int, component: int, seed: int, first: int, count: int) -> np.ndarray:
    """uint64 [count]: words first, first + 1, ... of an endless random stream."""
    # The seed stands last: it alone may be wider than 32 bits, so no two triples give the same entropy.
    bits = np.random.Philox(np.random.SeedSequence([stream, component, seed]))
    bits.advance(first // 4)  # a Philox step makes four words
    return bits.random_raw(first % 4 + count)[first % 4 :]


@functools.lru_cache(maxsize=32)
def permutation(seed: int, component: int, epoch: int, size: int) -> np.ndarray:
    """int64 [R]: the order of a component's records in one epoch. Read-only; the latest ones are kept."""
    order = np.argsort(_words(_PERMUTATION, component, seed, epoch * size, size), kind="stable")
    order.flags.writeable = False
    return order


def shuffled(seed: int, component: int, ordinal: np.ndarray, size: int) -> np.ndarray:
    """The records of a component's examples: ordinal int64 [P] -> index int64 [P] in [0, size)."""
    epoch, offset = np.divmod(np.asarray(ordinal, np.int64), size)
    index = np.empty_like(offset)
    for e in np.unique(epoch):
        here = epoch == e
        index[here] = permutation(seed, component, int(e), size)[offset[here]]
    return index


def block_counts(rates: Sequence[float]) -> tuple[int, ...]:
    """The examples of each component in a block: the smallest whole numbers in the ratio of the rates.

    1.0 and 0.3 give 10 and 3. Raises ValueError where a rate is not positive or the block would be longer
    than LONGEST_BLOCK.
    """
    if not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise ValueError(
            f"rates {list(rates)} must all be positive: leave out a data set that is not wanted"
        )
    exact = [Fraction(str(rate)) for rate in rates]
    whole = [int(rate * math.lcm(*(r.denominator for r in exact))) for rate in exact]
    counts = tuple(count // math.gcd(*whole) for count in whole)
    if sum(counts) > LONGEST_BLOCK:
        raise ValueError(
            f"rates {list(rates)} repeat only after {sum(counts)} examples: round them"
        )
    return counts


@functools.lru_cache(maxsize=256)
def _block(seed: int, block: int, counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(component, how many of that component came before in the block), int64 [sum(counts)] each."""
    length = sum(counts)
    slots = np.argsort(_words(_SCHEDULE, 0, seed, block * length, length), kind="stable")
    component = np.repeat(np.arange(len(counts)), counts)[slots]
    ordinal = np.empty(length, np.int64)
    for c, count in enumerate(counts):
        ordinal[component == c] = np.arange(count)
    return component, ordinal


def schedule(
    seed: int, position: np.ndarray, rates: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Position int64 [P] -> (component, ordinal), int64 [P] each: whose turn it is, and how many it had before."""
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
    """The positions of batches start_step, start_step + 1, ..., int64 [P], those of `steps` batches at a time.

    Of each batch those of its `rows` alone, or all; none from position `end` on, or without an end.
    """
    rows = np.arange(batch_size) if rows is None else np.asarray(rows, np.int64)
    for step in itertools.count(start_step, steps):
        position = (np.arange(step, step + steps)[:, None] * batch_size + rows).ravel()
        if end is not None:
            position = position[position < end]
            if step * batch_size >= end:
                return
        yield position


def example_at(
    seed: int, position: np.ndarray, sizes: Sequence[int], rates: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Position int64 [P] in a mixture of components with `sizes` records -> (component, record), int64 [P] each.

    With rates equal to the sizes, every sum(sizes) positions hold every record of every component exactly
    once.
    """
    component, ordinal = schedule(seed, position, rates)
    index = np.empty_like(ordinal)
    for c in np.unique(component):
        here = component == c
        index[here] = shuffled(seed, int(c), ordinal[here], sizes[c])
    return component, index


def example_keys(seed: int, component: int, ordinal: np.ndarray) -> np.ndarray:
    """int64 [P, 2]: a key for each of a component's examples, for `tf.random.stateless_*` in preprocessors."""
    # The key's first word is 63 bits wide, so that it fits the int64 that TensorFlow takes.
    stream = int(_words(_KEY, component, seed, 0, 1)[0] >> np.uint64(1))
    return np.stack(
        [np.full(len(ordinal), stream, np.int64), np.asarray(ordinal, np.int64)], axis=1
    )
