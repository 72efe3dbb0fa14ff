"""Random step plans and layouts, without any data behind them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_vlm.data.picture_table import PicturePlan, PictureTable, Shares
from megatron_vlm.data.plan import MicroBatchPlan, StepPlan
from megatron_vlm.data.rows import Row
from megatron_vlm.topology.layout import Layout


def bare_layout(
    tp: int = 1, cp: int = 1, dp: int = 1, pp: int = 1, sequence_parallel: bool = False
) -> Layout:
    """A layout of these sizes; nothing of it is checked against a model."""
    stages = ("Et", *["t"] * (pp - 2), "tL") if pp > 1 else ("EtL",)
    return Layout(
        world_size=tp * cp * dp * pp,
        tp=tp,
        cp=cp,
        dp=dp,
        pp=pp,
        vpp=None,
        ep=1,
        etp=1,
        sequence_parallel=sequence_parallel,
        batch_p2p_comm=True,
        stages=stages,
        num_micro_batches=1,
    )


def laid_out(rows: Sequence[Sequence[tuple[int, int]]], row_tokens: int) -> MicroBatchPlan:
    """A micro-batch of rows that hold samples of given (real, padded) lengths."""
    padded, lengths, documents, made, count = [], [], [], [], 0
    for members in rows:
        sizes = np.array([size for _, size in members], np.int32)
        made.append(
            Row(
                number=len(made),
                source=np.zeros(len(members), np.int32),
                sample=np.arange(count, count + len(members)),
                offset=np.zeros(len(members), np.int32),
                start=(np.cumsum(sizes) - sizes).astype(np.int32),
                length=np.array([real for real, _ in members], np.int32),
                padded=sizes,
            )
        )
        padded += sizes.tolist()
        lengths += made[-1].length.tolist()
        documents += range(count, count + len(members))
        count += len(members)
        assert sizes.sum() <= row_tokens
        if sizes.sum() < row_tokens:
            padded.append(row_tokens - int(sizes.sum()))
            lengths.append(0)
            documents.append(-1)
    return MicroBatchPlan(
        rows=tuple(made),
        cu_seqlens=np.concatenate(([0], np.cumsum(padded))).astype(np.int32),
        segment_lengths=np.asarray(lengths, dtype=np.int32),
        documents=np.asarray(documents, dtype=np.int32),
        max_seqlen=max(padded),
        picture_spans=np.zeros((0, 2), dtype=np.int64),
        picture_columns=np.zeros(0, dtype=np.int64),
    )


def random_micro_batch(
    rng: np.random.Generator, rows: int, row_tokens: int, multiple: int
) -> MicroBatchPlan:
    """Rows of random segments, each padded to `multiple`, the rest filler."""
    made: list[list[tuple[int, int]]] = []
    for _ in range(rows):
        used, members = 0, []
        while used < row_tokens and rng.random() < 0.9:
            size = int(rng.integers(1, (row_tokens - used) // multiple + 1)) * multiple
            real = int(rng.integers(max(1, size - multiple + 1), size + 1))
            members.append((real, size))
            used += size
        made.append(members)
    return laid_out(made, row_tokens)


def random_shares(rng: np.random.Generator, table: PictureTable, ranks: int) -> Shares:
    """Each picture on one rank, or cut into two or three parts on several."""
    made = []
    for picture, patches in enumerate(table.patches.tolist()):
        count = min(int(rng.choice([1, 1, 2, 3])), ranks, patches // 4)
        bounds = [
            0,
            *sorted(rng.choice(np.arange(1, patches // 4), count - 1, False)),
            patches // 4,
        ]
        chosen = sorted(rng.choice(ranks, count, replace=False))
        for rank, first, last in zip(chosen, bounds[:-1], bounds[1:], strict=True):
            made.append((picture, rank, 4 * first, 4 * (last - first)))
    return Shares(*np.array(made, np.int64).reshape(-1, 4).T)


def random_plan(
    rng: np.random.Generator,
    layout: Layout,
    micro_batches: int,
    rows: int,
    row_tokens: int,
    multiple: int,
    density: float,
) -> StepPlan:
    """Pictures of random length anywhere in the segments, encoded by any ranks, some by several."""
    groups, pictures = [], []
    for replica in range(layout.dp):
        members = []
        for number in range(micro_batches):
            micro = random_micro_batch(rng, rows, row_tokens, multiple)
            members.append(micro)
            for start, real in zip(micro.cu_seqlens[:-1], micro.segment_lengths, strict=True):
                position = 0
                while position < real:
                    tokens = int(rng.integers(1, real - position + 1))
                    if rng.random() < density:
                        pictures.append(
                            PicturePlan(
                                document=0,
                                source=0,
                                sample=len(pictures),
                                ordinal=0,
                                grid_h=2,
                                grid_w=2 * tokens,
                                replica=replica,
                                micro_batch=number,
                                start=int(start) + position,
                                tokens=tokens,
                            )
                        )
                    position += tokens
        groups.append(tuple(members))
    # Plan order is by row, not by replica: any order must do.
    table = PictureTable.of([pictures[i] for i in rng.permutation(len(pictures))])
    return StepPlan(
        first_row=0,
        micro_batches=tuple(groups),
        pictures=table,
        shares=random_shares(rng, table, layout.world_size),
        document_loss_tokens=np.ones(1, np.int64),
        document_tokens=np.ones(1, np.int64),
        document_samples=np.ones(1, np.int64),
        image_patches=0,
    )
