"""Pictures decoded by NVIDIA DALI: on the GPU, or on the processor to prove the same graph there.

DALI decodes, and no more: its cubic filter differs from Pillow's by up to 18 of 255 levels
(measured on noise), so that a model would see other pixels in training than afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from megatron_vlm.data.decoders.device import MAX_BATCH, DeviceDecoder


class DaliDecoder(DeviceDecoder):
    """A `PictureDecoder` by DALI's `mixed` decoder: the processor parses, the GPU decodes."""

    def __init__(
        self,
        device: torch.device,
        threads: int = 1,
        decode_device: Literal["mixed", "cpu"] = "mixed",
    ) -> None:
        """Build the pipeline.

        Args:
            device: where the patches lie: a GPU, or the processor with `decode_device` "cpu".
            threads: of the processor, for DALI and for what DALI does not decode.
            decode_device: where DALI decodes.
        """
        super().__init__(_Pipeline(device, threads, decode_device), device, threads)


class _Pipeline:
    """DALI's graph: encoded bytes in, pixels out. Built anew when it has failed."""

    def __init__(self, device: torch.device, threads: int, decode_device: str) -> None:
        self._device = device
        self._threads = max(1, threads)
        self._decode_device = decode_device
        self._graph = self._build()

    def __call__(self, encoded: Sequence[bytes]) -> list[torch.Tensor]:
        try:
            self._graph.feed_input("encoded", [np.frombuffer(one, np.uint8) for one in encoded])
            (batch,) = self._graph.run()
        except RuntimeError:
            # DALI promises nothing of a pipeline after an error.
            self._graph = self._build()
            raise
        return [self._tensor(batch[number]) for number in range(len(encoded))]

    def _tensor(self, pixels: Any) -> torch.Tensor:
        if self._decode_device == "mixed":
            return torch.from_dlpack(pixels)
        # A copy: DALI writes its next batch there.
        return torch.from_numpy(np.array(pixels)).to(self._device)

    def _build(self) -> Any:
        from nvidia.dali import Pipeline, fn, types

        graph = Pipeline(
            batch_size=MAX_BATCH,
            num_threads=self._threads,
            device_id=(self._device.index or 0) if self._decode_device == "mixed" else None,
            prefetch_queue_depth=1,
        )
        with graph:
            pixels = fn.decoders.image(
                fn.external_source(name="encoded"),
                device=self._decode_device,
                output_type=types.RGB,
                # As libjpeg does by default; nvJPEG repeats the chroma samples otherwise.
                jpeg_fancy_upsampling=True,
                adjust_orientation=False,
            )
            graph.set_outputs(pixels)
        graph.build()
        return graph
