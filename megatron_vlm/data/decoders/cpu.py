"""Pictures decoded by the processor: JPEG by libjpeg-turbo, all else by Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from megatron_vlm.data.decoders.job import FAULT, PatchJob, opened, places
from megatron_vlm.data.jpeg import decode_jpeg
from megatron_vlm.data.pictures import JPEGS, cut, faults, load_picture, orientation_of
from megatron_vlm.data.resize import resize
from megatron_vlm.errors import DataError

if TYPE_CHECKING:
    from megatron_vlm.config.model_schema import VisionConfig


class CpuDecoder:
    """A `PictureDecoder` that needs no GPU."""

    device = torch.device("cpu")

    def __init__(self, threads: int = 1) -> None:
        """Decode on this many threads; at most 1 uses the caller's own."""
        self._pool = ThreadPoolExecutor(threads, "decode") if threads > 1 else None

    def decode(
        self, jobs: Sequence[PatchJob], vision: VisionConfig, out: torch.Tensor | None = None
    ) -> list[torch.Tensor | DataError]:
        """As `PictureDecoder.decode`."""

        def one(job: PatchJob, place: torch.Tensor) -> torch.Tensor | DataError:
            try:
                _fill(job, vision, place)
            except DataError as error:
                return error
            return place

        parts = places(jobs, vision, out, self.device)
        return list((self._pool.map if self._pool else map)(one, jobs, parts))

    def close(self) -> None:
        """End the threads."""
        if self._pool:
            self._pool.shutdown()


def _fill(job: PatchJob, vision: VisionConfig, place: torch.Tensor) -> None:
    height, width = job.grid_h * vision.patch_size, job.grid_w * vision.patch_size
    with opened(job) as image:
        with faults(FAULT):
            orientation = orientation_of(image)
            pixels = None
            if image.format in JPEGS:
                pixels = decode_jpeg(job.encoded, image.height, image.width)
            if pixels is None:
                pixels, orientation = load_picture(image), 1
        cut(resize(pixels, height, width, orientation), vision, place.numpy())
