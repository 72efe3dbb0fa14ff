"""Orders that are never stored: each thing once, and every order as likely as any other."""

from __future__ import annotations

import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from megatron_vlm.data.permutation import Permutation

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("length", [1, 2, 3, 5, 16, 17, 99, 100, 4096, 4097, 10_007])
def test_each_thing_stands_in_one_place(length: int) -> None:
    for key in range(3):
        found = Permutation(length, 7, key)(np.arange(length))
        assert np.array_equal(np.sort(found), np.arange(length))


def test_one_place_asked_alone_is_the_same_as_among_others() -> None:
    order = Permutation(12_345, 3)
    all_of_it = order(np.arange(12_345))
    places = np.array([0, 77, 12_344, 500])
    assert np.array_equal(order(places), all_of_it[places])


@pytest.mark.parametrize("length", [2, 3, 4])
def test_every_order_of_a_few_things_is_as_likely(length: int) -> None:
    orders, each = math.factorial(length), 100
    counts = Counter(
        tuple(Permutation(length, 11, key)(np.arange(length)).tolist())
        for key in range(orders * each)
    )
    assert len(counts) == orders
    chi_squared = sum((count - each) ** 2 / each for count in counts.values())
    # Mean orders - 1, deviation sqrt(2 (orders - 1)); beyond five deviations is no chance.
    assert chi_squared < orders - 1 + 5 * math.sqrt(2 * (orders - 1)) + 5


@pytest.mark.parametrize("length", [1000, 20_000])
def test_no_place_is_preferred_and_neighbours_are_unrelated(length: int) -> None:
    cells = np.zeros((10, 10))
    related = []
    for key in range(200):
        found = Permutation(length, key)(np.arange(length))
        np.add.at(cells, (np.arange(length) * 10 // length, found * 10 // length), 1)
        related.append(np.corrcoef(found[:-1], found[1:])[0, 1])
    expected = cells.mean()
    assert np.abs(cells - expected).max() < 5 * math.sqrt(expected)
    assert abs(np.mean(related)) < 5 / math.sqrt(length * 200)


def test_keys_give_other_orders() -> None:
    found = {
        tuple(Permutation(50, *key)(np.arange(50)).tolist())
        for key in ((1, 2), (2, 1), (1,), (1, 2, 0), (0, 1, 2))
    }
    assert len(found) == 5


def test_a_trillion_things_need_no_memory() -> None:
    tracemalloc.start()
    found = Permutation(10**12, 1)(np.arange(10**12 - 1000, 10**12))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    assert len(np.unique(found)) == 1000
    assert found.min() >= 0 and found.max() < 10**12
    assert found.max() - found.min() > 9 * 10**11


def test_the_order_never_changes() -> None:
    """Worked out once: a run must resume alike with every later version."""
    assert Permutation(10, 1, 2)(np.arange(10)).tolist() == [6, 4, 3, 7, 0, 2, 9, 8, 1, 5]
    assert Permutation(10**9, 1, 2)(np.arange(3)).tolist() == [
        775805425,
        885936929,
        413594403,
    ]
