"""Random step plans and layouts, without any data behind them."""

from __future__ import annotations

import numpy as np

from megatron_vlm.data.plan import MicroBatchPlan, PicturePlan, Row, Segment, StepPlan
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


def random_micro_batch(
    rng: np.random.Generator, rows: int, row_tokens: int, multiple: int
) -> MicroBatchPlan:
    """Rows of random segments, each padded to `multiple`, the rest filler."""
    padded, lengths, made, sample = [], [], [], 0
    for _ in range(rows):
        used, segments = 0, []
        while used < row_tokens and rng.random() < 0.9:
            size = int(rng.integers(1, (row_tokens - used) // multiple + 1)) * multiple
            real = int(rng.integers(max(1, size - multiple + 1), size + 1))
            segments.append(Segment(sample, used, real, size))
            padded.append(size)
            lengths.append(real)
            used, sample = used + size, sample + 1
        if used < row_tokens:
            padded.append(row_tokens - used)
            lengths.append(0)
        made.append(Row(tuple(segments)))
    return MicroBatchPlan(
        rows=tuple(made),
        cu_seqlens=np.concatenate(([0], np.cumsum(padded))).astype(np.int32),
        segment_lengths=np.asarray(lengths, dtype=np.int32),
        max_seqlen=max(padded),
        picture_spans=np.zeros((0, 2), dtype=np.int64),
    )


def random_plan(
    rng: np.random.Generator,
    layout: Layout,
    micro_batches: int,
    rows: int,
    row_tokens: int,
    multiple: int,
    density: float,
) -> StepPlan:
    """Pictures of random length anywhere in the segments, each encoded by any rank."""
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
                                sample=len(pictures),
                                ordinal=0,
                                grid_h=2,
                                grid_w=2 * tokens,
                                replica=replica,
                                micro_batch=number,
                                start=int(start) + position,
                                tokens=tokens,
                                encoder_rank=int(rng.integers(layout.world_size)),
                            )
                        )
                    position += tokens
        groups.append(tuple(members))
    # Plan order is by row, not by replica: any order must do.
    order = rng.permutation(len(pictures))
    return StepPlan(
        first_row=0,
        micro_batches=tuple(groups),
        pictures=tuple(pictures[i] for i in order),
        loss_tokens=1,
        tokens=1,
        documents=1,
        image_patches=0,
    )
