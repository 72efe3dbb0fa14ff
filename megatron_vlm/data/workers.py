"""Threads that fetch, none of which can hold up a run.

Decoders and file systems may block for ever inside a system call, where no exception reaches. So
each task is watched: one that takes long is named in the log, and one that takes too long is given
up together with its thread, which another one replaces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from logging import getLogger
from threading import Condition, Thread
from time import monotonic
from typing import Any

logger = getLogger(__name__)

_TICK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Task:
    """A piece of work on one sample."""

    describe: Callable[[], str]
    """Names the sample, when a message needs it."""
    run: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a task: its result, or why there is none."""

    value: Any = None
    error: BaseException | None = None


class _Job:
    """A task under way; guarded by the pool's condition."""

    __slots__ = ("finish", "started", "task", "warned")

    def __init__(self, task: Task, finish: Callable[[Outcome], None]) -> None:
        self.task = task
        self.finish = finish
        self.started = 0.0
        self.warned = False


class WorkerPool:
    """Runs tasks on daemon threads; a process never waits for them when it ends."""

    def __init__(
        self, threads: int, warn_seconds: float = 30.0, timeout_seconds: float = 600.0
    ) -> None:
        """Start the threads.

        Args:
            threads: tasks that run at once.
            warn_seconds: a task is named in the log once it has run for so long.
            timeout_seconds: a task is given up once it has run for so long.
        """
        self._warn, self._timeout = warn_seconds, timeout_seconds
        self._changed = Condition()
        self._queue: deque[_Job] = deque()
        self._running: set[_Job] = set()
        self._closed = False
        for _ in range(threads):
            self._add_thread()

    def run(self, tasks: Sequence[Task]) -> list[Outcome] | None:
        """Run tasks, and wait until each is done or given up.

        Returns:
            Their outcomes, in order; null if the pool was closed meanwhile.
        """
        outcomes: list[Outcome | None] = [None] * len(tasks)
        missing = len(tasks)

        def finisher(place: int) -> Callable[[Outcome], None]:
            def finish(outcome: Outcome) -> None:
                nonlocal missing
                outcomes[place] = outcome
                missing -= 1

            return finish

        with self._changed:
            self._queue.extend(_Job(task, finisher(i)) for i, task in enumerate(tasks))
            self._changed.notify_all()
            while missing and not self._closed:
                self._changed.wait(_TICK_SECONDS)
                self._watch()
        return None if self._closed else [outcome or Outcome() for outcome in outcomes]

    def close(self) -> None:
        """Let the threads end; what they still do is dropped."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()

    def _add_thread(self) -> None:
        Thread(target=self._work, name="fetch-worker", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                job = self._queue.popleft()
                job.started = monotonic()
                self._running.add(job)
            try:
                outcome = Outcome(job.task.run())
            # Whatever a damaged file makes a library raise, it is that file's fault alone.
            except Exception as error:
                outcome = Outcome(error=error)
            with self._changed:
                if job not in self._running:  # given up, and this thread was replaced
                    return
                self._running.remove(job)
                job.finish(outcome)
                self._changed.notify_all()
            # A thread that waits must not keep a step's tensors alive.
            del job, outcome

    def _watch(self) -> None:
        now = monotonic()
        for job in list(self._running):
            age = now - job.started
            if age > self._timeout:
                self._running.remove(job)
                job.finish(Outcome(error=TimeoutError(f"gave up after {age:.0f} s")))
                self._add_thread()
            elif age > self._warn and not job.warned:
                job.warned = True
                logger.warning("waiting for %s since %.0f s", job.task.describe(), age)
