"""A linear map that every tensor-parallel rank holds whole."""

from __future__ import annotations

from typing import Any

import torch


class ReplicatedLinear(torch.nn.Linear):
    """Applied to this rank's tokens; its weight's gradient is right on every tensor rank.

    Under sequence parallelism each rank sees a part of the tokens and the engine sums the
    gradients of weights marked `sequence_parallel`. Without it every rank sees all tokens, and
    whatever follows must hand back whole gradients: a column-parallel map does.
    """

    def __init__(self, in_features: int, out_features: int, config: Any) -> None:
        super().__init__(in_features, out_features, bias=False, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def reset_parameters(self) -> None:
        """Nothing: weights come from (seed, name), see models/initialize.py."""
