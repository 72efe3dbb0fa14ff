"""Fits samples into rows: best fit with a lookahead, or in order."""

from __future__ import annotations

from collections.abc import Sequence


def pack_best_fit(
    sizes: Sequence[int], capacity: int, max_bins: int | None, first: int = 0
) -> tuple[list[list[int]], list[int]]:
    """Fill bins, longest first, each into the fullest bin that still has room for it.

    Args:
        sizes: of the things, in units of which a bin holds `capacity`; each from 1 to `capacity`.
        capacity: of a bin.
        max_bins: open at most so many; null: as many as it takes.
        first: so many things at the front are placed before all others, so that what waited once
            does not wait for ever.

    Returns:
        The bins, each an ascending list of places in `sizes`, in order of their first member; and
        the places that found no room, ascending.
    """
    bins: list[list[int]] = []
    # Bins by the room they have left, and one bit for each room that some bin has: the lowest bit
    # at or above a size is the best fit.
    with_room: dict[int, list[int]] = {}
    rooms = 0
    left_over: list[int] = []
    order = sorted(range(first), key=sizes.__getitem__, reverse=True)
    order += sorted(range(first, len(sizes)), key=sizes.__getitem__, reverse=True)
    for place in order:
        size = sizes[place]
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            candidates = with_room[room]
            number = candidates.pop()
            if not candidates:
                rooms ^= 1 << room
            bins[number].append(place)
        elif max_bins is None or len(bins) < max_bins:
            room, number = capacity, len(bins)
            bins.append([place])
        else:
            left_over.append(place)
            continue
        room -= size
        if room:
            candidates = with_room.setdefault(room, [])
            if not candidates:
                rooms |= 1 << room
            candidates.append(number)
    return sorted(sorted(members) for members in bins), sorted(left_over)


def pack_in_order(
    sizes: Sequence[int], capacity: int, max_bins: int | None
) -> tuple[list[list[int]], list[int]]:
    """Fill bins in order: one is closed by the first thing that has no room in it.

    Args and returns: as `pack_best_fit`; what is left over is the end of the list.
    """
    bins: list[list[int]] = []
    room = 0
    for place, size in enumerate(sizes):
        if not bins or size > room:
            if len(bins) == max_bins:
                return bins, list(range(place, len(sizes)))
            bins.append([])
            room = capacity
        bins[-1].append(place)
        room -= size
    return bins, []
