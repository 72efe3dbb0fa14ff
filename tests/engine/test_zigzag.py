"""Which tokens a context-parallel rank holds: all of them once, in the engine's order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_vlm.engine.zigzag import gathered_order, local_tokens

pytestmark = pytest.mark.unit


def _bounds(*lengths: int) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)


def test_by_hand() -> None:
    bounds = _bounds(8, 4)
    # Segment 0 in quarters: 01 23 45 67; segment 1: 8 9 10 11. Rank 0 has the outer ones.
    assert local_tokens(bounds, 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert local_tokens(bounds, 2, 1).tolist() == [2, 3, 4, 5, 9, 10]
    # Ranks end to end: 0 1 6 7 8 11 2 3 4 5 9 10; where is token t?
    assert gathered_order(bounds, 2).tolist() == [0, 1, 6, 7, 8, 9, 2, 3, 4, 10, 11, 5]


def test_by_hand_three_ranks() -> None:
    bounds = _bounds(6)
    assert [local_tokens(bounds, 3, rank).tolist() for rank in range(3)] == [[0, 5], [1, 4], [2, 3]]


@pytest.mark.parametrize("cp", [1, 2, 3, 4, 8])
def test_coverage_and_order(cp: int) -> None:
    rng = np.random.default_rng(cp)
    for _ in range(20):
        bounds = _bounds(*(2 * cp * rng.integers(0, 6, rng.integers(1, 9))))
        total = int(bounds[-1])
        parts = [local_tokens(bounds, cp, rank) for rank in range(cp)]
        assert {len(part) for part in parts} == {total // cp}
        laid = np.concatenate(parts)
        assert sorted(laid.tolist()) == list(range(total)), "every token on one rank"
        assert np.array_equal(laid[gathered_order(bounds, cp)], np.arange(total))
        for part in parts:
            # Segment after segment, ascending in each: causal masks rely on it.
            assert np.all(np.diff(part) > 0)
            segment = np.searchsorted(bounds, part, side="right")
            counts = np.bincount(segment, minlength=len(bounds))[1 : len(bounds)]
            assert np.array_equal(counts, np.diff(bounds) // cp)


@pytest.mark.parametrize("cp", [2, 4])
def test_causal_work_is_even(cp: int) -> None:
    lengths = [2 * cp * size for size in (5, 1, 3)]
    bounds, within = _bounds(*lengths), np.concatenate([np.arange(length) for length in lengths])
    work = {int((within[local_tokens(bounds, cp, rank)] + 1).sum()) for rank in range(cp)}
    assert len(work) == 1


@pytest.mark.parametrize("cp", [2, 4])
def test_one_segment_is_cut_as_by_the_engine(monkeypatch: pytest.MonkeyPatch, cp: int) -> None:
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    length = 6 * 2 * cp
    monkeypatch.setattr(parallel_state, "get_context_parallel_world_size", lambda: cp)
    for rank in range(cp):
        monkeypatch.setattr(parallel_state, "get_context_parallel_rank", lambda rank=rank: rank)
        theirs = get_batch_on_this_cp_rank({"tokens": torch.arange(length).view(1, length)})
        mine = local_tokens(_bounds(length), cp, rank)
        assert mine.tolist() == theirs["tokens"].flatten().tolist()
