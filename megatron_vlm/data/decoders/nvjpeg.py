"""Pictures decoded by nvJPEG through torchvision, where DALI is not installed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_vlm.data.decoders.device import DeviceDecoder


class NvjpegDecoder(DeviceDecoder):
    """A `PictureDecoder` by `torchvision.io.decode_jpeg`.

    nvJPEG repeats chroma samples where libjpeg interpolates them, so that pictures with reduced
    chroma differ at sharp edges of colour from what the other decoders give.
    """

    def __init__(self, device: torch.device, threads: int = 1) -> None:
        """Decode on `device`, and what is no JPEG on `threads` of the processor."""
        from torchvision.io import ImageReadMode, decode_jpeg

        def decode(encoded: Sequence[bytes]) -> list[torch.Tensor]:
            # Copied, since torch has no tensors that cannot be written.
            data = [torch.from_numpy(np.frombuffer(one, np.uint8).copy()) for one in encoded]
            found = decode_jpeg(data, mode=ImageReadMode.RGB, device=device)
            return [pixels.permute(1, 2, 0) for pixels in found]

        super().__init__(decode, device, threads)
