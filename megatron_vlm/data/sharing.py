"""Which rank encodes which picture of a step, over all ranks or within groups of replicas."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.balance import (
    EVEN_ENOUGH,
    EncoderCost,
    Method,
    balance,
    cut_pictures,
    loads_of,
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

        def assign(counts: NDArray[np.int64]) -> tuple[float, tuple[NDArray[np.int64], ...]]:
            picture, first, held = make_parts(patches, counts, self.unit)
            costs = self.cost.part(held, patches[picture])
            assigned = balance(costs, counts, home, replica_of_rank, self.method)
            most = loads_of(costs, assigned, len(ranks)).max()
            return float(most), (mine[picture], ranks[assigned], first, held)

        most, found = assign(np.ones_like(patches))
        mean = float(self.cost.whole(patches).sum()) / len(ranks)
        if self.method == "round_robin" or most <= EVEN_ENOUGH * mean:
            return found
        for counts in cut_pictures(patches, self.cost, len(ranks), self.max_parts, self.unit):
            # Parts cost more in all: they must be worth it.
            after, cut = assign(counts)
            if after < most:
                most, found = after, cut
            if most <= EVEN_ENOUGH * mean:
                break
        return found
