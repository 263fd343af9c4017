"""Orders against sets and counts over whole epochs, seeks against a walk from the start."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from musicrl_jax.inputs import order

SEEDS = st.integers(0, 2**64)
SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=4)
RATES = st.sampled_from([0.1, 0.25, 0.3, 1, 1.0, 2, 3.5, 7])


@given(SEEDS, st.integers(1, 200), st.integers(0, 5))
def test_every_epoch_is_a_permutation(seed, size, epoch):
    ordinal = epoch * size + np.arange(size)
    np.testing.assert_array_equal(np.sort(order.shuffled(seed, 0, ordinal, size)), np.arange(size))


def test_seeds_epochs_and_components_have_orders_of_their_own():
    orders = []
    for seed in (0, 1, 2**40):
        for component in (0, 1):
            index = order.shuffled(seed, component, np.arange(3000), 1000)
            orders.extend(index.reshape(3, 1000))
    # Two independent permutations agree in one place on average (Poisson), hardly ever in 12.
    agreements = [np.sum(a == b) for i, a in enumerate(orders) for b in orders[:i]]
    assert max(agreements) < 12


def test_places_are_uniform():
    # Over 4000 epochs, record 0 of 8 has each place 500 times, within 5 standard errors.
    index = order.shuffled(3, 0, np.arange(8 * 4000), 8).reshape(4000, 8)
    counts = np.bincount(np.argmax(index == 0, axis=1), minlength=8)
    assert np.all(np.abs(counts - 500) < 5 * np.sqrt(4000 * (1 / 8) * (7 / 8)))


@given(SEEDS, SIZES, st.data())
@settings(deadline=None, max_examples=40)
def test_a_seek_equals_a_walk_from_the_start(seed, sizes, data):
    rates = data.draw(st.lists(RATES, min_size=len(sizes), max_size=len(sizes)))
    start = data.draw(st.integers(0, 300))
    walk = np.array(order.example_at(seed, np.arange(start + 50), sizes, rates))
    seek = np.array(order.example_at(seed, np.arange(start, start + 50), sizes, rates))
    np.testing.assert_array_equal(walk[:, start:], seek)
    for place in (0, 49):
        one = np.array(order.example_at(seed, np.array([start + place]), sizes, rates))
        np.testing.assert_array_equal(one[:, 0], seek[:, place])


@given(SEEDS, SIZES, st.data())
@settings(deadline=None, max_examples=40)
def test_each_component_counts_its_own_examples(seed, sizes, data):
    rates = data.draw(st.lists(RATES, min_size=len(sizes), max_size=len(sizes)))
    component, ordinal = order.schedule(seed, np.arange(400), rates)
    for c in range(len(sizes)):
        np.testing.assert_array_equal(ordinal[component == c], np.arange(np.sum(component == c)))


@given(st.integers(1, 7), st.integers(0, 5), st.integers(1, 3), st.integers(0, 60), st.data())
@settings(deadline=None)
def test_rows_of_batches_are_those_of_whole_batches(batch_size, start, steps, end, data):
    rows = np.array(sorted(data.draw(st.sets(st.integers(0, batch_size - 1), min_size=1))))
    whole = np.arange(start * batch_size, (start + 6) * batch_size).reshape(6, batch_size)
    endless = order.positions(batch_size, start, rows=rows, steps=steps)
    parts = np.concatenate([next(endless) for _ in range(6)])[: 6 * len(rows)]
    np.testing.assert_array_equal(parts, whole[:, rows].ravel())
    ended = [np.zeros(0, int), *order.positions(batch_size, start, end, steps=steps)]
    assert np.concatenate(ended).tolist() == list(range(start * batch_size, end))


@given(SEEDS, SIZES)
@settings(deadline=None, max_examples=40)
def test_rates_equal_to_sizes_give_every_record_once_an_epoch(seed, sizes):
    total = sum(sizes)
    for epoch in (0, 3):
        component, index = order.example_at(seed, epoch * total + np.arange(total), sizes, sizes)
        every = [(c, i) for c, size in enumerate(sizes) for i in range(size)]
        assert sorted(zip(component.tolist(), index.tolist(), strict=True)) == every


@pytest.mark.parametrize(
    ("rates", "counts"),
    [
        ([1.0, 0.3], (10, 3)),
        ([0.1, 0.2, 0.7], (1, 2, 7)),
        ([2, 6], (1, 3)),
        ([1e-3, 1], (1, 1000)),
        ([5.0], (1,)),
    ],
)
def test_mixture_rates_are_exact(rates, counts):
    assert order.block_counts(rates) == counts
    length = sum(counts)
    component, _ = order.schedule(7, np.arange(20 * length), rates)
    for block in component.reshape(20, length):
        assert tuple(np.bincount(block)) == counts


def test_far_positions_cost_no_more_than_near_ones(monkeypatch):
    sizes = []

    class Counted(np.random.Philox):
        def random_raw(self, size):
            sizes.append(size)
            return super().random_raw(size)

    monkeypatch.setattr(np.random, "Philox", Counted)
    for position in (0, 10**15):
        order.permutation.cache_clear()
        order._block.cache_clear()
        sizes.clear()
        component, index = order.example_at(0, np.array([position]), [8, 8], [3.0, 1.0])
        assert component[0] in (0, 1) and 0 <= index[0] < 8
        # One block, one permutation.
        assert sizes == [4, 8]


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ([1.0, 0.0], "must all be positive"),
        ([-1.0], "must all be positive"),
        ([float("nan")], "must all be positive"),
        ([float("inf")], "must all be positive"),
        ([1.0, 0.123456789], "round them"),
    ],
)
def test_rates_that_give_no_short_block_are_refused(rates, message):
    with pytest.raises(ValueError, match=message):
        order.block_counts(rates)


def test_the_order_of_a_seed_never_changes():
    # A change here changes every resumed run: the figures are those of the first version.
    component, index = order.example_at(0, np.arange(8), [5, 3], [2.0, 1.0])
    assert component.tolist() == [0, 0, 1, 0, 1, 0, 1, 0]
    assert index.tolist() == [2, 0, 1, 1, 0, 4, 2, 3]
    first = 5232180285511217261
    assert order.example_keys(0, 1, np.arange(2)).tolist() == [[first, 0], [first, 1]]


def test_examples_have_keys_of_their_own():
    places = [(seed, component) for seed in (0, 1) for component in (0, 1)]
    keys = np.concatenate([order.example_keys(*place, np.arange(100)) for place in places])
    assert keys.dtype == np.int64 and len(np.unique(keys, axis=0)) == 400
