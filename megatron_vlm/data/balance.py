"""Who encodes what: pictures dealt out over ranks so that none waits long for another.

Pure functions of costs, so that every rank finds the same answer alone. Costs are of one window of
micro-batches, since ranks wait for each other's features once a window.

Greedy: dearest first, each to the least loaded rank (LPT; Graham 1969). Karmarkar-Karp: the largest
differencing method for several sets (Karmarkar and Karp 1982), closer to even where pictures are
few, slower where ranks are many. A picture dearer than a rank's fair share is cut into parts first:
no assignment of whole pictures could be even.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Method = Literal["greedy", "karmarkar_karp", "round_robin"]

_PART_SHARE = 1 / 3
"""Parts of a picture that is cut are at most so much of a rank's mean load. Our choice."""
EVEN_ENOUGH = 1.02
"""Pictures stay whole where the dearest rank has at most so much of the mean."""
_COSTS_NOTHING = 1.004
"""Pictures stay with their replicas as long as no rank has more than so much of the lower bound.
Our choice."""


@dataclass(frozen=True)
class EncoderCost:
    """Seconds (or any other unit) that a rank takes to encode a picture, or a part of one."""

    per_picture: float
    per_patch: float
    per_pair: float
    """For each pair of a patch and a patch that it attends to."""
    per_shared_patch: float = 0.0
    """For each patch of a picture that several ranks share, on each of them: keys and values
    travel."""

    def whole(self, patches: NDArray[np.int64]) -> NDArray[np.float64]:
        """[pictures] cost of each."""
        count = patches.astype(np.float64)
        return self.per_picture + count * (self.per_patch + count * self.per_pair)

    def part(self, patches: NDArray[np.int64], of: NDArray[np.int64]) -> NDArray[np.float64]:
        """[parts] cost of each part of `patches` out of a picture of `of`."""
        own, total = patches.astype(np.float64), of.astype(np.float64)
        shared = np.where(patches < of, total * self.per_shared_patch, 0.0)
        return self.per_picture + own * (self.per_patch + total * self.per_pair) + shared


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """What ranks encode; a picture that is not cut is one part. Each int64 [parts].

    By picture, then by place in the picture.
    """

    picture: NDArray[np.int64]
    """Number of its picture."""
    rank: NDArray[np.int64]
    """Who encodes it."""
    first: NDArray[np.int64]
    """First of the picture's patches that it holds."""
    patches: NDArray[np.int64]
    """Patches that it holds."""


def cut_pictures(
    patches: NDArray[np.int64], cost: EncoderCost, ranks: int, max_parts: int, unit: int
) -> Iterator[NDArray[np.int64]]:
    """Into how many parts each picture may be cut, in the order in which to try.

    Pictures dearer than half of a rank's mean load cannot share a rank. So those dearer than the
    mean are cut, and as many more, the dearest first, as there are too many for the ranks; then
    all of them.

    Args:
        patches: [pictures] of each.
        cost: of encoding.
        ranks: that share the pictures.
        max_parts: most parts of one picture.
        unit: patches that cannot be parted (a merge block).

    Yields:
        int64 [pictures], 1 where one stays whole; nothing where there is nothing to cut.
    """
    most = min(max_parts, ranks)
    if most < 2 or not len(patches):
        return
    costs = cost.whole(patches)
    mean = costs.sum() / ranks
    wanted = np.ceil(costs / (mean * _PART_SHARE)).astype(np.int64)
    parts = np.maximum(np.minimum(np.minimum(wanted, most), patches // unit), 1)
    dearest = np.argsort(-costs, kind="stable")
    large = int((costs > mean / 2).sum())
    few = min(int((costs > mean).sum()) + max(0, large - ranks), large)
    for number in dict.fromkeys((few, large)):
        counts = np.ones(len(patches), np.int64)
        counts[dearest[:number]] = parts[dearest[:number]]
        if counts.max() > 1:
            yield counts


def make_parts(
    patches: NDArray[np.int64], counts: NDArray[np.int64], unit: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(picture, first, patches) of each part, as even as whole merge blocks allow."""
    picture = np.repeat(np.arange(len(patches)), counts)
    place = np.arange(len(picture)) - np.repeat(np.cumsum(counts) - counts, counts)
    blocks = np.repeat(patches // unit, counts)
    parts = np.repeat(counts, counts)
    first = blocks * place // parts * unit
    return picture, first, blocks * (place + 1) // parts * unit - first


def assign_greedy(
    costs: NDArray[np.float64], counts: NDArray[np.int64], ranks: int
) -> NDArray[np.int64]:
    """Dearest first, each to the least loaded rank, the lowest of several.

    Args:
        costs: [parts] of each, the parts of a picture next to each other.
        counts: [pictures] parts of each.
        ranks: at least as many as parts of any picture.

    Returns:
        int64 [parts], from 0 to below `ranks`; those of a picture ascend and differ.
    """
    found = np.zeros(len(costs), np.int64)
    first = np.cumsum(counts) - counts
    dearest = np.maximum.reduceat(costs, first) if len(counts) else costs
    loads = [(0.0, rank) for rank in range(ranks)]
    listed, parts, starts = costs.tolist(), counts.tolist(), first.tolist()
    placed: list[tuple[int, int]] = []
    for picture in np.argsort(-dearest, kind="stable").tolist():
        place = starts[picture]
        if parts[picture] == 1:
            load, rank = loads[0]
            heapq.heapreplace(loads, (load + listed[place], rank))
            placed.append((place, rank))
            continue
        chosen = sorted(
            (heapq.heappop(loads) for _ in range(parts[picture])), key=lambda entry: entry[1]
        )
        for number, (load, rank) in enumerate(chosen, place):
            heapq.heappush(loads, (load + listed[number], rank))
            placed.append((number, rank))
    if placed:
        places, chosen_ranks = zip(*placed, strict=True)
        found[list(places)] = chosen_ranks
    return found


def assign_karmarkar_karp(
    costs: NDArray[np.float64], counts: NDArray[np.int64], ranks: int
) -> NDArray[np.int64]:
    """Largest differencing: the two most uneven partial assignments are joined, the heaviest sets
    of one with the lightest of the other, until one is left.

    Args and returns: as `assign_greedy`.
    """
    heap: list[tuple[float, int, NDArray[np.float64], list[list[int]]]] = []
    place = 0
    for number, count in enumerate(counts.tolist()):
        loads = np.zeros(ranks)
        # Parts of a picture start in different sets and are never joined.
        loads[:count] = -np.sort(-costs[place : place + count])
        order = np.argsort(-costs[place : place + count], kind="stable")
        sets = [[place + int(member)] for member in order] + [[] for _ in range(ranks - count)]
        heap.append((loads[-1] - loads[0], number, loads, sets))
        place += count
    heapq.heapify(heap)
    number = len(heap)
    while len(heap) > 1:
        _, _, one, ours = heapq.heappop(heap)
        _, _, other, theirs = heapq.heappop(heap)
        joined = one + other[::-1]
        order = np.argsort(-joined, kind="stable")
        sets = [ours[rank] + theirs[ranks - 1 - rank] for rank in order.tolist()]
        joined = joined[order]
        heapq.heappush(heap, (joined[-1] - joined[0], number, joined, sets))
        number += 1
    found = np.zeros(len(costs), np.int64)
    for rank, members in enumerate(heap[0][3] if heap else ()):
        found[members] = rank
    return _ascending(found, counts)


def assign_round_robin(counts: NDArray[np.int64], ranks: int) -> NDArray[np.int64]:
    """In turn, whatever they cost: what balancing is compared with."""
    found: NDArray[np.int64] = np.arange(int(counts.sum()), dtype=np.int64) % ranks
    return _ascending(found, counts)


def loads_of(
    costs: NDArray[np.float64], assigned: NDArray[np.int64], ranks: int
) -> NDArray[np.float64]:
    """[ranks] summed costs."""
    return np.asarray(np.bincount(assigned, costs, ranks), np.float64)


def lower_bound(costs: NDArray[np.float64], ranks: int) -> float:
    """No assignment's dearest rank has less: the mean load, or the dearest part."""
    return float(max(costs.sum() / ranks, costs.max())) if len(costs) else 0.0


def assign_near(
    costs: NDArray[np.float64],
    counts: NDArray[np.int64],
    home: NDArray[np.int64],
    replica_of_rank: Sequence[int],
    bound: float,
) -> NDArray[np.int64]:
    """Dearest first, each to the least loaded rank of its own replica while that stays below a
    bound, else to the least loaded of all.

    Args:
        costs: [parts] of each, the parts of a picture next to each other.
        counts: [pictures] parts of each.
        home: [pictures] replica of each.
        replica_of_rank: [ranks].
        bound: most load of a rank by a picture of its replica.

    Returns:
        As `assign_greedy`.
    """
    ranks = len(replica_of_rank)
    cut = np.repeat(counts > 1, counts)
    found = np.zeros(len(costs), np.int64)
    # What is cut is dearest, and goes to any ranks: they exchange more than features.
    found[cut] = assign_greedy(costs[cut], counts[counts > 1], ranks)
    loads = loads_of(costs[cut], found[cut], ranks).tolist()
    everyone = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(everyone)
    at_home: list[list[tuple[float, int]]] = [[] for _ in range(max(replica_of_rank) + 1)]
    for rank, replica in enumerate(replica_of_rank):
        at_home[replica].append((loads[rank], rank))
    for heap in at_home:
        heapq.heapify(heap)
    whole = np.flatnonzero(~cut)
    order = whole[np.argsort(-costs[whole], kind="stable")]
    homes = np.repeat(home, counts)[order].tolist()
    placed: list[int] = []
    for cost, replica in zip(costs[order].tolist(), homes, strict=True):
        rank = _lightest(at_home[replica], loads)
        if loads[rank] + cost > bound:
            rank = _lightest(everyone, loads)
        loads[rank] += cost
        # Older entries of the rank lie in the heaps until they come up and are out of date.
        heapq.heappush(at_home[replica_of_rank[rank]], (loads[rank], rank))
        heapq.heappush(everyone, (loads[rank], rank))
        placed.append(rank)
    found[order] = placed
    return found


def _lightest(heap: list[tuple[float, int]], loads: list[float]) -> int:
    while heap[0][0] != loads[heap[0][1]]:
        heapq.heappop(heap)
    return heap[0][1]


def bring_home(
    costs: NDArray[np.float64],
    counts: NDArray[np.int64],
    assigned: NDArray[np.int64],
    home: NDArray[np.int64],
    replica_of_rank: Sequence[int],
) -> NDArray[np.int64]:
    """The same sets of pictures on other ranks: each on a free rank of the replica that most of its
    load belongs to, so that fewer features leave their replica.

    Args:
        costs: [parts] of each.
        counts: [pictures] parts of each.
        assigned: [parts] their ranks.
        home: [pictures] replica of each.
        replica_of_rank: [ranks].

    Returns:
        [parts] ranks.
    """
    ranks, replicas = len(replica_of_rank), max(replica_of_rank) + 1
    # Ranks that share a picture keep their places: they are neighbours.
    fixed = np.zeros(ranks, bool)
    fixed[assigned[np.repeat(counts > 1, counts)]] = True
    held = np.zeros((ranks, replicas))
    np.add.at(held, (assigned, np.repeat(home, counts)), costs)
    free: list[list[int]] = [[] for _ in range(replicas)]
    for rank in range(ranks - 1, -1, -1):
        if not fixed[rank]:
            free[replica_of_rank[rank]].append(rank)
    new = np.where(fixed, np.arange(ranks), -1)
    sets, theirs = np.nonzero(held * ~fixed[:, None])
    order = np.argsort(-held[sets, theirs], kind="stable")
    for old, replica in zip(sets[order].tolist(), theirs[order].tolist(), strict=True):
        if new[old] < 0 and free[replica]:
            new[old] = free[replica].pop()
    rest = iter(sorted(rank for ranks_left in free for rank in ranks_left))
    for old in np.flatnonzero(new < 0).tolist():
        new[old] = next(rest)
    return _ascending(np.asarray(new[assigned], np.int64), counts)


def balance(
    costs: NDArray[np.float64],
    counts: NDArray[np.int64],
    home: NDArray[np.int64],
    replica_of_rank: Sequence[int],
    method: Method,
) -> NDArray[np.int64]:
    """The rank of each part.

    Among balances that are equally good, one that leaves pictures with their replicas.

    Args:
        costs: [parts] of each, the parts of a picture next to each other.
        counts: [pictures] parts of each.
        home: [pictures] replica of each.
        replica_of_rank: [ranks].
        method: how.
    """
    ranks = len(replica_of_rank)
    if method == "round_robin":
        return assign_round_robin(counts, ranks)
    if method == "greedy":
        bound = lower_bound(costs, ranks) * _COSTS_NOTHING
        return assign_near(costs, counts, home, replica_of_rank, bound)
    found = assign_karmarkar_karp(costs, counts, ranks)
    return bring_home(costs, counts, found, home, replica_of_rank)


def _ascending(assigned: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Parts of a picture in the order of their ranks."""
    picture = np.repeat(np.arange(len(counts)), counts)
    return assigned[np.lexsort((assigned, picture))]
