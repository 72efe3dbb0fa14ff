"""Core attention on plain torch: packed segments, and context parallelism over their zig-zag."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule

from megatron_vlm.models.language.packing import ContextParallelRows, PackedRows
from megatron_vlm.ops.attention import packed_attention, packed_attention_with_mask_lengths


class PackedCoreAttention(MegatronModule):
    """Causal attention isolated per segment of a packed micro-batch.

    Takes query, key and value as `[tokens, heads, channels]` (the engine's `thd` form) and
    returns `[tokens, heads * channels]`. Under context parallelism each rank holds a zig-zag half
    of every segment's queries and gathers all keys and values.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale
        self.cp_group = (
            pg_collection.cp
            if pg_collection is not None
            else parallel_state.get_context_parallel_group()
        )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedRows | None = None,
    ) -> torch.Tensor:
        """Attend within each segment of `packed_seq_params`."""
        if not isinstance(packed_seq_params, PackedRows):
            raise TypeError("the torch layer provider attends over PackedRows only")
        rows = packed_seq_params
        context = rows.context
        if context is None:
            out = packed_attention(
                query,
                key,
                value,
                rows.cu_seqlens_q,
                causal=True,
                scale=self.scale,
                max_seqlen=rows.max_seqlen_q,
            )
        else:
            assert rows.position_ids is not None
            out = packed_attention_with_mask_lengths(
                query,
                self._gather(key, context),
                self._gather(value, context),
                context.cu_seqlens,
                rows.cu_seqlens_kv,
                rows.position_ids,
                context.key_positions,
                scale=self.scale,
            )
        return out.reshape(out.size(0), -1)

    def _gather(self, tensor: torch.Tensor, context: ContextParallelRows) -> torch.Tensor:
        # Backward is a reduce-scatter: every rank's queries contribute to every key's gradient.
        gathered = gather_from_sequence_parallel_region(
            tensor.contiguous(), tensor_parallel_output_grad=True, group=self.cp_group
        )
        return gathered.index_select(0, context.key_order)
