"""Which rank encodes which picture of a step, over all ranks or within groups of replicas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.balance import (
    EVEN_ENOUGH,
    EncoderCost,
    Method,
    balance,
    cut_pictures,
    loads_of,
    lower_bound,
    make_parts,
)
from megatron_vlm.data.picture_table import PictureTable, Shares


@dataclass(frozen=True)
class Sharing:
    """How the pictures of a step are shared out; the same on every rank."""

    replica_of_rank: tuple[int, ...]
    """[ranks] data-parallel replica that each belongs to."""
    cost: EncoderCost
    """What encoding a picture costs a rank."""
    method: Method = "greedy"
    groups: int = 1
    """Replicas are divided into so many groups, each of which encodes its own pictures."""
    max_parts: int = 1
    """Most ranks that share one picture."""
    unit: int = 4
    """Patches that stay together: those of a merge block."""
    encodes: tuple[bool, ...] | None = None
    """[ranks] whether each encodes at all, some of every group; null: all do."""

    @property
    def num_replicas(self) -> int:
        """Data-parallel size."""
        return max(self.replica_of_rank) + 1

    @property
    def world_size(self) -> int:
        """Ranks."""
        return len(self.replica_of_rank)

    def shares(self, table: PictureTable) -> Shares:
        """Who encodes what."""
        replicas = np.asarray(self.replica_of_rank)
        encodes = np.ones(self.world_size, bool) if self.encodes is None else self.encodes
        size = self.num_replicas // self.groups
        found = []
        for group in range(self.groups):
            ranks = np.flatnonzero((replicas // size == group) & encodes)
            mine = np.flatnonzero(table.replica // size == group)
            found.append(self._of_group(table, mine, ranks, group * size))
        picture, rank, first, patches = (
            np.concatenate([columns[i] for columns in found]) for i in range(4)
        )
        order = np.lexsort((first, picture))
        return Shares(picture[order], rank[order], first[order], patches[order])

    def costs(self, table: PictureTable, shares: Shares) -> NDArray[np.float64]:
        """[shares] what each costs its rank."""
        return self.cost.part(shares.patches, table.patches[shares.picture])

    def loads(self, table: PictureTable, shares: Shares) -> NDArray[np.float64]:
        """[ranks] what encoding costs each."""
        return loads_of(self.costs(table, shares), shares.rank, self.world_size)

    def _of_group(
        self,
        table: PictureTable,
        mine: NDArray[np.int64],
        ranks: NDArray[np.int64],
        first_replica: int,
    ) -> tuple[NDArray[np.int64], ...]:
        patches = table.patches[mine]
        home = table.replica[mine] - first_replica
        replica_of_rank = [self.replica_of_rank[rank] - first_replica for rank in ranks]

        def assign(counts: NDArray[np.int64]) -> _Assigned:
            picture, first, held = make_parts(patches, counts, self.unit)
            costs = self.cost.part(held, patches[picture])
            assigned = balance(costs, counts, home, replica_of_rank, self.method)
            loads = loads_of(costs, assigned, len(ranks))
            shares = (mine[picture], ranks[assigned], first, held)
            return _Assigned(float(loads.max()), float(loads.mean()), shares)

        whole = self.cost.whole(patches)
        mean, best = float(whole.sum()) / len(ranks), None
        evenly_whole = lower_bound(whole, len(ranks)) <= EVEN_ENOUGH * mean
        if evenly_whole or self.method == "round_robin":
            best = assign(np.ones_like(patches))
            if self.method == "round_robin" or best.most <= EVEN_ENOUGH * mean:
                return best.shares
        for counts in cut_pictures(patches, self.cost, len(ranks), self.max_parts, self.unit):
            # Parts cost more in all: they must be worth it, and more of them are not if these
            # are dealt out evenly.
            cut = assign(counts)
            if best is None or cut.most < best.most:
                best = cut
            if cut.most <= EVEN_ENOUGH * cut.mean:
                break
        if best is None or (not evenly_whole and best.most >= whole.max()):
            uncut = assign(np.ones_like(patches))
            if best is None or uncut.most <= best.most:
                best = uncut
        return best.shares


class _Assigned(NamedTuple):
    most: float
    """Load of the dearest rank."""
    mean: float
    """Of all, messages included."""
    shares: tuple[NDArray[np.int64], ...]
    """Columns of `Shares`."""
