"""What one rank encodes of a step: whole pictures it decoded, and parts of others'.

A picture that several ranks share is decoded by the first of them, which sends each its patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from megatron_vlm.models.vision.sharing import Part, SharedPictures

if TYPE_CHECKING:
    from megatron_vlm.data.picture_batch import PictureBatch
    from megatron_vlm.data.picture_table import Shares
    from megatron_vlm.data.plan import StepPlan


@dataclass(frozen=True, eq=False)
class LocalSegments:
    """Whole pictures and parts, in the order of the plan's shares."""

    pieces: list[torch.Tensor]
    """[patches, channels * patch_size**2] of each."""
    grid_hw: torch.Tensor
    """int64 [segments, 2], each segment's whole picture."""
    parts: list[Part]
    """Those that are parts of pictures."""
    group: dist.ProcessGroup
    """The vision mesh's data-parallel group."""

    def batch(
        self, segments: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor, SharedPictures | None]:
        """Input of the encoder: patches of some segments, their pictures' grids, the parts."""
        places = {segment: place for place, segment in enumerate(segments)}
        parts = tuple(
            replace(part, segment=places[part.segment])
            for part in self.parts
            if part.segment in places
        )
        return (
            torch.cat([self.pieces[segment] for segment in segments]),
            self.grid_hw[segments],
            SharedPictures(parts, self.group) if parts else None,
        )


def local_segments(
    plan: StepPlan, pictures: PictureBatch, rank: int, group: dist.ProcessGroup
) -> LocalSegments:
    """Bring together the patches that `rank` encodes; ranks that share a picture call it alike.

    Args:
        plan: the step.
        pictures: those that this rank decoded, on its device.
        rank: this one, in the world and in `group`.
        group: the vision mesh's data-parallel group.
    """
    shares, table = plan.shares, plan.pictures
    counts = np.bincount(shares.picture, minlength=len(table))
    mine = np.flatnonzero(shares.rank == rank)
    parts = [
        _part(shares, picture, segment, rank)
        for segment, picture in enumerate(shares.picture[mine].tolist())
        if counts[picture] > 1
    ]
    sizes = pictures.grid_hw.prod(dim=1).tolist()
    decoded = dict(zip(pictures.indices.tolist(), pictures.pixel_values.split(sizes), strict=True))
    received = _scatter(decoded, parts, group, pictures.pixel_values)
    pieces = [
        received[picture] if picture in received else decoded[picture][: int(patches)]
        for picture, patches in zip(
            shares.picture[mine].tolist(), shares.patches[mine], strict=True
        )
    ]
    grids = np.stack([table.grid_h, table.grid_w], axis=1)[shares.picture[mine]]
    device = pictures.pixel_values.device
    return LocalSegments(pieces, torch.from_numpy(grids).to(device), parts, group)


def _part(shares: Shares, picture: int, segment: int, rank: int) -> Part:
    where = slice(*np.searchsorted(shares.picture, [picture, picture + 1]).tolist())
    ranks = tuple(shares.rank[where].tolist())
    return Part(segment, picture, ranks, tuple(shares.patches[where].tolist()), ranks.index(rank))


def _scatter(
    decoded: dict[int, torch.Tensor],
    parts: list[Part],
    group: dist.ProcessGroup,
    like: torch.Tensor,
) -> dict[int, torch.Tensor]:
    """The patches of this rank's parts of pictures that another one decoded, by picture."""
    received: dict[int, torch.Tensor] = {}
    operations = []
    for part in parts:
        if part.place:
            room = like.new_empty(part.patches[part.place], like.size(1))
            received[part.picture] = room
            source = part.ranks[0]
            operations.append(
                dist.P2POp(dist.irecv, room, group=group, tag=part.picture, group_peer=source)
            )
            continue
        for peer, piece in _others(part, decoded[part.picture]):
            operations.append(
                dist.P2POp(dist.isend, piece, group=group, tag=part.picture, group_peer=peer)
            )
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    return received


def _others(part: Part, pixels: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Every other rank of a part, and its patches."""
    pieces = pixels.split(list(part.patches))
    yield from zip(part.ranks[1:], pieces[1:], strict=True)
