"""RMS norm that may sit inside a sequence-parallel region, which the engine's local one may not."""

from __future__ import annotations

from typing import Any

import torch


class Norm(torch.nn.RMSNorm):
    """torch's RMSNorm whose weight tells the engine how to reduce its gradient.

    Under sequence parallelism each tensor-parallel rank sees a part of the tokens, so gradients
    are summed over those ranks; the engine does so for parameters marked `sequence_parallel`.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
