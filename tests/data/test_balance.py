"""Who encodes what, against brute force, bounds, and invariants that must hold whatever it is."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_vlm.data.balance import (
    EncoderCost,
    assign_greedy,
    assign_karmarkar_karp,
    assign_near,
    balance,
    bring_home,
    cut_pictures,
    loads_of,
    lower_bound,
    make_parts,
)
from megatron_vlm.data.picture_table import PicturePlan, PictureTable
from megatron_vlm.data.sharing import Sharing

pytestmark = pytest.mark.unit

FLOPS = EncoderCost(0.0, 2.4e9, 2.6e5)
"""About dots.vlm1's encoder: at 9,000 patches attention costs as much as all else."""


def _photographs(rng: np.random.Generator, count: int) -> NDArray[np.int64]:
    """Patches of pictures around 0.6 megapixels, a few up to 11.3."""
    pixels = np.exp(rng.normal(np.log(0.6e6), 0.9, count)).clip(784, 11.3e6)
    return (np.maximum(pixels // 784, 1) * 4).astype(np.int64)


def _ones(costs: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.ones(len(costs), np.int64)


def test_costs() -> None:
    cost = EncoderCost(5.0, 2.0, 0.5, per_shared_patch=0.25)
    assert cost.whole(np.array([4, 8])).tolist() == [5 + 8 + 8, 5 + 16 + 32]
    # Each patch of a part attends to the whole picture.
    assert cost.part(np.array([4, 8, 8]), np.array([12, 12, 8])).tolist() == [
        5 + 8 + 24 + 3, 5 + 16 + 48 + 3, 5 + 16 + 32,
    ]  # fmt: skip


def test_greedy_by_hand() -> None:
    costs = np.array([3.0, 9, 4, 8, 4])
    # 9 | 8 | 4 | then 4 to the third, 3 to the second or third with 8.
    assert assign_greedy(costs, _ones(costs), 3).tolist() == [1, 0, 2, 1, 2]
    # A picture of three parts goes to three ranks, before anything less dear than its dearest part.
    parts = np.array([1.0, 5, 5, 5, 6])
    assert assign_greedy(parts, np.array([1, 3, 1]), 4).tolist() == [1, 1, 2, 3, 0]
    assert assign_greedy(np.zeros(0), np.zeros(0, np.int64), 3).tolist() == []


def test_differencing_beats_greedy_where_pictures_are_few() -> None:
    costs = np.array([8.0, 7, 6, 5, 4])
    found = assign_karmarkar_karp(costs, _ones(costs), 2)
    assert loads_of(costs, found, 2).max() == 16  # as in Karmarkar and Karp's own example
    greedy = assign_greedy(costs, _ones(costs), 2)
    assert loads_of(costs, greedy, 2).max() == 17


@pytest.mark.parametrize("method", ["greedy", "karmarkar_karp"])
def test_close_to_the_best_of_all_assignments(method: str) -> None:
    rng = np.random.default_rng(2)
    assign = assign_greedy if method == "greedy" else assign_karmarkar_karp
    for _ in range(20):
        costs = rng.uniform(1, 10, 7)
        best = min(
            loads_of(costs, np.array(choice), 3).max() for choice in product(range(3), repeat=7)
        )
        found = loads_of(costs, assign(costs, _ones(costs), 3), 3).max()
        # 4/3 - 1/(3m) is what Graham proved of the greedy rule.
        assert lower_bound(costs, 3) - 1e-9 <= best <= found <= best * (4 / 3 - 1 / 9)


def _cuts(patches: list[int], ranks: int, most: int) -> list[list[int]]:
    cost = EncoderCost(0.0, 1.0, 0.0)
    return [c.tolist() for c in cut_pictures(np.array(patches, np.int64), cost, ranks, most, 4)]


def test_what_is_cut_and_in_what_order() -> None:
    # Mean load 80 on 4 ranks: none is dearer than the half of it.
    assert _cuts([40] * 8, 4, 4) == []
    # Mean load 60: 160 exceeds it, 40 the half; parts are of at most a third.
    assert _cuts([160, 40, 20, 20], 4, 4) == [[4, 1, 1, 1], [4, 2, 1, 1]]
    assert _cuts([160, 40, 20, 20], 4, 2) == [[2, 1, 1, 1], [2, 2, 1, 1]]
    assert _cuts([160, 40, 20, 20], 4, 1) == []
    # Three ranks cannot hold four of about two thirds of the mean: one of them is cut.
    assert _cuts([44, 40, 40, 40, 4, 4, 4, 4], 3, 4)[0] == [3, 1, 1, 1, 1, 1, 1, 1]
    # No more parts than merge blocks, or than ranks.
    assert _cuts([8], 4, 4) == [[2]]
    assert _cuts([800], 3, 64) == [[3]]
    assert _cuts([], 4, 4) == []


def test_as_many_as_there_are_too_many_are_cut() -> None:
    """Pages of about two thirds of a rank's mean load, a few more than there are ranks."""
    rng = np.random.default_rng(0)
    patches = rng.permutation(np.repeat([30_000, 31_000, 2_000, 8_000], [130, 140, 3_000, 300]))
    table = _table(patches.tolist(), rng.integers(0, 32, len(patches)).tolist())
    homes = tuple(np.tile(np.arange(32), 8).tolist())
    mean = float(FLOPS.whole(patches).sum()) / 256
    assert 0.5 * mean < FLOPS.whole(np.array([30_000]))[0] < 0.75 * mean
    loads = {most: Sharing(homes, FLOPS, max_parts=most) for most in (1, 8)}
    found = {most: s.loads(table, s.shares(table)).max() / mean for most, s in loads.items()}
    assert found[1] > 1.2 and found[8] < 1.02


def test_parts_are_whole_blocks_and_all_of_the_picture() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        patches = rng.integers(1, 100, 12) * 4
        counts = np.minimum(rng.integers(1, 9, 12), patches // 4)
        picture, first, held = make_parts(patches, counts, 4)
        assert np.bincount(picture).tolist() == counts.tolist()
        assert not (first % 4).any() and not (held % 4).any() and held.min() >= 4
        for number, total in enumerate(patches.tolist()):
            mine = picture == number
            bounds = np.cumsum(np.append(0, held[mine]))
            assert bounds[-1] == total and first[mine].tolist() == bounds[:-1].tolist()
            assert held[mine].max() - held[mine].min() <= 4


@pytest.mark.parametrize("method", ["greedy", "karmarkar_karp", "round_robin"])
@pytest.mark.parametrize(("ranks", "replicas"), [(8, 1), (8, 4), (24, 3)])
def test_parts_of_a_picture_are_on_ranks_of_their_own(
    method: str, ranks: int, replicas: int
) -> None:
    rng = np.random.default_rng(ranks)
    for count in (1, 3, 40):
        patches = _photographs(rng, count)
        patches[0] = 40_000
        *_, counts = cut_pictures(patches, FLOPS, ranks, 8, 4)
        assert counts.max() > 1
        picture, _, held = make_parts(patches, counts, 4)
        costs = FLOPS.part(held, patches[picture])
        home = rng.integers(0, replicas, count)
        replica_of_rank = [rank * replicas // ranks for rank in range(ranks)]
        found = balance(costs, counts, home, replica_of_rank, method)  # type: ignore[arg-type]
        again = balance(costs, counts, home, replica_of_rank, method)  # type: ignore[arg-type]
        assert found.tolist() == again.tolist()
        assert 0 <= found.min() and found.max() < ranks
        for number in range(count):
            mine = found[picture == number]
            assert (np.diff(mine) > 0).all()


@pytest.mark.parametrize(("ranks", "replicas", "bound"), [(8, 2, 1.02), (256, 32, 1.05)])
@pytest.mark.parametrize("method", ["greedy", "karmarkar_karp"])
def test_near_the_lower_bound(method: str, ranks: int, replicas: int, bound: float) -> None:
    rng = np.random.default_rng(7)
    patches = _photographs(rng, 16 * ranks)
    counts = next(cut_pictures(patches, FLOPS, ranks, 8, 4), np.ones_like(patches))
    picture, _, held = make_parts(patches, counts, 4)
    costs = FLOPS.part(held, patches[picture])
    home = rng.integers(0, replicas, len(patches))
    replica_of_rank = [rank * replicas // ranks for rank in range(ranks)]
    found = balance(costs, counts, home, replica_of_rank, method)  # type: ignore[arg-type]
    most = loads_of(costs, found, ranks).max()
    assert most <= bound * lower_bound(costs, ranks)
    in_turn = balance(costs, counts, home, replica_of_rank, "round_robin")
    assert loads_of(costs, in_turn, ranks).max() > 1.2 * most


def test_pictures_stay_at_home_where_that_costs_nothing() -> None:
    rng = np.random.default_rng(5)
    patches = _photographs(rng, 400)
    costs = FLOPS.whole(patches)
    home, replica_of_rank = rng.integers(0, 4, 400), np.arange(16) // 4
    counts = _ones(costs)
    near = assign_near(costs, counts, home, replica_of_rank.tolist(), 1.01 * costs.sum() / 16)
    greedy = assign_greedy(costs, counts, 16)
    at_home = [np.mean(replica_of_rank[found] == home) for found in (near, greedy)]
    assert at_home[0] > 0.6 > at_home[1] + 0.3
    assert loads_of(costs, near, 16).max() <= 1.01 * costs.sum() / 16
    # No room at home: to the least loaded of all.
    tight = assign_near(costs, counts, home, replica_of_rank.tolist(), costs.sum() / 16)
    assert loads_of(costs, tight, 16).max() <= 1.01 * loads_of(costs, greedy, 16).max()
    # The same sets on other ranks.
    moved = bring_home(costs, counts, greedy, home, replica_of_rank.tolist())
    assert sorted(loads_of(costs, moved, 16)) == pytest.approx(
        sorted(loads_of(costs, greedy, 16)), rel=1e-12
    )
    assert np.mean(replica_of_rank[moved] == home) > at_home[1]


def _table(patches: list[int], replicas: list[int]) -> PictureTable:
    return PictureTable.of(
        [
            PicturePlan(0, 0, number, 0, 2, count // 2, replica, 0, 0, count // 4)
            for number, (count, replica) in enumerate(zip(patches, replicas, strict=True))
        ]
    )


def test_some_ranks_encode_and_others_do_not() -> None:
    """Two replicas of four ranks, of which the first two each encode."""
    table = _table([36, 16, 28, 12, 32, 20], [0, 0, 0, 1, 1, 1])
    encodes = (True, True, False, False) * 2
    sharing = Sharing((0,) * 4 + (1,) * 4, FLOPS, groups=2, max_parts=4, encodes=encodes)
    shares = sharing.shares(table)
    assert set(shares.rank.tolist()) == {0, 1, 4, 5}
    own = table.replica[shares.picture]
    assert (shares.rank // 4 == own).all()
    assert np.bincount(shares.picture, shares.patches).tolist() == table.patches.tolist()


def test_groups_keep_to_themselves() -> None:
    rng = np.random.default_rng(1)
    replicas = rng.integers(0, 4, 60).tolist()
    patches = _photographs(rng, 60).tolist()
    # Ranks of a replica need not be neighbours: two pipeline stages of four replicas.
    sharing = Sharing((0, 1, 2, 3) * 2, FLOPS, groups=2, max_parts=4)
    table = _table(patches, replicas)
    shares = sharing.shares(table)
    group_of_rank = np.array([0, 0, 1, 1] * 2)
    assert (group_of_rank[shares.rank] == table.replica[shares.picture] // 2).all()
    assert np.bincount(shares.picture, shares.patches).tolist() == patches
    order = np.lexsort((shares.first, shares.picture))
    assert order.tolist() == list(range(len(shares)))
    assert shares.picture[shares.owner].tolist() == list(range(60))
    assert sharing.loads(table, shares).sum() == pytest.approx(sharing.costs(table, shares).sum())


def test_nothing_to_share() -> None:
    shares = Sharing((0, 0, 1, 1), FLOPS, groups=2).shares(_table([], []))
    assert len(shares) == 0 and shares.rank.dtype == np.int64
