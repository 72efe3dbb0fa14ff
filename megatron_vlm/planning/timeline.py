"""A step as events: what each rank did, from when to when; and the sums made of that.

Replayed steps and measured ones are told in the same events.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.errors import PlanError

Kind = Literal[
    "encode",
    "exchange",
    "forward",
    "backward",
    "exchange_back",
    "encode_backward",
    "reduce",
    "optimizer",
]
"""What a rank does: pictures to features and features to their ranks, a pass of the decoder, the
features' gradients to theirs and through the encoder, the reduction of gradients, the update."""

KINDS: tuple[Kind, ...] = get_args(Kind)


class Event(NamedTuple):
    """One piece of work on one rank. What does not apply is -1: all three numbers of a reduction,
    the micro-batch of what is done for a window."""

    rank: int
    kind: Kind
    micro_batch: int
    chunk: int
    window: int
    start: float
    """Seconds, on a clock that all ranks share."""
    end: float


@dataclass(frozen=True)
class Timeline:
    """Events as columns, by rank and start; `kind` numbers `KINDS`."""

    ranks: int
    rank: NDArray[np.int32]
    kind: NDArray[np.int8]
    micro_batch: NDArray[np.int32]
    chunk: NDArray[np.int32]
    window: NDArray[np.int32]
    start: NDArray[np.float64]
    end: NDArray[np.float64]

    @classmethod
    def from_events(cls, events: Iterable[Event]) -> Timeline:
        """A timeline of events in any order, as those of a measured step are.

        Raises:
            PlanError: no events, or one that ends before it starts or at no time at all.
        """
        known = list(events)
        if not known:
            raise PlanError("a timeline of no events; expected those of one step")
        for event in known:
            if not -np.inf < event.start <= event.end < np.inf:
                raise PlanError(
                    f"rank {event.rank}, {event.kind}: starts at {event.start} s and ends at "
                    f"{event.end} s; expected finite times, the end not before the start"
                )
        known.sort(key=lambda event: (event.rank, event.start, event.end))
        number = {kind: index for index, kind in enumerate(KINDS)}
        rank, kind, micro_batch, chunk, window, start, end = zip(*known, strict=True)
        return cls(
            ranks=max(rank) + 1,
            rank=np.array(rank, np.int32),
            kind=np.array([number[name] for name in kind], np.int8),
            micro_batch=np.array(micro_batch, np.int32),
            chunk=np.array(chunk, np.int32),
            window=np.array(window, np.int32),
            start=np.array(start, np.float64),
            end=np.array(end, np.float64),
        )

    def events(self) -> list[Event]:
        """The same, one object an event."""
        columns = (self.micro_batch, self.chunk, self.window, self.start, self.end)
        names = [KINDS[number] for number in self.kind.tolist()]
        rows = zip(self.rank.tolist(), names, *(c.tolist() for c in columns), strict=True)
        return [Event(*row) for row in rows]

    @cached_property
    def step_seconds(self) -> float:
        """From the first start to the last end."""
        return float(self.end.max() - self.start.min())

    @cached_property
    def busy_seconds(self) -> NDArray[np.float64]:
        """[ranks] seconds in which a rank does anything; what overlaps counts once."""
        return self._covered(self.start, self.end)

    @property
    def wait_seconds(self) -> NDArray[np.float64]:
        """[ranks] seconds of the step in which a rank does nothing."""
        return self.step_seconds - self.busy_seconds

    @cached_property
    def bubble_seconds(self) -> NDArray[np.float64]:
        """[ranks] seconds in which a rank does nothing while the pipelines run.

        They run from the start of the first forward pass anywhere to the end of the last backward
        pass, encoding that is part of one micro-batch's passes included; what a rank waits outside
        of that, it waits for other ranks' encoding or reduction.
        """
        passes = self.micro_batch >= 0
        if not passes.any():
            return np.zeros(self.ranks)
        first, last = self.start[passes].min(), self.end[passes].max()
        inside = self._covered(self.start.clip(first, last), self.end.clip(first, last))
        return float(last - first) - inside

    def kind_seconds(self, kind: Kind) -> NDArray[np.float64]:
        """[ranks] seconds of one kind of work."""
        spent = np.where(self.kind == KINDS.index(kind), self.end - self.start, 0.0)
        return np.bincount(self.rank, spent, self.ranks).astype(np.float64)

    def shares(self) -> dict[str, float]:
        """Part of all ranks' time that each kind of work takes, and `wait`.

        They add up to one where no rank does two things at once.
        """
        whole = self.ranks * self.step_seconds or 1.0
        found: dict[str, float] = {
            kind: float(self.kind_seconds(kind).sum()) / whole for kind in KINDS
        }
        return found | {"wait": float(self.wait_seconds.sum()) / whole}

    def _covered(self, start: NDArray[np.float64], end: NDArray[np.float64]) -> NDArray[np.float64]:
        """[ranks] length of the union of a rank's intervals."""
        places = np.searchsorted(self.rank, np.arange(self.ranks + 1))
        covered = np.zeros(self.ranks)
        for rank, (low, high) in enumerate(zip(places[:-1], places[1:], strict=True)):
            if low < high:
                before = np.maximum.accumulate(end[low:high])[:-1]
                begin = start[low:high].copy()
                np.maximum(begin[1:], before, out=begin[1:])
                covered[rank] = np.maximum(end[low:high] - begin, 0.0).sum()
        return covered
