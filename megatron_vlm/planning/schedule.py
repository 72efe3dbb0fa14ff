"""How many micro-batches each stage of the pipeline has begun and not yet undone, at its fullest.

A simulation of the order in which one pipeline rank runs its forward and backward passes: plain
1F1B or interleaved, as megatron-core schedules them (interleaved groups of as many micro-batches
as there are pipeline ranks). Hiding the expert all-to-all (combined 1F1B) begins one forward pass
earlier but pairs it with a backward pass, so the order is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_vlm.topology.layout import Layout


def passes(layout: Layout, pp: int) -> Iterator[tuple[int, int]]:
    """The passes of pipeline rank `pp` over one step, in order.

    Yields:
        (chunk, +1) for a forward pass, (chunk, -1) for the backward pass that undoes one.
    """
    forward = list(_chunk_order(layout))
    backward = [layout.num_chunks - 1 - chunk for chunk in forward]
    warmup = min(_warmup(layout, pp), len(forward))
    for number, chunk in enumerate(forward):
        yield chunk, 1
        if number >= warmup:
            yield backward[number - warmup], -1
    for chunk in backward[len(forward) - warmup :]:
        yield chunk, -1


def fullest(layout: Layout, pp: int, chunk_weights: Sequence[float]) -> list[int]:
    """Micro-batches in flight in each chunk of rank `pp` when they weigh most together.

    Args:
        layout: the run's layout, with its number of micro-batches.
        pp: the pipeline rank.
        chunk_weights: what one micro-batch in flight weighs in each chunk, in any unit.
    """
    now = [0] * layout.num_chunks
    best, most = list(now), 0.0
    for chunk, change in passes(layout, pp):
        now[chunk] += change
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


def _chunk_order(layout: Layout) -> Iterator[int]:
    # The layout refuses a number of micro-batches that does not fill every group.
    group = layout.pp if layout.vpp is not None else 1
    for _ in range(layout.num_micro_batches // group):
        for chunk in range(layout.num_chunks):
            yield from [chunk] * group
