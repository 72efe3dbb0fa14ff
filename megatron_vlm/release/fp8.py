"""Block-scaled float8 weights as DeepSeek-V3 is released: one float32 factor for each block.

`X.weight` is float8_e4m3fn `[rows, columns]`, `X.weight_scale_inv` float32 `[blocks of rows,
blocks of columns]`; the weight is their product, the last block of an axis being as short as it
comes out.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_vlm.errors import ConversionError
from megatron_vlm.release.safetensors_reader import SafetensorsFolder

SCALE_SUFFIX = "_scale_inv"

_MOST_ELEMENTS = 1 << 20
"""Multiplied at a time: some 10 MiB in float32, with their factors."""


class BlockScaled:
    """The float8 tensors of a folder, multiplied out as they are read."""

    def __init__(self, folder: SafetensorsFolder, config: dict[str, Any], name: str) -> None:
        """Find them and their factors.

        Args:
            folder: the tensors.
            config: config.json, whose `quantization_config` tells the size of a block.
            name: what errors call it.

        Raises:
            ConversionError: factors are missing or misshapen, or the format is another one.
        """
        self._folder = folder
        self.names = {n for n, entry in folder.entries.items() if entry.dtype == "F8_E4M3"}
        self.scales = {n + SCALE_SUFFIX for n in self.names} & folder.entries.keys()
        self._block = _block_size(config, name, bool(self.names))
        self._last: tuple[str, torch.Tensor] | None = None
        for weight in sorted(self.names):
            self._check(weight)

    def _check(self, weight: str) -> None:
        shape = self._folder.entries[weight].shape
        scale = self._folder.entries.get(weight + SCALE_SUFFIX)
        if scale is None:
            raise ConversionError(
                f"{self._folder.path}: {weight} is float8 and {weight + SCALE_SUFFIX} is missing; "
                "download it again"
            )
        if len(shape) != 2:
            raise ConversionError(f"{weight} is float8 {list(shape)}; expected a matrix")
        wanted = tuple(-(-size // block) for size, block in zip(shape, self._block, strict=True))
        if scale.dtype != "F32" or scale.shape != wanted:
            raise ConversionError(
                f"{weight + SCALE_SUFFIX} is {scale.dtype} {list(scale.shape)}; expected F32 "
                f"{list(wanted)}, one factor for each block of {self._block[0]} x "
                f"{self._block[1]} of {weight}"
            )

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` `[count]` with the products from element `start` on, rounded to its dtype."""
        columns = self._folder.entries[name].shape[1]
        scales = self._scales(name)
        done = 0
        while done < out.numel():
            row, column = divmod(start + done, columns)
            left = out.numel() - done
            if column or left < columns:
                rows, width = 1, min(columns - column, left)
            else:
                rows, width = min(left // columns, max(1, _MOST_ELEMENTS // columns)), columns
            part = torch.empty(rows * width, dtype=torch.float8_e4m3fn)
            self._folder.read(name, start + done, part)
            product = multiply_out(part.view(rows, width), scales, self._block, row, column)
            out[done : done + rows * width] = product.view(-1)
            done += rows * width

    def _scales(self, name: str) -> torch.Tensor:
        # A tensor is read in several parts, one after the other.
        if self._last is None or self._last[0] != name:
            entry = self._folder.entries[name + SCALE_SUFFIX]
            scales = torch.empty(entry.shape, dtype=torch.float32)
            self._folder.read(name + SCALE_SUFFIX, 0, scales.view(-1))
            self._last = (name, scales)
        return self._last[1]


def multiply_out(
    weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], row: int, column: int
) -> torch.Tensor:
    """A part of a float8 matrix times its factors, in float32.

    Args:
        weight: `[rows, columns]` from `row` and `column` of the whole on.
        scales: the factors of the whole.
        block: rows and columns of a block.
        row: where the part begins.
        column: likewise.
    """
    rows = torch.arange(row, row + weight.size(0)) // block[0]
    columns = torch.arange(column, column + weight.size(1)) // block[1]
    return weight.to(torch.float32).mul_(scales[rows][:, columns])


def _block_size(config: dict[str, Any], name: str, used: bool) -> tuple[int, int]:
    settings = config.get("quantization_config")
    if settings is None:
        if used:
            raise ConversionError(
                f"{name}: has no quantization_config, while tensors are float8; expected one with "
                "weight_block_size"
            )
        return 1, 1
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method != "fp8" or settings.get("fmt", "e4m3") != "e4m3":
        raise ConversionError(
            f"{name}: quantization_config is {str(settings)[:80]}; expected quant_method fp8 with "
            "fmt e4m3, or weights that are not quantised"
        )
    if not used:
        return 1, 1
    block = settings.get("weight_block_size")
    ok = isinstance(block, list) and len(block) == 2
    if not ok or not all(type(size) is int and size > 0 for size in block):
        raise ConversionError(
            f"{name}: quantization_config.weight_block_size is {block}; expected two sizes, as "
            "[128, 128]"
        )
    return block[0], block[1]
