"""From a plan to the tensors of one rank: text of a micro-batch, patches of its share of pictures.

What can be known from the plan alone (`structure`) is computed without reading anything, for ranks
in the middle of a pipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_vlm.data.fetch import SampleReader
from megatron_vlm.data.pictures import patches
from megatron_vlm.data.plan import MicroBatchPlan, PicturePlan, StepPlan
from megatron_vlm.data.tokenizer import SpecialIds
from megatron_vlm.errors import DataError

if TYPE_CHECKING:
    from megatron_vlm.config.schema import VisionConfig


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


@dataclass(frozen=True, slots=True, eq=False)
class PictureBatch:
    """The pictures that one rank encodes in a step."""

    pixel_values: torch.Tensor
    """float32 [patches, channels * patch_size**2], pictures one after another."""
    grid_hw: torch.Tensor
    """int64 [pictures, 2], patches along height and width."""
    indices: torch.Tensor
    """int64 [pictures], their places in `StepPlan.pictures`, ascending."""


def structure(plan: MicroBatchPlan) -> Structure:
    """Positions, padding and rows of a micro-batch, without reading any data."""
    bounds = plan.cu_seqlens.astype(np.int64)
    sizes = np.diff(bounds)
    positions = np.arange(bounds[-1], dtype=np.int64) - np.repeat(bounds[:-1], sizes)
    real = np.repeat(plan.segment_lengths.astype(np.int64), sizes)
    seq_length = int(bounds[-1]) // len(plan.rows)
    rows = np.repeat(np.arange(len(plan.rows), dtype=np.int64), seq_length)
    return Structure(
        position_ids=torch.from_numpy(positions),
        padding_mask=torch.from_numpy(positions >= real),
        row_ids=torch.from_numpy(rows),
    )


def collate_text(plan: MicroBatchPlan, reader: SampleReader, token_ids: SpecialIds) -> TextBatch:
    """Read a micro-batch's text and lay it out as planned.

    Raises:
        DataError: a sample cannot be read, or has another length than planned.
    """
    total = plan.num_tokens
    seq_length = total // len(plan.rows)
    tokens = np.full(total, token_ids.pad, dtype=np.int64)
    labels = tokens.copy()
    loss_mask = np.zeros(total, dtype=np.float32)
    for k, row in enumerate(plan.rows):
        for segment in row.segments:
            start = k * seq_length + segment.start
            stop = start + segment.length
            ids, flags = _expand(reader.read_tokens(segment.sample), plan, start, stop, token_ids)
            if len(ids) != segment.length:
                raise DataError(
                    f"{reader.index.describe(segment.sample)}: {len(ids)} tokens, but "
                    f"{segment.length} were planned; plan and data set differ"
                )
            tokens[start:stop] = ids
            labels[start : stop - 1] = ids[1:]
            loss_mask[start : stop - 1] = flags[1:]
    return TextBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy(loss_mask),
        position_ids=structure(plan).position_ids,
    )


def collate_pictures(
    plan: StepPlan,
    rank: int,
    reader: SampleReader,
    vision: VisionConfig | None,
    pool: Executor | None = None,
) -> PictureBatch:
    """Read, decode and cut the pictures that `rank` encodes; none gives empty tensors.

    Args:
        plan: the step.
        rank: in the world.
        reader: the data set.
        vision: the encoder's geometry; null for a text-only model, whose plans have no pictures.
        pool: threads to decode on; without it, the calling thread decodes.

    Raises:
        DataError: a picture cannot be read or decoded.
    """
    mine = [i for i, picture in enumerate(plan.pictures) if picture.encoder_rank == rank]
    grid_hw = torch.tensor(
        [(plan.pictures[i].grid_h, plan.pictures[i].grid_w) for i in mine], dtype=torch.int64
    ).reshape(-1, 2)
    width = vision.in_channels * vision.patch_size**2 if vision else 0
    counts = grid_hw.prod(dim=1)
    pixel_values = torch.empty(int(counts.sum()), width, dtype=torch.float32)
    if mine and vision:
        parts = [part.numpy() for part in pixel_values.split(counts.tolist())]
        fill = _filler(reader, vision)
        jobs = [(plan.pictures[i], part) for i, part in zip(mine, parts, strict=True)]
        if pool is None:
            for picture, part in jobs:
                fill(picture, part)
        else:
            for done in [pool.submit(fill, *job) for job in jobs]:
                done.result()
    return PictureBatch(pixel_values, grid_hw, torch.tensor(mine, dtype=torch.int64))


def _filler(
    reader: SampleReader, vision: VisionConfig
) -> Callable[[PicturePlan, NDArray[np.float32]], None]:
    def fill(picture: PicturePlan, out: NDArray[np.float32]) -> None:
        image = reader.read_picture(picture.sample, picture.ordinal)
        patches(image, picture.grid_h, picture.grid_w, vision, out)

    return fill


def _expand(
    text: NDArray[np.int32],
    plan: MicroBatchPlan,
    start: int,
    stop: int,
    token_ids: SpecialIds,
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Ids and flags with each placeholder repeated to its picture's number of tokens."""
    ids, flags = text
    places = np.flatnonzero(ids == token_ids.image)
    if not places.size:
        return ids, flags
    first, last = np.searchsorted(plan.picture_spans[:, 0], (start, stop))
    repeats = np.ones(len(ids), dtype=np.int64)
    repeats[places] = plan.picture_spans[first:last, 1]
    return np.repeat(ids, repeats), np.repeat(flags, repeats)
