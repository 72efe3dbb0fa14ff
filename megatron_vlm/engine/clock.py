"""What this rank does in a step, and when: spans that the step and the engine open and close.

Spans may nest: an inner one interrupts the outer one, so that pieces never overlap, but for the
passes that the combined schedule runs at once. On a GPU the times are those of the device, asked
for once the step is over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from megatron.core.models.common.model_chunk_schedule_plan import (
    TransformerModelChunkSchedulePlan,
)

from megatron_vlm.resilience import heartbeat

Activity = Literal[
    "encode",
    "exchange",
    "forward",
    "backward",
    "exchange_back",
    "encode_backward",
    "reduce",
    "optimizer",
]


class Piece(NamedTuple):
    """An uninterrupted part of a span."""

    activity: Activity
    number: int
    """Of the pass: how many forward, or backward, passes began before it. Else of the window, or
    -1."""
    start: float
    """Seconds since the step began."""
    end: float


class _Open(NamedTuple):
    labels: tuple[tuple[Activity, int], ...]
    """Several where passes run at once."""


class StepClock:
    """The spans of one step after the other."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.began = 0.0
        """When the step began, as `time.perf_counter` tells it."""
        self._begin: Any = None
        self._open: list[_Open] = []
        self._since: Any = None
        self._pieces: list[tuple[_Open, Any, Any]] = []
        self._passes = {"forward": 0, "backward": 0}
        self._numbered = True

    def start_step(self) -> None:
        """Forget the step before; times count from here."""
        self.began = time.perf_counter()
        self._begin = self._now()
        self._open, self._pieces = [], []
        self._passes = {"forward": 0, "backward": 0}

    @contextmanager
    def span(self, activity: Activity, number: int = -1) -> Iterator[None]:
        """While it lasts, this is what the rank does."""
        self._enter(_Open(((activity, number),)))
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def pipeline(self, forward_only: bool) -> Iterator[None]:
        """While it lasts, the rank waits for others unless it does something.

        Args:
            forward_only: passes are none of the step's own, and have no numbers.
        """
        self._numbered = not forward_only
        with self.pause():
            yield

    @contextmanager
    def pause(self) -> Iterator[None]:
        """While it lasts, the rank waits for others."""
        self._enter(_Open(()))
        try:
            yield
        finally:
            self._leave()

    def begin_pass(self, *activities: Literal["forward", "backward"]) -> None:
        """A pass of the decoder begins, or one of each at once."""
        labels: list[tuple[Activity, int]] = []
        for activity in activities:
            labels.append((activity, self._passes[activity] if self._numbered else -1))
            self._passes[activity] += self._numbered
        self._enter(_Open(tuple(labels)))

    def end_pass(self) -> None:
        """It ends."""
        self._leave()

    def pieces(self) -> list[Piece]:
        """All since the step began, by start; waits for the device."""
        self._settle()
        found = [
            Piece(activity, number, self._seconds(start), self._seconds(end))
            for opened, start, end in self._pieces
            for activity, number in opened.labels
        ]
        return sorted(found, key=lambda piece: piece.start)

    def seconds(self, *activities: Activity) -> float:
        """Time spent on some activities since the step began."""
        return sum(p.end - p.start for p in self.pieces() if p.activity in activities)

    def waited_seconds(self) -> float:
        """Time in the pipeline in which the rank did nothing."""
        self._settle()
        return sum(
            self._seconds(end) - self._seconds(start)
            for opened, start, end in self._pieces
            if not opened.labels
        )

    def _settle(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def _enter(self, span: _Open) -> None:
        self._cut()
        self._open.append(span)
        self._tell()

    def _leave(self) -> None:
        self._cut()
        self._open.pop()
        self._tell()

    def _tell(self) -> None:
        """To who watches over the run."""
        labels = self._open[-1].labels if self._open else (("step", -1),)
        heartbeat.enter(labels[0][0] if labels else "wait")

    def _cut(self) -> None:
        now = self._now()
        if self._open:
            self._pieces.append((self._open[-1], self._since, now))
        self._since = now

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, moment: Any) -> float:
        if self._cuda:
            return float(self._begin.elapsed_time(moment)) / 1e3
        return float(moment - self._begin)


class EngineTimers:
    """What the engine's schedules call at the ends of a pass, in the form of its own timers."""

    def __init__(self, clock: StepClock) -> None:
        self._clock = clock
        self._timers = {
            "forward-compute": _Timer(lambda: clock.begin_pass("forward"), clock.end_pass),
            "backward-compute": _Timer(lambda: clock.begin_pass("backward"), clock.end_pass),
        }
        self._other = _Timer(lambda: None, lambda: None)
        self.combined = False
        """Whether `TimedSchedulePlan` tells of passes instead."""

    def __call__(self, name: str, log_level: int | None = None) -> _Timer:
        """The timer of that name."""
        return self._other if self.combined else self._timers.get(name, self._other)


class _Timer:
    def __init__(self, start: Callable[[], None], stop: Callable[[], None]) -> None:
        self._start, self._stop = start, stop

    def start(self, barrier: bool = False) -> None:
        self._start()

    def stop(self, barrier: bool = False) -> None:
        self._stop()


class TimedSchedulePlan(TransformerModelChunkSchedulePlan):
    """A pass of the combined schedule, which runs two at once and has no timers of its own."""

    clock: StepClock

    @classmethod
    def of(cls, plan: TransformerModelChunkSchedulePlan, clock: StepClock) -> TimedSchedulePlan:
        """The same plan, timed."""
        plan.__class__ = cls
        timed: TimedSchedulePlan = plan
        timed.clock = clock
        return timed

    @staticmethod
    def run(
        f_schedule_plan: TimedSchedulePlan | None,
        b_schedule_plan: TimedSchedulePlan | None,
        **options: Any,
    ) -> Any:
        """As the engine's; what it does between the passes with other ranks is left out."""
        first = f_schedule_plan or b_schedule_plan
        assert first is not None
        clock = first.clock
        activities: list[Literal["forward", "backward"]] = []
        activities += ["forward"] * (f_schedule_plan is not None)
        activities += ["backward"] * (b_schedule_plan is not None)
        messages = ("pre_forward", "pre_backward", "post_forward", "post_backward")
        for name in messages:
            if options.get(name) is not None:
                options[name] = _paused(options[name], clock)
        clock.begin_pass(*activities)
        try:
            return TransformerModelChunkSchedulePlan.run(
                f_schedule_plan, b_schedule_plan, **options
            )
        finally:
            clock.end_pass()


def _paused(function: Callable[..., Any], clock: StepClock) -> Callable[..., Any]:
    def paused(*args: Any, **options: Any) -> Any:
        with clock.pause():
            return function(*args, **options)

    return paused
