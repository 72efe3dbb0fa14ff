"""The plan of a step: which samples form which micro-batch, and which rank encodes which picture.

Pure functions of the index, the configuration and a row number. Every rank computes the whole plan
and they all agree, so nothing about the batch is ever communicated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.rows import Row, RowSource, Segment
from megatron_vlm.errors import ConfigError

__all__ = [
    "EMPTY_ROW",
    "MicroBatchPlan",
    "PicturePlan",
    "Row",
    "RowSource",
    "Segment",
    "StepPlan",
    "assign_pictures",
    "held_out_batches",
    "plan_rows",
]

EMPTY_ROW = Row(())
"""A row of filler alone: it fills a batch that the data do not."""


@dataclass(frozen=True, slots=True)
class PicturePlan:
    """One picture of the step: where its features go and who computes them."""

    sample: int
    """Number of its sample in the data set."""
    ordinal: int
    """Place among the sample's pictures, from 0."""
    grid_h: int
    """Patches along the height."""
    grid_w: int
    """Patches along the width."""
    replica: int
    """Data-parallel replica whose micro-batch holds it."""
    micro_batch: int
    """That micro-batch's place in the step."""
    start: int
    """First of its tokens within the micro-batch's concatenated rows."""
    tokens: int
    """Language tokens, consecutive from `start`."""
    encoder_rank: int
    """Rank of the whole world that encodes it."""


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatchPlan:
    """The concatenated rows of one forward pass; row k starts at k * seq_length."""

    rows: tuple[Row, ...]
    """`micro_batch_size` rows."""
    cu_seqlens: NDArray[np.int32]
    """[segments + 1] bounds of the padded segments; each row's unused tail is one of its own."""
    segment_lengths: NDArray[np.int32]
    """[segments] real tokens of each; 0 for filler."""
    max_seqlen: int
    """Longest padded segment, in tokens."""
    picture_spans: NDArray[np.int64]
    """[pictures, 2] first token and number of tokens of each picture, ascending."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the micro-batch, padding and filler included."""
        return int(self.cu_seqlens[-1])


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """One optimizer step over all ranks."""

    first_row: int
    """Number of its first row in the endless run; -1 if it has none."""
    micro_batches: tuple[tuple[MicroBatchPlan, ...], ...]
    """Indexed [replica][i]."""
    pictures: tuple[PicturePlan, ...]
    """Every picture of the step, by row, then by place in the row: the same for any layout."""
    loss_tokens: int
    """Target tokens: what the summed loss is divided by."""
    tokens: int
    """Real tokens, without padding and filler."""
    documents: int
    """Source samples."""
    image_patches: int
    """Patches of all pictures."""


def plan_rows(
    source: RowSource,
    row_numbers: Sequence[int],
    micro_batch_size: int,
    num_replicas: int,
    world_size: int,
) -> StepPlan:
    """Plan a batch of any rows.

    Micro-batch i of replica d takes the row numbers
    [(i * num_replicas + d) * micro_batch_size + k], so the rows of a step, and the order in which
    they are consumed, are the same for every layout.

    Args:
        source: the rows.
        row_numbers: one number per row of the batch; -1 stands for a row of filler.
        micro_batch_size: rows of one forward pass.
        num_replicas: data-parallel size.
        world_size: ranks that share the pictures.

    Raises:
        ConfigError: the batch does not divide into micro-batches of all replicas.
    """
    if not row_numbers or len(row_numbers) % (micro_batch_size * num_replicas):
        raise ConfigError(
            f"training.global_batch_size {len(row_numbers)} is not a multiple of "
            f"training.micro_batch_size {micro_batch_size} times the {num_replicas} data-parallel "
            "replicas; change the batch or the layout"
        )
    rows = [source.row(number) if number >= 0 else EMPTY_ROW for number in row_numbers]
    groups: list[list[MicroBatchPlan]] = [[] for _ in range(num_replicas)]
    placed: list[tuple[int, int, int, int, int, int]] = []
    for group, first in enumerate(range(0, len(rows), micro_batch_size)):
        micro_batch, replica = divmod(group, num_replicas)
        members = tuple(rows[first : first + micro_batch_size])
        found = _place_pictures(source, members)
        placed += [(replica, micro_batch, *picture) for picture in found]
        spans = [picture[2:] for picture in found]
        groups[replica].append(_micro_batch(members, source.seq_length, spans))

    index = source.index
    column = [index.picture_range(sample).start + ordinal for _, _, sample, ordinal, _, _ in placed]
    grid_h, grid_w = source.grid_h[column], source.grid_w[column]
    patches = grid_h * grid_w
    ranks = assign_pictures(patches.astype(np.float64), world_size)
    pictures = tuple(
        PicturePlan(sample, ordinal, int(h), int(w), replica, micro, start, tokens, int(rank))
        for (replica, micro, sample, ordinal, start, tokens), h, w, rank in zip(
            placed, grid_h, grid_w, ranks, strict=True
        )
    )
    samples = [segment.sample for row in rows for segment in row.segments]
    return StepPlan(
        first_row=next((number for number in row_numbers if number >= 0), -1),
        micro_batches=tuple(tuple(group) for group in groups),
        pictures=pictures,
        loss_tokens=int(index.columns.sample_loss_tokens[samples].sum(dtype=np.int64)),
        tokens=int(source.lengths[samples].sum()),
        documents=len(samples),
        image_patches=int(patches.sum()),
    )


def held_out_batches(
    source: RowSource, global_batch_size: int, max_rows: int | None = None
) -> list[list[int]]:
    """Row numbers of one pass over a held-out set, in full batches; the last is filled with -1.

    Args:
        source: the held-out set; leave it unshuffled so that every pass is alike.
        global_batch_size: rows of each batch.
        max_rows: stop after this many rows; null takes the whole set.
    """
    count = source.num_rows_per_epoch
    count = count if max_rows is None else min(count, max_rows)
    batches = []
    for first in range(0, count, global_batch_size):
        numbers = range(first, min(first + global_batch_size, count))
        batches.append([*numbers, *[-1] * (global_batch_size - len(numbers))])
    return batches


def assign_pictures(costs: NDArray[np.float64], world_size: int) -> NDArray[np.int64]:
    """Rank that encodes each picture.

    Contiguous runs in the step's order, equal in number to within one: neighbours in a batch stay
    together, and few pictures spread over the ranks.

    Args:
        costs: [pictures] cost of each; only their number counts here.
        world_size: ranks.

    Returns:
        [pictures] ranks, ascending.
    """
    count = len(costs)
    ranks: NDArray[np.int64] = np.arange(count, dtype=np.int64) * world_size // max(count, 1)
    return ranks


def _place_pictures(source: RowSource, rows: tuple[Row, ...]) -> list[tuple[int, int, int, int]]:
    """(sample, ordinal, start in the micro-batch, tokens) of every picture, in order."""
    found = []
    for k, row in enumerate(rows):
        for segment in row.segments:
            base = k * source.seq_length + segment.start
            starts, tokens = source.picture_spans(segment.sample)
            for ordinal, (start, count) in enumerate(zip(starts, tokens, strict=True)):
                found.append((segment.sample, ordinal, base + int(start), int(count)))
    return found


def _micro_batch(
    rows: tuple[Row, ...], seq_length: int, spans: Sequence[tuple[int, int]]
) -> MicroBatchPlan:
    padded: list[int] = []
    lengths: list[int] = []
    for row in rows:
        used = 0
        for segment in row.segments:
            padded.append(segment.padded)
            lengths.append(segment.length)
            used += segment.padded
        if used < seq_length:
            padded.append(seq_length - used)
            lengths.append(0)
    bounds = np.concatenate(([0], np.cumsum(padded))).astype(np.int32)
    return MicroBatchPlan(
        rows=rows,
        cu_seqlens=bounds,
        segment_lengths=np.asarray(lengths, dtype=np.int32),
        max_seqlen=max(padded),
        picture_spans=np.asarray(spans, dtype=np.int64).reshape(-1, 2),
    )
