"""The order in which each rank of the pipeline runs its passes, and what it holds at its fullest.

Plain 1F1B or interleaved, as megatron-core schedules them (interleaved groups of as many
micro-batches as there are pipeline ranks), or one pass after the other without a pipeline. Hiding
the expert all-to-all (combined 1F1B) begins one forward pass earlier but pairs it with a backward
pass, so the order is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron_vlm.topology.layout import Layout


class Pass(NamedTuple):
    """A micro-batch's forward pass through a model chunk, or the backward pass that undoes it."""

    forward: bool
    chunk: int
    micro_batch: int


def passes(layout: Layout, pp: int) -> Iterator[Pass]:
    """The passes of pipeline rank `pp` over one step, in order."""
    numbers = list(_chunk_order(layout))
    last = layout.num_chunks - 1
    forward = [Pass(True, chunk, micro_batch) for chunk, micro_batch in numbers]
    backward = [Pass(False, last - chunk, micro_batch) for chunk, micro_batch in numbers]
    warmup = min(_warmup(layout, pp), len(forward))
    yield from forward[:warmup]
    for ahead, behind in zip(forward[warmup:], backward, strict=False):
        yield ahead
        yield behind
    yield from backward[len(forward) - warmup :]


def fullest(layout: Layout, pp: int, chunk_weights: Sequence[float]) -> list[int]:
    """Micro-batches in flight in each chunk of rank `pp` when they weigh most together.

    Args:
        layout: the run's layout, with its number of micro-batches.
        pp: the pipeline rank.
        chunk_weights: what one micro-batch in flight weighs in each chunk, in any unit.
    """
    now = [0] * layout.num_chunks
    best, most = list(now), 0.0
    for forward, chunk, _ in passes(layout, pp):
        now[chunk] += 1 if forward else -1
        weight = sum(count * each for count, each in zip(now, chunk_weights, strict=True))
        if weight > most:
            best, most = list(now), weight
    return best


def _warmup(layout: Layout, pp: int) -> int:
    """Forward passes before the first backward pass, the one just before it not counted."""
    behind = layout.pp - pp - 1
    if layout.vpp is None:
        return behind
    return 2 * behind + (layout.vpp - 1) * layout.pp


def _chunk_order(layout: Layout) -> Iterator[tuple[int, int]]:
    """(chunk, micro-batch) of the forward passes."""
    # The layout refuses a number of micro-batches that does not fill every group.
    group = layout.pp if layout.vpp is not None else 1
    for first in range(0, layout.num_micro_batches, group):
        for chunk in range(layout.num_chunks):
            for micro_batch in range(first, first + group):
                yield chunk, micro_batch
