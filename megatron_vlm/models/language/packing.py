"""What every layer needs to know about the packed rows of one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass(frozen=True)
class ContextParallelRows:
    """Where all ranks' gathered keys stand in their segments."""

    cu_seqlens: torch.Tensor
    """`[segments + 1]` bounds of the segments among this rank's tokens."""
    key_order: torch.Tensor
    """`[tokens]` where each key, in segment order, lies among all ranks' gathered keys."""
    key_positions: torch.Tensor
    """`[tokens]` position of each key inside its segment."""


@dataclass
class PackedRows(PackedSeqParams):
    """Segments and rows of a micro-batch, as this context-parallel rank sees them.

    The engine hands this object from the model to every layer's attention. Tensors over tokens
    have one entry for each token of this context-parallel rank, `[tokens / cp]`, in its order
    (for each segment the two chunks of the zig-zag).
    """

    row_ids: torch.Tensor | None = None
    """`[tokens / cp]` number of the packed row, -1 for padding."""
    row_tokens: torch.Tensor | None = None
    """`[rows]` real tokens of each row over all ranks."""
    position_ids: torch.Tensor | None = None
    """`[tokens / cp]` position of each token inside its segment."""
    rotary_positions: torch.Tensor | None = None
    """`[3, tokens]` time, height and width of every token of the micro-batch, those of other
    context-parallel ranks included; null where they rotate by `position_ids`."""
    rotary_ids: torch.Tensor | None = None
    """`[tokens / cp]` place of each token in those of the micro-batch; null with them."""
    next_tokens: torch.Tensor | None = None
    """`[1, tokens / cp]` the token after each in its segment; only where one more is predicted."""
    balance_weight: float = 0.0
    """Weight of one row's balance loss: its coefficient over the rows of the step."""
    context: ContextParallelRows | None = None
    """What context parallelism needs beside; null without it."""
