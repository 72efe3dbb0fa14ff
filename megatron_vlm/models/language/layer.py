"""The decoder layer: the engine's, told about packed rows."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_vlm.models.language.packing import PackedRows


class PackedMoELayer(MoELayer):
    """A MoE layer whose whole-layer recompute remembers which micro-batch it belongs to."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        # The engine would recompute it with whatever micro-batch the router saw last.
        self.recompute_whole: bool = self.moe_layer_recompute  # type: ignore[has-type]
        self.moe_layer_recompute = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        intermediate_tensors: Any = None,
        padding_mask: torch.Tensor | None = None,
    ) -> Any:
        """Route, dispatch, compute, combine."""
        if not (self.recompute_whole and self.training):
            return super().forward(hidden_states, intermediate_tensors)
        rows = self.router.rows

        def run(hidden: torch.Tensor) -> torch.Tensor:
            self.router.rows = rows
            return MoELayer.forward(self, hidden)[0]

        return tensor_parallel.checkpoint(run, False, hidden_states), None


class DecoderLayer(TransformerLayer):
    """A transformer layer that hands the rows of its micro-batch to its router.

    Attention is where both the plain schedules and the combined 1F1B schedule pass the packed
    sequence parameters, in the same node as the routing, so that is where they are taken.
    """

    def _forward_attention(self, *args: Any, **kwargs: Any) -> Any:
        rows = kwargs.get("packed_seq_params")
        if isinstance(self.mlp, MoELayer):
            self.mlp.router.rows = rows if isinstance(rows, PackedRows) else None
        return super()._forward_attention(*args, **kwargs)
