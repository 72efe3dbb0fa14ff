"""Threads that fetch: order, faults that stay with their task, and tasks that never end."""

from __future__ import annotations

import logging
import threading
import time

import pytest

from megatron_vlm.data.workers import Outcome, Task, WorkerPool

pytestmark = pytest.mark.unit


def task(run: object, name: str = "a sample") -> Task:
    return Task(lambda: name, run)  # type: ignore[arg-type]


def values(outcomes: list[Outcome] | None) -> list[object]:
    assert outcomes is not None
    assert all(outcome.error is None for outcome in outcomes)
    return [outcome.value for outcome in outcomes]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_outcomes_come_in_order(threads: int) -> None:
    pool = WorkerPool(threads)

    def work(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number

    for _ in range(3):
        tasks = [task(lambda n=n: work(n)) for n in range(20)]
        assert values(pool.run(tasks)) == list(range(20))
    assert values(pool.run([])) == []
    pool.close()


def test_so_many_run_at_once_and_no_more() -> None:
    pool = WorkerPool(3)
    meeting = threading.Barrier(3, timeout=30)
    running, most = [0], [0]
    lock = threading.Lock()

    def work() -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        meeting.wait()
        with lock:
            running[0] -= 1

    values(pool.run([task(work) for _ in range(9)]))
    assert most == [3]
    pool.close()


@pytest.mark.parametrize("error", [ValueError("bad"), MemoryError(), OSError(5, "gone")])
def test_a_fault_stays_with_its_task(error: Exception) -> None:
    pool = WorkerPool(2)

    def fail() -> None:
        raise error

    outcomes = pool.run([task(lambda: 1), task(fail), task(lambda: 3)])
    assert outcomes is not None
    assert [outcome.error for outcome in outcomes] == [None, error, None]
    assert [outcome.value for outcome in outcomes] == [1, None, 3]
    pool.close()


def test_a_task_that_blocks_is_named_and_given_up(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    pool = WorkerPool(1, warn_seconds=0.2, timeout_seconds=2.5)
    gate = threading.Event()
    tasks = [task(lambda: 1), task(lambda: gate.wait(60), "sample 77"), task(lambda: 3)]
    outcomes = pool.run(tasks)
    assert outcomes is not None
    # The one behind it was done by the thread that took the blocked one's place.
    assert [outcome.value for outcome in outcomes] == [1, None, 3]
    assert isinstance(outcomes[1].error, TimeoutError)
    assert "gave up after" in str(outcomes[1].error)
    assert [record.message for record in caplog.records if "sample 77" in record.message]
    assert len(caplog.records) == 1
    # What it says later is not heard, and its thread ends.
    gate.set()
    assert values(pool.run([task(lambda: 4)])) == [4]
    deadline = time.monotonic() + 30
    while threads() > 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() == 1
    pool.close()


def threads() -> int:
    return sum(thread.name == "fetch-worker" for thread in threading.enumerate())


def test_closing_lets_go_of_who_waits() -> None:
    pool = WorkerPool(1)
    gate = threading.Event()
    threading.Timer(0.2, pool.close).start()
    started = time.monotonic()
    assert pool.run([task(lambda: gate.wait(60))]) is None
    assert time.monotonic() - started < 30
    gate.set()
    assert pool.run([task(lambda: 1)]) is None
