"""Ordered work on threads: order, bounds in items and in bytes, and an end without a hang."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from megatron_vlm.data.ordered import map_ordered, usable_cores

pytestmark = pytest.mark.unit


def test_results_come_in_order() -> None:
    def slow_first(item: int, reserve: Callable[[int], None]) -> int:
        time.sleep(0.02 if item % 5 == 0 else 0)
        return item * item

    assert list(map_ordered(slow_first, range(40), 4, 1)) == [n * n for n in range(40)]


def test_reserved_bytes_stay_below_the_bound_until_results_are_taken() -> None:
    held, most, lock = 0, 0, threading.Lock()

    def work(item: int, reserve: Callable[[int], None]) -> int:
        nonlocal held, most
        reserve(30)
        with lock:
            held += 30
            most = max(most, held)
        return item

    for number, item in enumerate(map_ordered(work, range(50), 4, 100)):
        assert item == number
        time.sleep(0.002)
        with lock:
            held -= 30
    # Three fit below the bound; the next in order is never held up.
    assert 90 <= most <= 130


def test_an_item_beyond_the_bound_goes_through_in_its_turn() -> None:
    def work(item: int, reserve: Callable[[int], None]) -> int:
        reserve(1000 if item % 3 == 0 else 10)
        return item

    assert list(map_ordered(work, range(30), 4, 100)) == list(range(30))


def test_a_fault_ends_threads_that_wait_for_room() -> None:
    def work(item: int, reserve: Callable[[int], None]) -> int:
        if item == 0:
            time.sleep(0.1)
            raise ValueError("broken")
        reserve(60)
        return item

    before = threading.active_count()
    with pytest.raises(ValueError, match="broken"):
        list(map_ordered(work, range(30), 4, 100))
    assert threading.active_count() == before


def test_no_more_than_four_items_a_thread_are_begun() -> None:
    begun = []

    def work(item: int, reserve: Callable[[int], None]) -> int:
        begun.append(item)
        return item

    results = map_ordered(work, range(100), 2, 1)
    next(results)
    time.sleep(0.1)
    assert len(begun) <= 8
    results.close()


def test_cores_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5}, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert usable_cores() == 2
    monkeypatch.delattr("os.sched_getaffinity")
    assert usable_cores() == 64
