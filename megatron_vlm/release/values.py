"""What every number on its way is held to: it is finite."""

from __future__ import annotations

import torch

from megatron_vlm.errors import ConversionError


def check_finite(values: torch.Tensor, name: str) -> None:
    """Refuse a tensor with a NaN or an infinity.

    Raises:
        ConversionError: it has one; `name` is what it is called.
    """
    if not values.numel():
        return
    # One pass, and no mask of the tensor's size; a NaN is both the least and the greatest.
    least, greatest = torch.aminmax(values)
    if not (least.isfinite() and greatest.isfinite()):
        bad = "NaN" if greatest.isnan() else "an infinity"
        raise ConversionError(f"{name} holds {bad}; nothing was written")
