"""The pictures that one rank decodes in a step: what fetches them, and the tensor they fill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from megatron_vlm.data.decoders import PatchJob, PictureDecoder
from megatron_vlm.data.fetch import SampleReader
from megatron_vlm.data.format import STILL
from megatron_vlm.data.picture_table import PicturePlan
from megatron_vlm.data.pictures import patches
from megatron_vlm.data.plan import StepPlan
from megatron_vlm.data.workers import Outcome, Task
from megatron_vlm.errors import DataError

if TYPE_CHECKING:
    from megatron_vlm.config.model_schema import VisionConfig

_AT_ONCE_ON_A_DEVICE = 64
"""Pictures that a GPU is given at once. Our choice."""


@dataclass(frozen=True, slots=True, eq=False)
class PictureBatch:
    """The pictures that one rank decodes in a step."""

    pixel_values: torch.Tensor
    """float32 [patches, channels * patch_size**2], pictures one after another."""
    grid_hw: torch.Tensor
    """int64 [pictures, 2], patches along height and width."""
    indices: torch.Tensor
    """int64 [pictures], their places in `StepPlan.pictures`, ascending."""

    def to(self, device: torch.device, dtype: torch.dtype) -> PictureBatch:
        """The same pictures where and as the encoder takes them; `indices` stay."""
        pixels = self.pixel_values.to(device=device, dtype=dtype)
        return PictureBatch(pixels, self.grid_hw, self.indices)


class PictureFetch:
    """One rank's pictures of one step, on their way."""

    def __init__(
        self,
        plan: StepPlan,
        rank: int,
        readers: Sequence[SampleReader],
        decoder: PictureDecoder,
        vision: VisionConfig | None,
    ) -> None:
        """Make room for the pictures that `rank` decodes; none gives empty tensors.

        Args:
            plan: the step.
            rank: in the world.
            readers: of each source.
            decoder: decodes pictures; frames of videos are decoded on the CPU.
            vision: the encoder's geometry; null for a text-only model, whose plans have no
                pictures.
        """
        self._readers, self._decoder, self._vision = readers, decoder, vision
        shares = plan.shares
        self._mine = shares.picture[(shares.rank == rank) & shares.owner].tolist()
        self._pictures = [plan.pictures[i] for i in self._mine]
        sizes = [(picture.grid_h, picture.grid_w) for picture in self._pictures]
        self._grid_hw = torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2)
        width = vision.in_channels * vision.patch_size**2 if vision else 0
        counts = self._grid_hw.prod(dim=1)
        self._pixels = torch.empty(int(counts.sum()), width, device=decoder.device)
        self._parts = self._pixels.split(counts.tolist())
        self._groups = self._grouped()

    def tasks(self) -> list[Task]:
        """What has to be run, in any order and on any thread."""
        return [
            Task(
                partial(self._describe, group[0]),
                partial(self._frames if self._is_frame(group[0]) else self._stills, group),
            )
            for group in self._groups
        ]

    def finish(
        self, outcomes: Sequence[Outcome]
    ) -> tuple[PictureBatch, list[tuple[int, str, str]]]:
        """The batch once all tasks have ended.

        Args:
            outcomes: of `tasks`, in their order.

        Returns:
            The batch, in which a picture that failed is blank; and for each of those the number of
            its sample in the step, its name, and the reason.
        """
        failed: list[tuple[int, str, str]] = []
        blank: list[int] = []
        given_up = False
        for group, outcome in zip(self._groups, outcomes, strict=True):
            errors = [outcome.error] * len(group) if outcome.error else outcome.value
            given_up |= isinstance(outcome.error, TimeoutError)
            for place, error in zip(group, errors, strict=True):
                if error is not None:
                    blank.append(place)
                    picture = self._pictures[place]
                    failed.append((picture.document, self._describe(place), str(error)))
        pixels = self._pixels
        if given_up:
            # The thread that was given up may still write into the old one, at any time.
            pixels = pixels.clone()
        parts = pixels.split(self._grid_hw.prod(dim=1).tolist())
        for place in blank:
            parts[place].zero_()
        numbers = torch.tensor(self._mine, dtype=torch.int64)
        return PictureBatch(pixels, self._grid_hw, numbers), failed

    def _grouped(self) -> list[list[int]]:
        """Pictures of a task each: a video's frames together, others as many as the decoder takes
        at once."""

        frames: list[list[int]] = []
        stills: list[int] = []
        last: tuple[int, int, int] | None = None
        last_pts = 0
        for place, picture in enumerate(self._pictures):
            columns = self._readers[picture.source].index.columns
            number = self._place_in_index(picture)
            pts = int(columns.picture_pts[number])
            if pts == STILL:
                stills.append(place)
                continue
            shard, offset = int(columns.picture_shard[number]), int(columns.picture_offset[number])
            # Samples may share a video, one may be drawn twice in a step, or show it twice.
            video = picture.document, shard, offset
            if video == last and pts > last_pts:
                frames[-1].append(place)
            else:
                frames.append([place])
            last, last_pts = video, pts
        at_once = 1 if self._decoder.device.type == "cpu" else _AT_ONCE_ON_A_DEVICE
        return frames + [
            stills[first : first + at_once] for first in range(0, len(stills), at_once)
        ]

    def _stills(self, group: list[int]) -> list[DataError | None]:
        assert self._vision is not None
        errors: list[DataError | None] = [None] * len(group)
        jobs, places = [], []
        for k, place in enumerate(group):
            picture = self._pictures[place]
            reader = self._readers[picture.source]
            columns, number = reader.index.columns, self._place_in_index(picture)
            try:
                encoded = reader.read_encoded(picture.sample, picture.ordinal)
            except DataError as error:
                errors[k] = error
                continue
            size = int(columns.picture_height[number]), int(columns.picture_width[number])
            jobs.append(PatchJob(encoded, *size, picture.grid_h, picture.grid_w))
            places.append(k)
        out = self._parts[group[0]] if len(group) == len(jobs) == 1 else None
        for k, result in zip(places, self._decoder.decode(jobs, self._vision, out), strict=True):
            if isinstance(result, DataError):
                errors[k] = result
            elif out is None:
                self._parts[group[k]].copy_(result)
        return errors

    def _frames(self, group: list[int]) -> list[DataError | None]:
        from megatron_vlm.data.video import decode_frames

        assert self._vision is not None
        first = self._pictures[group[0]]
        reader = self._readers[first.source]
        pts = [
            int(reader.index.columns.picture_pts[self._place_in_index(self._pictures[place])])
            for place in group
        ]
        encoded = reader.read_encoded(first.sample, first.ordinal)
        for place, frame in zip(group, decode_frames(encoded, pts), strict=True):
            picture = self._pictures[place]
            cut = patches(frame, picture.grid_h, picture.grid_w, self._vision)
            self._parts[place].copy_(torch.from_numpy(cut))
        return [None] * len(group)

    def _is_frame(self, place: int) -> bool:
        picture = self._pictures[place]
        columns = self._readers[picture.source].index.columns
        return int(columns.picture_pts[self._place_in_index(picture)]) != STILL

    def _place_in_index(self, picture: PicturePlan) -> int:
        start = self._readers[picture.source].index.columns.sample_picture_start
        return int(start[picture.sample]) + picture.ordinal

    def _describe(self, place: int) -> str:
        picture = self._pictures[place]
        name = self._readers[picture.source].index.describe(picture.sample)
        return f"{name}, picture {picture.ordinal}"
