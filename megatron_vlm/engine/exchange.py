"""Where picture features go: from the rank that encoded a picture to those that embed its tokens.

Everything is derived from the plan, on every rank alike: for each window of micro-batches, the
feature rows that a rank sends to each other one, in the order of the plan, and those it receives.
Under context and sequence parallelism a rank receives just the tokens of its own slice. The way
back is the same lists the other way round. `delivery.py` carries them out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megatron_vlm.engine.zigzag import local_tokens
from megatron_vlm.topology.layout import Layout

if TYPE_CHECKING:
    from megatron_vlm.data.plan import StepPlan


@dataclass(frozen=True)
class WindowPlan:
    """What one rank sends and receives for some consecutive micro-batches."""

    first: int
    """Number of the first micro-batch."""
    sends: dict[int, np.ndarray]
    """By destination, ascending: which of this rank's features, in plan order."""
    receives: dict[int, int]
    """By source, ascending: how many."""
    feature_rows: list[np.ndarray]
    """Per micro-batch: rows of the decoder's input that receive a feature."""
    feature_index: list[np.ndarray]
    """Per micro-batch: which of the received features those are, sources one after another."""

    @property
    def received(self) -> int:
        """Features that arrive."""
        return sum(self.receives.values())


@dataclass(frozen=True)
class ExchangePlan:
    """One rank's windows. Features are rows of `[tokens, hidden]` tensors."""

    encoded_tokens: int
    """Features of what this rank encodes."""
    windows: list[WindowPlan]
    """In the order of their micro-batches, of which each is in one."""


def cut_windows(
    plan: StepPlan, layout: Layout, most: int | None, features: int | None
) -> list[int]:
    """Micro-batches of each window, one after another: as many as both bounds allow, at least one.

    Args:
        plan: the step.
        layout: its ranks.
        most: micro-batches of a window; null: any number.
        features: that a rank receives of a window; null: any number.
    """
    count = len(plan.micro_batches[0])
    tokens = np.zeros((len(plan.micro_batches), count), np.int64)
    np.add.at(tokens, (plan.pictures.replica, plan.pictures.micro_batch), plan.pictures.tokens)
    # No rank embeds more than its slice, and which pictures lie in it matters little.
    ranks = layout.cp * (layout.tp if layout.sequence_parallel else 1)
    slice_tokens = plan.micro_batches[0][0].num_tokens // ranks
    needed = np.minimum(tokens.max(axis=0), slice_tokens).tolist()
    sizes: list[int] = []
    filled = 0
    for size in needed:
        full = not sizes or (most is not None and sizes[-1] >= most)
        if full or (features is not None and filled + size > features):
            sizes.append(0)
            filled = 0
        sizes[-1] += 1
        filled += size
    return sizes


def plan_exchange(
    plan: StepPlan, layout: Layout, rank: int, windows: list[int] | None = None
) -> ExchangePlan:
    """Lists of `rank` for what it and others encode of a step's pictures.

    Args:
        plan: the step.
        layout: its ranks.
        rank: in the world.
        windows: micro-batches of each; null: all in one.
    """
    count = len(plan.micro_batches[0])
    windows = windows or [count]
    slices = _Slices(plan, layout)
    pictures, shares = plan.pictures, plan.shares
    # Features of each share, as tokens of its micro-batch.
    ratio = pictures.patches[shares.picture] // pictures.tokens[shares.picture]
    begins = pictures.start[shares.picture] + shares.first // ratio
    counts = shares.patches // ratio
    replicas, micro_batches = pictures.replica[shares.picture], pictures.micro_batch[shares.picture]

    def spans(mine: np.ndarray) -> Iterator[tuple[int, int, int, np.ndarray]]:
        columns = (column[mine].tolist() for column in (replicas, micro_batches, begins, counts))
        for place, replica, number, start, count in zip(mine.tolist(), *columns, strict=True):
            yield place, replica, number, np.arange(start, start + count)

    window_of = np.repeat(np.arange(len(windows)), windows)
    sends: list[dict[int, list[np.ndarray]]] = [{} for _ in windows]
    encoded = 0
    for _, replica, number, span in spans(np.flatnonzero(shares.rank == rank)):
        for (tp, cp), (chosen, _) in slices.split(replica, number, span):
            target = layout.rank(tp=tp, cp=cp, dp=replica, pp=layout.embedding_stage)
            sends[window_of[number]].setdefault(target, []).append(chosen + encoded)
        encoded += len(span)
    place = layout.coordinates(rank)
    received: list[dict[int, list[tuple[int, np.ndarray]]]] = [{} for _ in windows]
    if place.pp == layout.embedding_stage:
        for share, replica, number, span in spans(np.flatnonzero(replicas == place.dp)):
            parts = dict(slices.split(replica, number, span))
            if (place.tp, place.cp) in parts:
                _, rows = parts[place.tp, place.cp]
                source = int(shares.rank[share])
                received[window_of[number]].setdefault(source, []).append((number, rows))
    firsts = np.cumsum([0, *windows[:-1]]).tolist()
    return ExchangePlan(
        encoded_tokens=encoded,
        windows=[_window(*lists) for lists in zip(firsts, windows, sends, received, strict=True)],
    )


def _window(
    first: int,
    count: int,
    sends: dict[int, list[np.ndarray]],
    received: dict[int, list[tuple[int, np.ndarray]]],
) -> WindowPlan:
    rows_of: list[list[np.ndarray]] = [[] for _ in range(count)]
    index_of: list[list[np.ndarray]] = [[] for _ in range(count)]
    position = 0
    for _, parts in sorted(received.items()):
        for micro_batch, rows in parts:
            rows_of[micro_batch - first].append(rows)
            index_of[micro_batch - first].append(np.arange(position, position + len(rows)))
            position += len(rows)
    return WindowPlan(
        first=first,
        sends={target: np.concatenate(parts) for target, parts in sorted(sends.items())},
        receives={
            source: sum(len(rows) for _, rows in parts)
            for source, parts in sorted(received.items())
        },
        feature_rows=[_joined(parts) for parts in rows_of],
        feature_index=[_joined(parts) for parts in index_of],
    )


class _Slices:
    """Which (tensor, context) rank embeds each token of a micro-batch, and in which row."""

    def __init__(self, plan: StepPlan, layout: Layout) -> None:
        self._plan, self._layout = plan, layout
        self._maps: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def split(
        self, replica: int, micro_batch: int, span: np.ndarray
    ) -> list[tuple[tuple[int, int], tuple[np.ndarray, np.ndarray]]]:
        """For each (tp, cp) rank that embeds tokens of `span`: (which of the span, their rows)."""
        layout = self._layout
        owner, row = self._map(replica, micro_batch)
        found = []
        for cp in range(layout.cp):
            chosen = np.flatnonzero(owner[span] == cp) if layout.cp > 1 else np.arange(len(span))
            rows = row[span[chosen]]
            for tp in range(layout.tp):
                if layout.sequence_parallel:
                    part = self._plan.micro_batches[0][0].num_tokens // layout.cp // layout.tp
                    here = rows // part == tp
                    selected = chosen[here], rows[here] - tp * part
                else:
                    selected = chosen, rows
                if len(selected[0]):
                    found.append(((tp, cp), selected))
        return found

    def _map(self, replica: int, micro_batch: int) -> tuple[np.ndarray, np.ndarray]:
        key = (replica, micro_batch)
        if key not in self._maps:
            cu_seqlens = self._plan.micro_batches[replica][micro_batch].cu_seqlens
            total = int(cu_seqlens[-1])
            owner, row = np.empty(total, dtype=np.int64), np.empty(total, dtype=np.int64)
            for cp in range(self._layout.cp):
                mine = local_tokens(cu_seqlens, self._layout.cp, cp)
                owner[mine], row[mine] = cp, np.arange(len(mine))
            self._maps[key] = owner, row
        return self._maps[key]


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
