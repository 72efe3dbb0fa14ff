"""From a plan to the tensors of one rank: the text of a micro-batch.

What can be known from the plan alone (`structure`) is computed without reading anything, for ranks
in the middle of a pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_vlm.data.fetch import SampleReader
from megatron_vlm.data.plan import MicroBatchPlan
from megatron_vlm.data.positions import segment_positions
from megatron_vlm.data.sample_set import SampleSet
from megatron_vlm.errors import DataError


@dataclass(frozen=True, slots=True, eq=False)
class Structure:
    """What the plan alone says of a micro-batch's T = micro_batch_size * seq_length tokens."""

    position_ids: torch.Tensor
    """int64 [T], from 0 in each segment."""
    padding_mask: torch.Tensor
    """bool [T], true on padding and filler."""
    row_ids: torch.Tensor
    """int64 [T], the row within the micro-batch, from 0."""


@dataclass(frozen=True, slots=True, eq=False)
class TextBatch:
    """The text of a micro-batch of T = micro_batch_size * seq_length tokens."""

    tokens: torch.Tensor
    """int64 [T]; each picture is its number of placeholder ids, padding is the pad id."""
    labels: torch.Tensor
    """int64 [T]; the next token of the segment; the pad id where there is none."""
    loss_mask: torch.Tensor
    """float32 [T]; 1 where the label is a target."""
    position_ids: torch.Tensor
    """int64 [T], from 0 in each segment."""


def structure(plan: MicroBatchPlan) -> Structure:
    """Positions, padding and rows of a micro-batch, without reading any data."""
    positions = segment_positions(plan.cu_seqlens)
    real = np.repeat(plan.segment_lengths.astype(np.int64), np.diff(plan.cu_seqlens))
    seq_length = plan.num_tokens // len(plan.rows)
    rows = np.repeat(np.arange(len(plan.rows), dtype=np.int64), seq_length)
    return Structure(
        position_ids=torch.from_numpy(positions),
        padding_mask=torch.from_numpy(positions >= real),
        row_ids=torch.from_numpy(rows),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """One sample's tokens, pictures at their full number, or a part of them."""

    ids: NDArray[np.int32]
    """[n]"""
    flags: NDArray[np.int32]
    """[n]; 1 where this token is a target."""


def read_document(
    reader: SampleReader, samples: SampleSet, sample: int, offset: int, length: int
) -> Document:
    """Read a sample's text and let its pictures grow to their number of tokens.

    Args:
        reader: the data set.
        samples: the same, as the model sees it.
        sample: number in the data set.
        offset: first token wanted.
        length: tokens wanted.

    Raises:
        DataError: it cannot be read, or has another length than planned.
    """
    ids, flags = reader.read_tokens(sample)
    places = np.flatnonzero(ids == reader.index.special_ids.image)
    if places.size:
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[places] = samples.picture_spans(sample)[1]
        ids, flags = np.repeat(ids, repeats), np.repeat(flags, repeats)
    if len(ids) != samples.lengths[sample]:
        raise DataError(
            f"{reader.index.describe(sample)}: {len(ids)} tokens, but {samples.lengths[sample]} "
            "were planned; plan and data set differ"
        )
    return Document(ids[offset : offset + length], flags[offset : offset + length])


def collate_text(plan: MicroBatchPlan, documents: Mapping[int, Document], pad_id: int) -> TextBatch:
    """Lay out a micro-batch's text as planned.

    Args:
        plan: the micro-batch.
        documents: by their numbers in the step; what is missing becomes filler.
        pad_id: what padding and filler consist of.
    """
    tokens = np.full(plan.num_tokens, pad_id, dtype=np.int64)
    labels = tokens.copy()
    loss_mask = np.zeros(plan.num_tokens, dtype=np.float32)
    for number, start in zip(plan.documents.tolist(), plan.cu_seqlens.tolist(), strict=False):
        document = documents.get(number)
        if document is None:
            continue
        stop = start + len(document.ids)
        tokens[start:stop] = document.ids
        labels[start : stop - 1] = document.ids[1:]
        loss_mask[start : stop - 1] = document.flags[1:]
    return TextBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy(loss_mask),
        position_ids=structure(plan).position_ids,
    )
