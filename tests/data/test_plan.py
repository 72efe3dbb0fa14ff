"""Plans: the same rows and pictures for every layout, and offsets worked out by hand."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from megatron_vlm.data.plan import (
    EMPTY_ROW,
    assign_pictures,
    held_out_batches,
    plan_rows,
)
from megatron_vlm.data.rows import RowSource
from megatron_vlm.errors import ConfigError
from tests.data.samples import VISION, data_config, index_of, plan_facts, plan_step

pytestmark = pytest.mark.unit


def small_source() -> RowSource:
    """Rows of 64, unshuffled: [0 and 1], [2], [3 and 4]."""
    pictures = [[(2, 28, 56), (5, 56, 56)], [], [(0, 84, 84)], [], []]
    # lengths 12 - 2 + 2 + 4 = 16, 20, 30 - 1 + 9 = 38, 20, 16
    index = index_of([12, 20, 30, 20, 16], pictures)
    return RowSource(index, 64, data_config(shuffle=False), 0, VISION)


def big_source(**changes: object) -> RowSource:
    rng = np.random.default_rng(0)
    text = rng.integers(10, 60, 200).tolist()
    pictures = []
    for count in rng.integers(0, 3, 200):
        places = np.sort(rng.choice(10, count, replace=False))
        sizes = rng.integers(14, 100, (count, 2)).tolist()
        pictures.append([(int(p), h, w) for p, (h, w) in zip(places, sizes, strict=True)])
    return RowSource(index_of(text, pictures), 128, data_config(**changes), 3, VISION)


def test_a_step_by_hand() -> None:
    plan = plan_step(small_source(), 0, 4, 2, 2, 3)
    [[first], [second]] = plan.micro_batches
    # Row 0: sample 0 (16), sample 1 (20 -> 32), filler 16. Row 1: sample 2 (38 -> 48), filler 16.
    assert first.cu_seqlens.tolist() == [0, 16, 48, 64, 112, 128]
    assert first.cu_seqlens.dtype == np.int32
    assert first.segment_lengths.tolist() == [16, 20, 0, 38, 0]
    assert first.max_seqlen == 48
    # Sample 0: placeholders 2 and 5; the first grows by one. Sample 2 is in the second row.
    assert first.picture_spans.tolist() == [[2, 2], [6, 4], [64, 9]]
    # Row 2: samples 3 (20 -> 32) and 4, filler 16. Row 3 is row 0 again, in the next epoch.
    assert second.cu_seqlens.tolist() == [0, 32, 48, 64, 80, 112, 128]
    assert second.segment_lengths.tolist() == [20, 16, 0, 16, 20, 0]
    assert second.picture_spans.tolist() == [[64 + 2, 2], [64 + 6, 4]]
    found = [
        (p.sample, p.ordinal, p.replica, p.micro_batch, p.start, p.tokens) for p in plan.pictures
    ]
    assert found == [
        (0, 0, 0, 0, 2, 2),
        (0, 1, 0, 0, 6, 4),
        (2, 0, 0, 0, 64, 9),
        (0, 0, 1, 0, 66, 2),
        (0, 1, 1, 0, 70, 4),
    ]
    assert [(p.grid_h, p.grid_w) for p in plan.pictures[:3]] == [(2, 4), (4, 4), (6, 6)]
    assert [p.encoder_rank for p in plan.pictures] == [0, 0, 1, 1, 2]
    assert plan.tokens == 16 + 20 + 38 + 20 + 16 + 16 + 20
    assert plan.loss_tokens == 6 + 10 + 15 + 10 + 8 + 6 + 10
    assert plan.documents == 7
    assert plan.image_patches == 4 * (2 + 4 + 9 + 2 + 4)
    assert plan.first_row == 0


def test_a_full_row_has_no_filler() -> None:
    source = RowSource(index_of([64, 5]), 64, data_config(shuffle=False), 0, None)
    plan = plan_step(source, 0, 2, 2, 1, 1)
    assert plan.micro_batches[0][0].cu_seqlens.tolist() == [0, 64, 80, 128]
    assert plan.micro_batches[0][0].segment_lengths.tolist() == [64, 5, 0]
    assert plan.pictures == ()


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize("num_replicas", [1, 2, 4])
def test_rows_and_pictures_are_the_same_for_every_layout(
    micro_batch_size: int, num_replicas: int
) -> None:
    source = big_source()
    expected = [source.row(40 + i) for i in range(16)]
    plan = plan_step(big_source(), 40, 16, micro_batch_size, num_replicas, 5)
    seen = {}
    for replica, micro_batches in enumerate(plan.micro_batches):
        assert len(micro_batches) == 16 // (micro_batch_size * num_replicas)
        for i, micro_batch in enumerate(micro_batches):
            for k, row in enumerate(micro_batch.rows):
                seen[(i * num_replicas + replica) * micro_batch_size + k] = row
    assert [seen[i] for i in range(16)] == expected
    reference = plan_step(source, 40, 16, 1, 1, 5)
    for picture, same in zip(plan.pictures, reference.pictures, strict=True):
        assert (picture.sample, picture.ordinal) == (same.sample, same.ordinal)
        assert picture.encoder_rank == same.encoder_rank
        group, inside = divmod(same.micro_batch, micro_batch_size)
        assert (picture.micro_batch, picture.replica) == divmod(group, num_replicas)
        assert picture.start == inside * 128 + same.start
    for name in ("first_row", "loss_tokens", "tokens", "documents", "image_patches"):
        assert getattr(plan, name) == getattr(reference, name)


def test_segments_and_spans_agree_with_the_rows() -> None:
    source = big_source()
    plan = plan_step(source, 0, 32, 4, 2, 7)
    for replica, micro_batches in enumerate(plan.micro_batches):
        for i, micro_batch in enumerate(micro_batches):
            sizes = np.diff(micro_batch.cu_seqlens)
            assert micro_batch.num_tokens == 4 * 128
            assert micro_batch.max_seqlen == sizes.max()
            assert not (micro_batch.cu_seqlens % 16).any()
            assert set(range(0, 513, 128)) <= set(micro_batch.cu_seqlens.tolist())
            mine = [p for p in plan.pictures if (p.replica, p.micro_batch) == (replica, i)]
            assert [[p.start, p.tokens] for p in mine] == micro_batch.picture_spans.tolist()
            ends = micro_batch.picture_spans.sum(1)
            assert (ends[:-1] <= micro_batch.picture_spans[1:, 0]).all()
    assert plan.tokens == sum(
        int(m.segment_lengths.sum()) for replica in plan.micro_batches for m in replica
    )


def test_resuming_needs_the_row_number_alone() -> None:
    source = big_source()
    straight = [plan_step(source, first, 8, 2, 2, 4) for first in range(0, 400, 8)]
    for first in (0, 8, 392, 200):
        resumed = plan_step(big_source(), first, 8, 2, 2, 4)
        assert plan_facts(resumed) == plan_facts(straight[first // 8])


def test_another_batch_size_continues_at_the_same_row() -> None:
    source = big_source()
    whole = plan_step(source, 0, 24, 1, 1, 1)
    parts = [plan_step(source, 0, 8, 1, 1, 1), plan_step(source, 8, 16, 1, 1, 1)]
    rows = [m.rows for part in parts for m in part.micro_batches[0]]
    assert rows == [m.rows for m in whole.micro_batches[0]]


def test_missing_rows_are_filler() -> None:
    source = big_source()
    plan = plan_rows(source, [5, -1, 6, -1], 2, 2, 3)
    [[first], [second]] = plan.micro_batches
    assert first.rows == (source.row(5), EMPTY_ROW)
    assert second.rows == (source.row(6), EMPTY_ROW)
    assert first.cu_seqlens[-2:].tolist() == [128, 256]
    assert first.segment_lengths[-1] == 0
    assert plan.documents == len(source.row(5).segments) + len(source.row(6).segments)
    nothing = plan_rows(source, [-1, -1], 1, 2, 3)
    assert (nothing.first_row, nothing.tokens, nothing.loss_tokens) == (-1, 0, 0)
    assert nothing.micro_batches[0][0].cu_seqlens.tolist() == [0, 128]
    assert nothing.pictures == ()


def test_held_out_batches_hold_each_row_once() -> None:
    source = big_source(shuffle=False)
    count = source.num_rows_per_epoch
    batches = held_out_batches(source, 8)
    assert all(len(batch) == 8 for batch in batches)
    flat = [number for batch in batches for number in batch]
    assert flat[:count] == list(range(count))
    assert set(flat[count:]) <= {-1}
    assert held_out_batches(source, 8, max_rows=10)[1] == [8, 9, -1, -1, -1, -1, -1, -1]
    documents = sum(plan_rows(source, batch, 2, 2, 4).documents for batch in batches)
    assert documents == 200


@pytest.mark.parametrize(("count", "world_size"), [(0, 4), (3, 8), (8, 8), (13, 4), (100, 7)])
def test_even_split(count: int, world_size: int) -> None:
    ranks = assign_pictures(np.ones(count), world_size)
    assert (np.diff(ranks) >= 0).all()
    sizes = np.bincount(ranks, minlength=world_size)
    assert len(sizes) == world_size
    assert sizes.max() - sizes.min() <= 1


def test_batches_that_do_not_divide() -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size 6 .*micro_batch_size 2 .* 2 data"):
        plan_step(small_source(), 0, 6, 2, 2, 2)
    with pytest.raises(ConfigError, match="global_batch_size 0"):
        plan_rows(small_source(), [], 1, 1, 1)


def test_planning_needs_no_torch() -> None:
    code = "import sys, megatron_vlm.data.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
