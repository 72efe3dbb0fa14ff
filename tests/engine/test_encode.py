"""How a rank's share of the encoder is cut: nothing lost, agreed on, and within its memory."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_vlm.data.picture_table import PicturePlan, PictureTable, Shares
from megatron_vlm.data.plan import StepPlan
from megatron_vlm.engine.encode import Budget, plan_chunks
from tests.engine.plans import bare_layout, random_plan

pytestmark = pytest.mark.unit


def step_of(pictures: list[tuple[int, int]], shares: list[tuple[int, int, int]]) -> StepPlan:
    """A plan of pictures (micro-batch, blocks) and shares (picture, rank, blocks of 4 patches)."""
    layout = bare_layout(dp=4)
    base = random_plan(np.random.default_rng(0), layout, 3, 1, 24, 4, 0.0)
    table = PictureTable.of(
        [PicturePlan(0, 0, 0, 0, 2, 2 * size, 0, micro, 0, size) for micro, size in pictures]
    )
    first: list[int] = []
    done: dict[int, int] = {}
    for picture, _, size in shares:
        first.append(4 * done.get(picture, 0))
        done[picture] = done.get(picture, 0) + size
    columns = np.array(shares, np.int64).reshape(-1, 3).T
    made = Shares(columns[0], columns[1], np.array(first, np.int64), 4 * columns[2])
    return StepPlan(
        0,
        base.micro_batches,
        table,
        made,
        base.document_loss_tokens,
        base.document_tokens,
        base.document_samples,
        int(table.patches.sum()),
    )


PICTURES = [(0, 6), (2, 2), (1, 3), (0, 1), (2, 5), (0, 4)]
SHARES = [(0, 0, 3), (0, 1, 3), (1, 0, 2), (2, 0, 3), (3, 0, 1), (4, 0, 2), (4, 2, 3), (5, 0, 4)]
"""Rank 0 has half of the first picture, part of the fifth, and all of four others."""


def budget(plan: StepPlan, patches: int | None) -> Budget | None:
    """As if what ranks share took no more memory than its own patches."""
    if patches is None:
        return None
    return Budget(patches, plan.shares.patches.astype(np.float64))


def test_without_bounds_all_goes_at_once() -> None:
    plan = step_of(PICTURES, SHARES)
    (only,) = plan_chunks(plan, 0, 3, None)
    assert sorted(only.segments) == [0, 1, 2, 3, 4, 5] and only.kept and only.early
    assert sorted(only.features.tolist()) == list(range(15))
    (blank,) = plan_chunks(plan, 3, 3, None)
    assert blank.segments == [] and len(blank.features) == 0 and blank.kept


def test_the_first_window_goes_first() -> None:
    early, late = plan_chunks(step_of(PICTURES, SHARES), 0, 1, None)
    # Shared pictures, whatever their window: the first and the fifth; then the first window's.
    assert early.segments == [0, 4, 3, 5] and early.early
    assert late.segments == [2, 1] and not late.early
    # In the order of the plan a rank's features are 3, 2, 3, 1, 2 and 4 long.
    assert late.features.tolist() == [5, 6, 7, 3, 4]


def test_what_is_shared_weighs_more() -> None:
    """Twelve patches of the first picture, with its keys and values, as heavy as twenty-one."""
    plan = step_of(PICTURES, SHARES)
    weights = plan.shares.patches.astype(np.float64)
    weights[:2] = 21
    chunks = plan_chunks(plan, 0, 3, Budget(40, weights))
    assert [(c.segments, c.kept) for c in chunks][:2] == [([0], False), ([4], True)]


def test_chunks_keep_to_the_memory() -> None:
    plan = step_of(PICTURES, SHARES)
    # 40 patches: 20 for what is kept, 20 for what is encoded again.
    chunks = plan_chunks(plan, 0, 3, budget(plan, 40))
    assert [c.segments for c in chunks] == [[0], [4], [3, 5], [2, 1]]
    # 12 and 8 patches of the shared ones, then 20 and 20 of the others.
    assert [c.kept for c in chunks] == [True, True, False, False]
    # All 60 fit in 60, though not in the half that shared pictures may take with the others.
    assert all(c.kept for c in plan_chunks(plan, 0, 3, budget(plan, 60)))


def test_sharers_agree_on_what_is_kept() -> None:
    # Rank 1 has no room for its part of the second picture: neither keeps it.
    pictures = [(0, 6), (0, 4), (0, 2)]
    shares = [(0, 1, 4), (0, 2, 2), (1, 0, 1), (1, 1, 3), (2, 0, 1), (2, 2, 1)]
    plan = step_of(pictures, shares)
    kept = {
        (rank, int(plan.shares.picture[plan.shares.rank == rank][chunk.segments[0]])): chunk.kept
        for rank in range(3)
        for chunk in plan_chunks(plan, rank, 3, budget(plan, 48))
    }
    assert kept == {
        (0, 1): False, (1, 1): False, (1, 0): True, (2, 0): True, (0, 2): True, (2, 2): True
    }  # fmt: skip


@pytest.mark.parametrize("room", [None, 2, 3])
@pytest.mark.parametrize("window", [1, 2, 4])
def test_every_feature_is_encoded_once(window: int, room: int | None) -> None:
    """`room` is the memory, in pictures as large as the largest."""
    layout = bare_layout(dp=2, pp=2)
    for seed in range(6):
        plan = random_plan(np.random.default_rng(seed), layout, 4, 1, 48, 4, 0.8)
        patches = room and room * int(plan.pictures.patches.max())
        for rank in range(layout.world_size):
            chunks = plan_chunks(plan, rank, window, budget(plan, patches))
            mine = np.flatnonzero(plan.shares.rank == rank)
            sizes = plan.shares.patches[mine]
            assert sorted(s for c in chunks for s in c.segments) == list(range(len(mine)))
            features = np.concatenate([c.features for c in chunks])
            assert sorted(features.tolist()) == list(range(int(sizes.sum()) // 4))
            early = [c.early for c in chunks]
            assert early == sorted(early, reverse=True)
            for chunk in chunks:
                numbers = plan.shares.picture[mine[chunk.segments]]
                shared = np.bincount(plan.shares.picture)[numbers] > 1
                soon = plan.pictures.micro_batch[numbers] < window
                assert (soon | shared).all() if chunk.early else not (soon | shared).any()
            if patches is not None:
                held = sum(int(sizes[c.segments].sum()) for c in chunks if c.kept)
                again = [int(sizes[c.segments].sum()) for c in chunks if not c.kept]
                assert held + max(again, default=0) <= patches
