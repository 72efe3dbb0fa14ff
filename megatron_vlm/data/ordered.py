"""Work on threads whose results come in order and whose memory is bounded in bytes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from threading import Condition
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")

Reserve = Callable[[int], None]
"""Called with a number of bytes before they are read; returns once there is room for them."""

_ITEMS_A_THREAD = 4


def usable_cores() -> int:
    """Cores that this process may run on, which a container or a launcher may have restricted."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def map_ordered(
    function: Callable[[In, Reserve], Out], items: Iterable[In], threads: int, max_bytes: int
) -> Generator[Out, None, None]:
    """Map on threads, results in order; close it if it is not run to its end.

    Args:
        function: takes an item, and what to call before it reads bytes that its result holds.
        items: at most four a thread are under way or wait to be taken.
        threads: at most so many items are worked on at once.
        max_bytes: bytes reserved by all items that were not yet taken. The item that is next in
            order is never held up, so that everything goes on even where it alone needs more.
    """
    room = _Room(max_bytes)
    pending: deque[Future[Out]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for number, item in enumerate(items):
                pending.append(pool.submit(function, item, partial(room.reserve, number)))
                if len(pending) >= _ITEMS_A_THREAD * threads:
                    yield pending.popleft().result()
                    room.release()
            while pending:
                yield pending.popleft().result()
                room.release()
        finally:
            room.open()
            pool.shutdown(cancel_futures=True)


class _Room:
    """Bytes that numbered items hold until they are released in the order of their numbers."""

    def __init__(self, max_bytes: int) -> None:
        self._free = max_bytes
        self._held: dict[int, int] = {}
        self._next = 0
        self._unbounded = False
        self._changed = Condition()

    def reserve(self, number: int, size: int) -> None:
        """Wait until `size` bytes are free, or it is this item's turn."""
        with self._changed:
            self._changed.wait_for(
                lambda: size <= self._free or number == self._next or self._unbounded
            )
            self._free -= size
            self._held[number] = self._held.get(number, 0) + size

    def release(self) -> None:
        """Free what the next item in order holds."""
        with self._changed:
            self._free += self._held.pop(self._next, 0)
            self._next += 1
            self._changed.notify_all()

    def open(self) -> None:
        """Let everyone through: nothing more will be released."""
        with self._changed:
            self._unbounded = True
            self._changed.notify_all()
