"""Numbers on their way: each is finite, and they pass in one thread."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_vlm.errors import ConversionError


def check_finite(values: torch.Tensor, name: str, advice: str) -> None:
    """Refuse a tensor with a NaN or an infinity.

    Raises:
        ConversionError: it has one; `name` is what it is called, `advice` what to do.
    """
    if not values.numel():
        return
    # One pass, and no mask of the tensor's size; a NaN is both the least and the greatest.
    least, greatest = (bound.item() for bound in torch.aminmax(values))
    if not (math.isfinite(least) and math.isfinite(greatest)):
        bad = "NaN" if math.isnan(greatest) else "an infinity"
        raise ConversionError(f"{name} holds {bad}; {advice}; nothing was written")


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in this thread alone.

    A few megabytes at a time are not worth waiting for others: on a busy machine that takes longer
    than all the work.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
