"""The plan of a step: which samples form which micro-batch, and which rank encodes which picture.

Pure functions of the metadata, the configuration and a cursor. Every rank computes the whole plan
and they all agree, so nothing about the batch is ever communicated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.picture_table import PictureTable, Shares
from megatron_vlm.data.row_table import Segments, Table, count_loss_tokens, find_pictures
from megatron_vlm.data.rows import Cursor, Row
from megatron_vlm.data.sharing import Sharing
from megatron_vlm.data.stream import RowStream
from megatron_vlm.errors import ConfigError

_NONE = np.zeros(0, np.int32)
EMPTY_ROW = Row(-1, _NONE, np.zeros(0, np.int64), _NONE, _NONE, _NONE, _NONE)
"""A row of filler alone: it fills a batch that the data do not."""


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatchPlan:
    """The concatenated rows of one forward pass; row k starts at k * seq_length."""

    rows: tuple[Row, ...]
    """`micro_batch_size` rows."""
    cu_seqlens: NDArray[np.int32]
    """[segments + 1] bounds of the padded segments; each row's unused tail is one of its own."""
    segment_lengths: NDArray[np.int32]
    """[segments] real tokens of each; 0 for filler, and for a sample that could not be read."""
    documents: NDArray[np.int32]
    """[segments] number of each within the step, filler left out; -1 for filler."""
    max_seqlen: int
    """Longest padded segment, in tokens."""
    picture_spans: NDArray[np.int64]
    """[pictures, 2] first token and number of tokens of each picture, ascending."""
    picture_columns: NDArray[np.int64]
    """[pictures] tokens along the width of each."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the micro-batch, padding and filler included."""
        return int(self.cu_seqlens[-1])


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """One optimizer step over all ranks."""

    first_row: int
    """Number of its first row in the run; -1 if it has none."""
    micro_batches: tuple[tuple[MicroBatchPlan, ...], ...]
    """Indexed [replica][i]."""
    pictures: PictureTable
    """Every picture of the step, by row, then by place in the row: the same for any layout."""
    shares: Shares
    """Which rank encodes what of them."""
    document_loss_tokens: NDArray[np.int64]
    """[segments] target tokens of each sample, or of an untied row's samples together; 0 for what
    could not be read."""
    document_tokens: NDArray[np.int64]
    """[segments] real tokens of each, without padding; 0 for what could not be read."""
    document_samples: NDArray[np.int64]
    """[segments] source samples of each: 1, or those of an untied row."""
    image_patches: int
    """Patches of all pictures."""
    failed: int = 0
    """Source samples that could not be read; they are laid out as planned, as filler."""

    @property
    def loss_tokens(self) -> int:
        """Target tokens: what the summed loss is divided by."""
        return int(self.document_loss_tokens.sum())

    @property
    def tokens(self) -> int:
        """Real tokens, without padding and filler."""
        return int(self.document_tokens.sum())

    @property
    def documents(self) -> int:
        """Source samples, those that could not be read included."""
        return int(self.document_samples.sum())

    def without(self, failed: NDArray[np.bool_]) -> StepPlan:
        """The plan once some samples turned out to be unreadable.

        Their places stay as they are, so that nothing of the layout changes, but count as filler:
        no loss, no load on experts, no tokens.

        Args:
            failed: bool [segments].
        """
        micro_batches = tuple(
            tuple(
                replace(
                    micro,
                    segment_lengths=np.where(
                        (micro.documents >= 0) & failed[micro.documents], 0, micro.segment_lengths
                    ),
                )
                for micro in replica
            )
            for replica in self.micro_batches
        )
        return replace(
            self,
            micro_batches=micro_batches,
            document_loss_tokens=np.where(failed, 0, self.document_loss_tokens),
            document_tokens=np.where(failed, 0, self.document_tokens),
            failed=self.failed + int(self.document_samples[failed].sum()),
        )


def plan_step(
    stream: RowStream,
    cursor: Cursor,
    global_batch_size: int,
    micro_batch_size: int,
    sharing: Sharing,
    max_rows: int | None = None,
) -> tuple[StepPlan, Cursor] | None:
    """Plan the next step.

    Args:
        stream: the rows.
        cursor: where the step starts.
        global_batch_size: rows of the step.
        micro_batch_size: rows of one forward pass.
        sharing: the replicas, and how the pictures are shared out.
        max_rows: take at most so many rows from the data; null: as many as there are.

    Returns:
        The plan and the place behind it; null where the data have ended. A last batch that they do
        not fill is completed with rows of filler.

    Raises:
        ConfigError: the batch does not divide into micro-batches of all replicas.
    """
    wanted = global_batch_size if max_rows is None else min(global_batch_size, max_rows)
    rows, cursor = stream.take(cursor, wanted)
    if not rows:
        return None
    rows += [EMPTY_ROW] * (global_batch_size - len(rows))
    return plan_rows(stream, rows, micro_batch_size, sharing), cursor


def plan_rows(
    stream: RowStream,
    rows: Sequence[Row],
    micro_batch_size: int,
    sharing: Sharing,
) -> StepPlan:
    """Plan a batch of given rows.

    Which rows a step consumes, and their order, is the same for every layout; where each of them
    is computed follows from their attention (`assign_rows`).

    Args:
        stream: where the rows come from.
        rows: all rows of the batch.
        micro_batch_size: rows of one forward pass.
        sharing: the replicas, and how the pictures are shared out.

    Raises:
        ConfigError: the batch does not divide into micro-batches of all replicas.
    """
    num_replicas = sharing.num_replicas
    if not rows or len(rows) % (micro_batch_size * num_replicas):
        raise ConfigError(
            f"training.global_batch_size {len(rows)} is not a multiple of "
            f"training.micro_batch_size {micro_batch_size} times the {num_replicas} data-parallel "
            "replicas; change the batch or the layout"
        )
    table = Table.of(rows)
    places = assign_rows(table.attention_costs(), micro_batch_size, num_replicas)
    pictures = find_pictures(stream, table)
    segments = Segments.of(table, stream.seq_length)
    spans = np.stack([pictures.start, pictures.tokens], axis=1)
    first_span = np.searchsorted(pictures.row, np.arange(len(rows) + 1)).tolist()

    replica_of, micro_of, base_of = (np.zeros(len(rows), np.int64) for _ in range(3))
    micro_batches: list[tuple[MicroBatchPlan, ...]] = []
    for replica, groups in enumerate(places):
        planned = []
        for number, group in enumerate(groups):
            parts, columns = [], []
            for k, row in enumerate(group):
                replica_of[row], micro_of[row] = replica, number
                base_of[row] = k * stream.seq_length
                here = slice(first_span[row], first_span[row + 1])
                parts.append(spans[here] + (k * stream.seq_length, 0) if k else spans[here])
                columns.append(pictures.columns[here])
            padded, lengths, documents = segments.of_rows(group)
            bounds = np.zeros(len(padded) + 1, np.int32)
            np.cumsum(padded, out=bounds[1:])
            planned.append(
                MicroBatchPlan(
                    rows=tuple(rows[row] for row in group),
                    cu_seqlens=bounds,
                    segment_lengths=lengths,
                    documents=documents,
                    max_seqlen=int(padded.max()),
                    picture_spans=np.concatenate(parts) if len(parts) > 1 else parts[0],
                    picture_columns=np.concatenate(columns) if len(parts) > 1 else columns[0],
                )
            )
        micro_batches.append(tuple(planned))

    planned_pictures = PictureTable(
        pictures.document,
        pictures.source,
        pictures.sample,
        pictures.ordinal,
        pictures.grid_h,
        pictures.grid_w,
        replica_of[pictures.row],
        micro_of[pictures.row],
        pictures.start + base_of[pictures.row],
        pictures.tokens,
    )
    return StepPlan(
        first_row=next((row.number for row in rows if row.number >= 0), -1),
        micro_batches=tuple(micro_batches),
        pictures=planned_pictures,
        shares=sharing.shares(planned_pictures),
        document_loss_tokens=count_loss_tokens(stream, rows, table),
        document_tokens=table.by_unit(table.length),
        document_samples=np.bincount(table.unit, minlength=table.units).astype(np.int64),
        image_patches=int(planned_pictures.patches.sum()),
    )


def assign_rows(
    costs: NDArray[np.float64], micro_batch_size: int, num_replicas: int
) -> list[list[list[int]]]:
    """Rows of each replica's micro-batches, balanced by their attention.

    Every row costs the same but for its attention, which grows with the square of its samples'
    lengths. Replicas wait for each other at every micro-batch where experts are spread over them,
    and at the end of the step in any case. So micro-batch i of all replicas is made of rows that
    are neighbours in cost, the dearest first, and each replica that has had least so far gets the
    dearest of them. With one replica the order stays as it is.

    Args:
        costs: [rows] of each row.
        micro_batch_size: rows of a micro-batch.
        num_replicas: data-parallel size.

    Returns:
        Indexed [replica][micro-batch]: ascending places in `costs`.
    """
    count = len(costs) // (micro_batch_size * num_replicas)
    if num_replicas == 1:
        rows = list(range(len(costs)))
        return [[rows[i * micro_batch_size :][:micro_batch_size] for i in range(count)]]
    # Rounded, so that no order hangs on the last bit of a sum.
    order = np.argsort(-np.rint(costs), kind="stable").tolist()
    groups: list[list[list[int]]] = [[[] for _ in range(count)] for _ in range(num_replicas)]
    loads = [0.0] * num_replicas
    for number in range(count):
        first = number * micro_batch_size * num_replicas
        for row in order[first : first + micro_batch_size * num_replicas]:
            open_replicas = [
                replica
                for replica in range(num_replicas)
                if len(groups[replica][number]) < micro_batch_size
            ]
            chosen = min(open_replicas, key=lambda replica: (loads[replica], replica))
            groups[chosen][number].append(row)
            loads[chosen] += float(costs[row])
    return [[sorted(group) for group in replica] for replica in groups]
