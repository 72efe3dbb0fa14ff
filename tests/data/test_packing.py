"""Packing worked out by hand, and against plain best fit."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_vlm.data.packing import pack_best_fit, pack_in_order

pytestmark = pytest.mark.unit


def test_best_fit_by_hand() -> None:
    # By size: 3(70) opens A, 0(50) opens B, 5(50) fits B alone, 1(40) opens C, 4(30) fits A
    # exactly, 2(20) fits C.
    assert pack_best_fit([50, 40, 20, 70, 30, 50], 100, None) == ([[0, 5], [1, 2], [3, 4]], [])
    # The fullest bin with room is taken, not the first: 10 joins the 80, not the 60.
    assert pack_best_fit([60, 80, 10], 100, None) == ([[0], [1, 2]], [])
    assert pack_best_fit([10, 10, 10], 20, None) == ([[0, 1], [2]], [])
    assert pack_best_fit([], 20, None) == ([], [])


def test_what_finds_no_bin_is_left_over() -> None:
    assert pack_best_fit([60, 60, 60, 40], 100, 2) == ([[0], [1, 3]], [2])
    # What waited is placed before all others, however short it is.
    assert pack_best_fit([60, 60, 60, 40], 100, 1) == ([[0, 3]], [1, 2])
    assert pack_best_fit([40, 60, 60, 60], 100, 1, first=1) == ([[0, 1]], [2, 3])
    assert pack_best_fit([40, 40, 90], 100, 1, first=2) == ([[0, 1]], [2])


def test_best_fit_against_a_plain_one() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        sizes = rng.integers(1, 33, rng.integers(1, 80)).tolist()
        most = int(rng.integers(1, 30))
        rooms: list[int] = []
        left = []
        for place in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
            fitting = [room for room in rooms if room >= sizes[place]]
            if fitting:
                rooms.remove(min(fitting))
                rooms.append(min(fitting) - sizes[place])
            elif len(rooms) < most:
                rooms.append(32 - sizes[place])
            else:
                left.append(place)
        bins, found_left = pack_best_fit(sizes, 32, most)
        assert sorted(32 - sum(sizes[i] for i in members) for members in bins) == sorted(rooms)
        assert found_left == sorted(left)
        held = [place for members in bins for place in members]
        assert sorted(held + found_left) == list(range(len(sizes)))
        assert bins == sorted(sorted(members) for members in bins)


def test_in_order_by_hand() -> None:
    assert pack_in_order([50, 40, 20, 70, 30, 50], 100, None) == ([[0, 1], [2, 3], [4, 5]], [])
    assert pack_in_order([100, 1, 99, 100], 100, None) == ([[0], [1, 2], [3]], [])
    assert pack_in_order([50, 60, 30, 70], 100, 2) == ([[0], [1, 2]], [3])
    assert pack_in_order([50, 60, 30, 70, 1], 100, 1) == ([[0]], [1, 2, 3, 4])
    assert pack_in_order([], 100, 1) == ([], [])
