"""Plans: the same rows and pictures for every layout, and offsets worked out by hand."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from megatron_vlm.data.plan import (
    EMPTY_ROW,
    StepPlan,
    assign_rows,
    plan_rows,
    plan_step,
)
from megatron_vlm.data.stream import RowStream
from megatron_vlm.errors import ConfigError
from tests.data.samples import (
    VISION,
    index_of,
    plan_facts,
    row_facts,
    rows_of,
    sharing_of,
    stream_of,
)

pytestmark = pytest.mark.unit


def small_stream() -> RowStream:
    """Rows of 64, in order: [0 and 1], [2], [3, 4 and 0], [1]."""
    pictures = [[(2, 28, 56), (5, 56, 56)], [], [(0, 84, 84)], [], []]
    # lengths 12 - 2 + 2 + 4 = 16, 20, 30 - 1 + 9 = 38, 20, 16
    index = index_of([12, 20, 30, 20, 16], pictures)
    return stream_of(index, vision=VISION, shuffle=False)


def big_stream(**changes: object) -> RowStream:
    """Two sources, one with pictures."""
    rng = np.random.default_rng(0)
    text = rng.integers(10, 60, 200).tolist()
    pictures = []
    for count in rng.integers(0, 3, 200):
        places = np.sort(rng.choice(10, count, replace=False))
        sizes = rng.integers(14, 100, (count, 2)).tolist()
        pictures.append([(int(p), h, w) for p, (h, w) in zip(places, sizes, strict=True)])
    plain = index_of(rng.integers(10, 120, 50).tolist())
    settings = {"seq_length": 128, "vision": VISION, "seed": 3, **changes}
    return stream_of(index_of(text, pictures), plain, **settings)  # type: ignore[arg-type]


def step_of(
    stream: RowStream, first_row: int, batch: int, micro: int, replicas: int, world: int
) -> StepPlan:
    """The step that consumes rows [first_row, first_row + batch)."""
    cursor = stream.take(stream.start(), first_row)[1]
    planned = plan_step(stream, cursor, batch, micro, sharing_of(world, replicas))
    assert planned is not None
    assert planned[1].rows == first_row + batch
    return planned[0]


def placed(plan: StepPlan) -> dict[int, tuple[int, int, int]]:
    """(replica, micro-batch, place in it) of each row, by its number."""
    return {
        row.number: (replica, number, k)
        for replica, micro_batches in enumerate(plan.micro_batches)
        for number, micro_batch in enumerate(micro_batches)
        for k, row in enumerate(micro_batch.rows)
    }


def test_a_step_by_hand() -> None:
    plan = step_of(small_stream(), 0, 4, 2, 1, 3)
    [[first, second]] = plan.micro_batches
    # Row 0: sample 0 (16), sample 1 (20 -> 32), filler 16. Row 1: sample 2 (38 -> 48), filler 16.
    assert first.cu_seqlens.tolist() == [0, 16, 48, 64, 112, 128]
    assert first.cu_seqlens.dtype == np.int32
    assert first.segment_lengths.tolist() == [16, 20, 0, 38, 0]
    assert first.documents.tolist() == [0, 1, -1, 2, -1]
    assert first.max_seqlen == 48
    # Sample 0: placeholders 2 and 5; the first grows by one. Sample 2 is in the second row.
    assert first.picture_spans.tolist() == [[2, 2], [6, 4], [64, 9]]
    # Row 2: samples 3 (20 -> 32), 4 and 0 of the next epoch. Row 3: sample 1, filler 32.
    assert second.cu_seqlens.tolist() == [0, 32, 48, 64, 96, 128]
    assert second.segment_lengths.tolist() == [20, 16, 16, 20, 0]
    assert second.documents.tolist() == [3, 4, 5, 6, -1]
    assert second.picture_spans.tolist() == [[48 + 2, 2], [48 + 6, 4]]
    found = [
        (p.document, p.sample, p.ordinal, p.replica, p.micro_batch, p.start, p.tokens)
        for p in plan.pictures
    ]
    assert found == [
        (0, 0, 0, 0, 0, 2, 2),
        (0, 0, 1, 0, 0, 6, 4),
        (2, 2, 0, 0, 0, 64, 9),
        (5, 0, 0, 0, 1, 50, 2),
        (5, 0, 1, 0, 1, 54, 4),
    ]
    assert [(p.grid_h, p.grid_w) for p in plan.pictures][:3] == [(2, 4), (4, 4), (6, 6)]
    # 36 patches to the first rank, 16 to each other, 8 to the lightest, then to the next.
    assert plan.shares.picture.tolist() == [0, 1, 2, 3, 4]
    assert plan.shares.rank.tolist() == [1, 1, 0, 2, 2]
    assert plan.shares.patches.tolist() == [8, 16, 36, 8, 16]
    assert plan.document_tokens.tolist() == [16, 20, 38, 20, 16, 16, 20]
    assert plan.tokens == 16 + 20 + 38 + 20 + 16 + 16 + 20
    assert plan.document_loss_tokens.tolist() == [6, 10, 15, 10, 8, 6, 10]
    assert plan.loss_tokens == 6 + 10 + 15 + 10 + 8 + 6 + 10
    assert plan.documents == 7
    assert plan.image_patches == 4 * (2 + 4 + 9 + 2 + 4)
    assert plan.first_row == 0


def test_a_full_row_has_no_filler() -> None:
    stream = stream_of(index_of([64, 5]), shuffle=False, max_epochs=[1.0])
    plan = step_of(stream, 0, 2, 2, 1, 1)
    assert plan.micro_batches[0][0].cu_seqlens.tolist() == [0, 64, 80, 128]
    assert plan.micro_batches[0][0].segment_lengths.tolist() == [64, 5, 0]
    assert len(plan.pictures) == 0


def test_a_part_of_a_long_sample_holds_its_own_pictures() -> None:
    # 9 tokens a picture: text 0..59, picture 60..68, text 69..99, picture 100..108, text 109..135.
    index = index_of([120], [[(60, 84, 84), (92, 84, 84)]], loss_tokens=[117])
    stream = stream_of(index, vision=VISION, long_samples="split", shuffle=False, max_epochs=[1.0])
    plan = step_of(stream, 0, 3, 3, 1, 1)
    [[micro]] = plan.micro_batches
    assert micro.segment_lengths.tolist() == [60, 64, 12, 0]
    # The second row begins with the first picture; the second lies 40 tokens behind it.
    assert [(p.ordinal, p.start, p.tokens) for p in plan.pictures] == [(0, 64, 9), (1, 104, 9)]
    assert plan.document_loss_tokens.tolist() == [59, 64 - 18, 11]


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize("num_replicas", [1, 2, 4])
def test_rows_and_pictures_are_the_same_for_every_layout(
    micro_batch_size: int, num_replicas: int
) -> None:
    plan = step_of(big_stream(), 40, 16, micro_batch_size, num_replicas, 5)
    reference = step_of(big_stream(), 40, 16, 1, 1, 5)
    held = {
        row.number: row_facts(row)
        for replica in plan.micro_batches
        for micro in replica
        for row in micro.rows
    }
    assert [held[number] for number in range(40, 56)] == [
        row_facts(row) for row in rows_of(big_stream(), 56)[40:]
    ]
    assert {len(replica) for replica in plan.micro_batches} == {
        16 // (micro_batch_size * num_replicas)
    }
    place = placed(plan)
    for picture, same in zip(plan.pictures, reference.pictures, strict=True):
        for name in ("document", "source", "sample", "ordinal", "grid_h", "tokens"):
            assert getattr(picture, name) == getattr(same, name)
        replica, number, k = place[40 + same.micro_batch]
        assert (picture.replica, picture.micro_batch) == (replica, number)
        assert picture.start == k * 128 + same.start
    for name in ("first_row", "loss_tokens", "tokens", "documents", "image_patches"):
        assert getattr(plan, name) == getattr(reference, name)


def test_segments_and_spans_agree_with_the_rows() -> None:
    plan = step_of(big_stream(), 0, 32, 4, 2, 7)
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
            for number, length in zip(
                micro_batch.documents, micro_batch.segment_lengths, strict=True
            ):
                assert length == (plan.document_tokens[number] if number >= 0 else 0)


def test_resuming_needs_the_cursor_alone() -> None:
    stream = big_stream()
    straight = [step_of(stream, first, 8, 2, 2, 4) for first in range(0, 120, 8)]
    for first in (0, 8, 112, 64):
        resumed = step_of(big_stream(), first, 8, 2, 2, 4)
        assert plan_facts(resumed) == plan_facts(straight[first // 8])


def test_another_batch_size_continues_at_the_same_row() -> None:
    whole = step_of(big_stream(), 0, 24, 1, 1, 1)
    parts = [step_of(big_stream(), 0, 8, 1, 1, 1), step_of(big_stream(), 8, 16, 1, 1, 1)]
    rows = [row_facts(m.rows[0]) for part in parts for m in part.micro_batches[0]]
    assert rows == [row_facts(m.rows[0]) for m in whole.micro_batches[0]]


def test_missing_rows_are_filler() -> None:
    stream = big_stream()
    one, other = rows_of(stream, 2)
    plan = plan_rows(stream, [one, EMPTY_ROW, other, EMPTY_ROW], 2, sharing_of(3))
    [[first, second]] = plan.micro_batches
    assert first.rows == (one, EMPTY_ROW)
    assert second.rows == (other, EMPTY_ROW)
    assert first.cu_seqlens[-2:].tolist() == [128, 256]
    assert first.segment_lengths[-1] == 0
    assert plan.documents == len(one.sample) + len(other.sample)
    nothing = plan_rows(stream, [EMPTY_ROW] * 2, 1, sharing_of(4, 2))
    assert (nothing.first_row, nothing.tokens, nothing.loss_tokens) == (-1, 0, 0)
    assert nothing.micro_batches[0][0].cu_seqlens.tolist() == [0, 128]
    assert len(nothing.pictures) == 0


@pytest.mark.parametrize("max_rows", [None, 10])
def test_data_that_end_fill_their_last_batch(max_rows: int | None) -> None:
    stream = big_stream(shuffle=False, max_epochs=[1.0, 1.0])
    count = len(rows_of(stream, 10_000)) if max_rows is None else max_rows
    cursor, documents, numbers = stream.start(), 0, []
    while planned := plan_step(
        stream, cursor, 8, 2, sharing_of(4, 2), max_rows and max_rows - cursor.rows
    ):
        plan, cursor = planned
        documents += plan.documents
        numbers += sorted(number for number in placed(plan) if number >= 0)
        if cursor.rows == max_rows:
            break
    assert numbers == list(range(count))
    assert (documents == 250) == (max_rows is None)


def test_a_sample_that_failed_counts_as_filler() -> None:
    plan = step_of(big_stream(), 0, 8, 2, 2, 4)
    failed = np.zeros(plan.documents, bool)
    failed[[0, 3, plan.documents - 1]] = True
    changed = plan.without(failed)
    assert changed.failed == 3
    assert changed.documents == plan.documents
    assert changed.tokens == plan.tokens - plan.document_tokens[failed].sum()
    assert changed.loss_tokens == plan.loss_tokens - plan.document_loss_tokens[failed].sum()
    assert changed.pictures is plan.pictures
    left = 0
    for before, after in zip(plan.micro_batches, changed.micro_batches, strict=True):
        for old, new in zip(before, after, strict=True):
            assert old.cu_seqlens.tolist() == new.cu_seqlens.tolist()
            gone = np.isin(old.documents, np.flatnonzero(failed))
            assert np.array_equal(new.segment_lengths, np.where(gone, 0, old.segment_lengths))
            left += int(new.segment_lengths.sum())
    assert left == changed.tokens
    assert changed.without(~failed).tokens == 0


def test_rows_are_balanced_by_their_attention() -> None:
    # In order for one replica, whatever they cost.
    assert assign_rows(np.array([5.0, 1, 9, 2]), 2, 1) == [[[0, 1], [2, 3]]]
    # By hand: 9 | 8 first, then the dearer of 5 and 1 to the replica that had the 8.
    assert assign_rows(np.array([5.0, 9, 8, 1]), 1, 2) == [[[1], [3]], [[2], [0]]]
    rng = np.random.default_rng(0)
    for _ in range(20):
        costs = 1e9 * rng.uniform(0.02, 1, 64)  # of one long sample to many short ones
        places = assign_rows(costs, 2, 4)
        assert sorted(row for groups in places for group in groups for row in group) == [*range(64)]
        loads = [sum(costs[row] for group in groups for row in group) for groups in places]
        in_order = costs.reshape(8, 4, 2).sum((0, 2))
        assert max(loads) - np.mean(loads) < 0.5 * (max(in_order) - np.mean(loads))
        # Where experts are spread over the replicas, they wait at each micro-batch.
        waits = sum(max(costs[groups[i]].sum() for groups in places) for i in range(8))
        waits_in_order = costs.reshape(8, 4, 2).sum(2).max(1).sum()
        assert waits - costs.sum() / 4 < 0.5 * (waits_in_order - costs.sum() / 4)


def test_batches_that_do_not_divide() -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size 6 .*micro_batch_size 2 .* 2 data"):
        step_of(small_stream(), 0, 6, 2, 2, 2)
    with pytest.raises(ConfigError, match="global_batch_size 0"):
        plan_rows(small_stream(), [], 1, sharing_of(1))


def test_planning_needs_no_torch() -> None:
    code = "import sys, megatron_vlm.data.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
