"""What the decoders of a GPU share: everything but the decoding itself.

Only JPEG is decoded on the device: whatever else a GPU's decoders read, they read on the processor
as well. Pixels are resized and cut where they lie, so that no more than the encoded bytes travel.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Protocol

import torch

from megatron_vlm.data.decoders.cpu import CpuDecoder
from megatron_vlm.data.decoders.job import PatchJob, opened, places
from megatron_vlm.data.pictures import JPEGS, MAX_PICTURE_PIXELS, normalisation, orientation_of
from megatron_vlm.data.resize import resize_tensor
from megatron_vlm.errors import DataError

if TYPE_CHECKING:
    from megatron_vlm.config.model_schema import VisionConfig

MAX_BATCH = 64
"""Most pictures decoded by one call. Our choice."""
MAX_REDUCTION = 8
"""Pictures reduced by more than this are left to the processor: torch's kernel keeps the weights
of a filter in memory shared by a block, whose size bounds it."""

_log = logging.getLogger(__name__)


class Backend(Protocol):
    """Decodes batches of JPEG."""

    def __call__(self, encoded: Sequence[bytes]) -> list[torch.Tensor]:
        """RGB as stored, the EXIF orientation not applied.

        Returns:
            uint8 [height, width, 3] for each, on the device, with any strides.

        Raises:
            RuntimeError: one of them cannot be decoded, and so none is.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Taken:
    """A picture that the device decodes."""

    number: int
    job: PatchJob
    orientation: int

    @property
    def stored_size(self) -> tuple[int, int]:
        """(rows, columns) before it is turned upright."""
        size = (self.job.height, self.job.width)
        return size[::-1] if self.orientation >= 5 else size


class DeviceDecoder:
    """A `PictureDecoder` around a device's own decoder of JPEG.

    Whatever that decoder refuses goes to a `CpuDecoder`, whose word is final.
    """

    def __init__(self, backend: Backend, device: torch.device, threads: int = 1) -> None:
        """Decode JPEG by `backend` on `device`, and all else on `threads` of the processor."""
        self.device = device
        self._backend = backend
        self._cpu = CpuDecoder(threads)
        self._lock = Lock()
        self._warned = False

    def decode(
        self, jobs: Sequence[PatchJob], vision: VisionConfig, out: torch.Tensor | None = None
    ) -> list[torch.Tensor | DataError]:
        """As `PictureDecoder.decode`."""
        parts = places(jobs, vision, out, self.device)
        results: list[torch.Tensor | DataError] = list(parts)
        left: list[int] = []
        taken: list[_Taken] = []
        for number, job in enumerate(jobs):
            try:
                orientation = _orientation(job, vision)
            except DataError as error:
                results[number] = error
                continue
            if orientation is None:
                left.append(number)
            else:
                taken.append(_Taken(number, job, orientation))
        # One caller at a time: the backends are not made to be shared.
        with self._lock:
            for batch in _batches(taken):
                for one, pixels in zip(batch, self._halving(batch), strict=True):
                    if pixels is None:
                        left.append(one.number)
                        continue
                    height = one.job.grid_h * vision.patch_size
                    width = one.job.grid_w * vision.patch_size
                    resized = resize_tensor(pixels, height, width, one.orientation)
                    cut_tensor(resized, vision, parts[one.number])
                self._wait()
        refused = {one.number for one in taken}
        decoded = self._cpu.decode([jobs[number] for number in left], vision)
        for number, result in zip(left, decoded, strict=True):
            if isinstance(result, DataError):
                results[number] = result
                continue
            parts[number].copy_(result)
            if number in refused:
                self._warn()
        return results

    def close(self) -> None:
        """End the threads."""
        self._cpu.close()

    def _halving(self, batch: Sequence[_Taken]) -> Iterator[torch.Tensor | None]:
        """Pixels of each picture of a batch; null for those that the backend refuses.

        It refuses whole batches, so halves are tried until the bad ones are alone.
        """
        try:
            found = self._backend([one.job.encoded for one in batch])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            if len(batch) == 1:
                yield None
                return
            middle = len(batch) // 2
            yield from self._halving(batch[:middle])
            self._wait()
            yield from self._halving(batch[middle:])
            return
        for one, pixels in zip(batch, found, strict=True):
            yield pixels if tuple(pixels.shape) == (*one.stored_size, 3) else None

    def _wait(self) -> None:
        """Let what was asked of the device come to its end: the pixels that it reads are the
        backend's to overwrite as soon as it is called again."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _warn(self) -> None:
        """Say once that the backend refuses pictures which are sound."""
        if not self._warned:
            self._warned = True
            _log.warning(
                "a picture that %s refuses was decoded by the processor; if it refuses many, look "
                "for errors of its library",
                type(self).__name__,
            )


def cut_tensor(image: torch.Tensor, vision: VisionConfig, out: torch.Tensor) -> None:
    """`pictures.cut` on any device.

    Args:
        image: uint8 [height, width, 3] of the planned size, with any strides.
        vision: patch size, merge size, mean and standard deviation.
        out: float32 [patches, 3 * patch_size**2], contiguous, filled.
    """
    patch, merge = vision.patch_size, vision.spatial_merge_size
    rows, columns = (side // (patch * merge) for side in image.shape[:2])
    blocks = image.reshape(rows, merge, patch, columns, merge, patch, 3)
    ordered = blocks.permute(0, 3, 1, 4, 6, 2, 5)
    out.view(ordered.shape).copy_(ordered)
    scale, shift = (torch.from_numpy(part).to(out.device) for part in normalisation(vision))
    out.mul_(scale).sub_(shift)


def _orientation(job: PatchJob, vision: VisionConfig) -> int | None:
    """The orientation of a picture that the device can decode; null for all others."""
    reduction = max(job.height / job.grid_h, job.width / job.grid_w) / vision.patch_size
    # By its first bytes: other formats may have to be decoded to tell their orientation.
    if reduction > MAX_REDUCTION or not job.encoded.startswith(b"\xff\xd8"):
        return None
    with opened(job) as image:
        plain = image.format in JPEGS and image.mode in ("RGB", "L")
        return orientation_of(image) if plain else None


def _batches(pictures: Sequence[_Taken]) -> Iterator[list[_Taken]]:
    """Batches that decode to no more pixels than one picture may have."""
    batch: list[_Taken] = []
    pixels = 0
    for one in pictures:
        size = one.job.height * one.job.width
        if batch and (len(batch) == MAX_BATCH or pixels + size > MAX_PICTURE_PIXELS):
            yield batch
            batch, pixels = [], 0
        batch.append(one)
        pixels += size
    if batch:
        yield batch
