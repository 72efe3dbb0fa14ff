"""What a decoder is asked for, and what every decoder promises."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from PIL import Image

from megatron_vlm.data.pictures import decoding, faults, open_picture, upright_size
from megatron_vlm.errors import DataError

if TYPE_CHECKING:
    from megatron_vlm.config.model_schema import VisionConfig

FAULT = "picture cannot be decoded"


@dataclass(frozen=True, slots=True, eq=False)
class PatchJob:
    """One picture to be cut into patches."""

    encoded: bytes
    """The file's content."""
    height: int
    """In pixels, upright, as the index recorded it."""
    width: int
    """Likewise."""
    grid_h: int
    """Patches wanted along the height, a multiple of `spatial_merge_size`."""
    grid_w: int
    """Patches wanted along the width, likewise."""


class PictureDecoder(Protocol):
    """Turns batches of encoded pictures into patches. Safe to share between threads."""

    device: torch.device
    """Where the patches lie."""

    def decode(
        self, jobs: Sequence[PatchJob], vision: VisionConfig, out: torch.Tensor | None = None
    ) -> list[torch.Tensor | DataError]:
        """Decode, resize, normalise and cut a batch of pictures.

        Args:
            jobs: the pictures; there may be none.
            vision: patch size, merge size, mean and standard deviation.
            out: float32 [patches of all jobs, 3 * patch_size**2] on `device`, contiguous; filled
                job after job if given.

        Returns:
            For each job its patches, float32 [grid_h * grid_w, 3 * patch_size**2] in the layout of
            `pictures.cut`, a part of `out` if that was given; or the reason why it has none, its
            part of `out` then being undefined.

        Raises:
            MemoryError: there is no memory to decode one; says nothing about the picture.
        """
        ...

    def close(self) -> None:
        """End its threads, if it has any of its own."""
        ...


def places(
    jobs: Sequence[PatchJob],
    vision: VisionConfig,
    out: torch.Tensor | None,
    device: torch.device,
) -> list[torch.Tensor]:
    """Each job's part of `out`, which is made on `device` if it is not given."""
    counts = [job.grid_h * job.grid_w for job in jobs]
    if out is None:
        width = 3 * vision.patch_size**2
        out = torch.empty(sum(counts), width, dtype=torch.float32, device=device)
    return list(out.split(counts)) if counts else []


@contextmanager
def opened(job: PatchJob) -> Iterator[Image.Image]:
    """The job's picture with its header read, and room in memory for its pixels.

    Raises:
        DataError: it has no sound header, or is of another size than the job says.
    """
    with faults(FAULT):
        image = open_picture(job.encoded)
    with decoding.hold(image.width * image.height):
        with faults(FAULT):
            found = upright_size(image)
        if found != (job.height, job.width):
            raise DataError(
                f"picture is {found[0]}x{found[1]} pixels (height x width), but the index says "
                f"{job.height}x{job.width}; build the data set again"
            )
        yield image
