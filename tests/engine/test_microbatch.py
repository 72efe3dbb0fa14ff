"""A planned micro-batch, cut to a context-parallel rank: every token once, with its own numbers."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vlm.data.collate import TextBatch
from megatron_vlm.data.plan import MicroBatchPlan
from tests.engine.plans import random_micro_batch

pytestmark = pytest.mark.unit


def _topology(cp: int, rank: int) -> Any:
    return SimpleNamespace(
        layout=SimpleNamespace(cp=cp),
        coordinates=SimpleNamespace(cp=rank),
        device=torch.device("cpu"),
    )


def _by_loop(plan: MicroBatchPlan) -> list[tuple[int, int, int, bool]]:
    """Per token: segment, position in it, row, whether it is real."""
    per_row = plan.num_tokens // len(plan.rows)
    found = []
    for segment, real in enumerate(plan.segment_lengths):
        for place in range(int(plan.cu_seqlens[segment + 1] - plan.cu_seqlens[segment])):
            found.append((segment, place, len(found) // per_row, place < real))
    return found


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_cut(cp: int) -> None:
    from megatron_vlm.engine.microbatch import build_micro_batch

    rng = np.random.default_rng(cp)
    for _ in range(5):
        plan = random_micro_batch(rng, rows=3, row_tokens=48, multiple=8)
        loop = _by_loop(plan)
        total = plan.num_tokens
        text = TextBatch(
            tokens=torch.arange(total) + 1000,
            labels=torch.arange(total) + 2000,
            loss_mask=torch.rand(total),
            position_ids=torch.zeros(total, dtype=torch.int64),
        )
        laid: list[int] = []
        batches = []
        for rank in range(cp):
            batch = build_micro_batch(plan, text, _topology(cp, rank), balance_weight=0.5)
            batches.append(batch)
            assert batch.tokens is not None and batch.labels is not None
            assert batch.loss_mask is not None and batch.rows.row_ids is not None
            assert batch.tokens.shape == (1, total // cp)
            mine = (batch.tokens - 1000).flatten().tolist()
            laid += mine
            assert batch.labels.flatten().tolist() == [token + 2000 for token in mine]
            assert torch.equal(batch.loss_mask[0], text.loss_mask[mine])
            assert batch.segment_ids.tolist() == [loop[token][0] for token in mine]
            rows = [loop[token][2] if loop[token][3] else -1 for token in mine]
            assert batch.rows.row_ids.tolist() == rows
            within = [loop[token][1] for token in mine]
            assert batch.rows.position_ids is not None
            assert batch.rows.position_ids.tolist() == within
            assert (batch.rows.context is not None) == (cp > 1)
        assert sorted(laid) == list(range(total))
        for batch in batches:
            rows, counts = batch.rows, np.zeros(3, dtype=int)
            np.add.at(counts, [row for _, _, row, real in loop if real], 1)
            assert rows.row_tokens is not None and rows.row_tokens.tolist() == counts.tolist()
            assert rows.balance_weight == 0.5 and rows.qkv_format == "thd"
            assert rows.cu_seqlens_q.tolist() == plan.cu_seqlens.tolist()
            assert rows.max_seqlen_q == max(np.diff(plan.cu_seqlens))
            assert batch.num_segments == len(plan.segment_lengths)
            if cp > 1:
                assert rows.context is not None
                gathered = np.asarray(laid)
                assert gathered[rows.context.key_order.numpy()].tolist() == list(range(total))
                assert rows.context.key_positions.tolist() == [place for _, place, _, _ in loop]
                assert (rows.context.cu_seqlens * cp).tolist() == plan.cu_seqlens.tolist()
            else:
                assert rows.context is None


def test_without_text() -> None:
    """Ranks in the middle of a pipeline know the structure and nothing else."""
    from megatron_vlm.engine.microbatch import build_micro_batch

    plan = random_micro_batch(np.random.default_rng(0), rows=1, row_tokens=32, multiple=8)
    batch = build_micro_batch(plan, None, _topology(1, 0), 0.0)
    assert batch.tokens is batch.labels is batch.loss_mask is None
    assert batch.rows.row_ids is not None and len(batch.rows.row_ids) == 32


@pytest.mark.parametrize("cp", [1, 2])
def test_one_token_further_ahead(cp: int) -> None:
    """By a plain loop: nothing crosses a segment, and no token follows a picture's placeholder."""
    from megatron_vlm.engine.microbatch import build_micro_batch

    rng = np.random.default_rng(cp)
    for _ in range(5):
        plan = random_micro_batch(rng, rows=2, row_tokens=48, multiple=8)
        loop, total = _by_loop(plan), plan.num_tokens
        # Pictures of two tokens, away from each other: at 3 and 4 of some segments.
        starts = [i for i, (segment, place, _, real) in enumerate(loop) if place == 3 and real]
        plan = replace(plan, picture_spans=np.array([[i, 2] for i in starts]).reshape(-1, 2))
        pictures = {i + offset for i in starts for offset in (0, 1)}
        text = TextBatch(
            tokens=torch.arange(total) + 1000,
            labels=torch.arange(total) + 2000,
            loss_mask=torch.rand(total) + 0.5,
            position_ids=torch.zeros(total, dtype=torch.int64),
        )
        for rank in range(cp):
            plain = build_micro_batch(plan, text, _topology(cp, rank), balance_weight=0.5)
            assert plain.ahead is None and plain.rows.next_tokens is None
            batch = build_micro_batch(
                plan, text, _topology(cp, rank), balance_weight=0.5, predict_ahead=True
            )
            assert batch.ahead is not None and batch.rows.next_tokens is not None
            assert batch.tokens is not None and batch.rows.position_ids is not None
            for column, token in enumerate((batch.tokens[0] - 1000).tolist()):
                inside = token + 1 < total and loop[token + 1][0] == loop[token][0]
                following = token + 1 if inside else token
                assert batch.rows.next_tokens[0, column] == following + 1000
                assert batch.ahead.labels[0, column] == following + 2000
                counts = inside and following not in pictures
                expected = text.loss_mask[following] if counts else torch.zeros(())
                assert batch.ahead.loss_mask[0, column] == expected
                assert batch.rows.position_ids[column] == loop[token][1]
