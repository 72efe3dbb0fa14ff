"""Routed experts as two grouped products, sharded by expert and by width without factories.

The engine's own GroupedMLP needs a package that is not kept any more and leaves in later
releases. Here the gate and up projections are one parameter `[experts, 2, width, hidden]`: a
plain view gives the fused matrix for the product, and each axis is cut by exactly one kind of
parallelism (experts by EP, width by expert TP), so a checkpoint needs no special merging.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import checkpoint
from megatron.core.transformer.module import MegatronModule

from megatron_vlm.ops.grouped_gemm import grouped_gemm
from megatron_vlm.ops.swiglu import weighted_swiglu


class GroupedExperts(MegatronModule):
    """SwiGLU experts of this rank, applied to tokens sorted by expert."""

    def __init__(self, num_local_experts: int, config: Any, pg_collection: Any, **_: Any) -> None:
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        self.ep_group = pg_collection.ep
        self.etp_group = pg_collection.expt_tp
        self.edp_group = pg_collection.expt_dp
        width = config.moe_ffn_hidden_size // self.etp_group.size()
        hidden = config.hidden_size
        self.linear_fc1 = torch.nn.Parameter(
            torch.empty(num_local_experts, 2, width, hidden, dtype=config.params_dtype)
        )
        self.linear_fc2 = torch.nn.Parameter(
            torch.empty(num_local_experts, hidden, width, dtype=config.params_dtype)
        )
        for weight, axis in ((self.linear_fc1, 2), (self.linear_fc2, 2)):
            # Otherwise the engine takes experts of tensor ranks above 0 for copies and leaves
            # them out of the gradient norm.
            set_tensor_model_parallel_attributes(weight, True, axis, 1)
            weight.allreduce = config.expert_model_parallel_size == 1  # type: ignore[attr-defined]
        # The combined 1F1B schedule empties what came in once the experts are through. With several
        # experts tokens are sorted into a copy first; one alone would keep the emptied tensor.
        self.keeps_input = (
            not config.overlap_moe_expert_parallel_comm
            or num_local_experts > 1
            or self.etp_group.size() > 1
        )
        self.recompute_activation = (
            config.recompute_granularity == "selective" and "moe_act" in config.recompute_modules
        )

    def forward(
        self, tokens: torch.Tensor, tokens_per_expert: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Apply each expert to its tokens.

        Args:
            tokens: `[total, hidden]`, sorted by local expert.
            tokens_per_expert: `[local experts]`.
            probs: `[total]` weights of the chosen experts.

        Returns:
            `[total, hidden]`, already weighted, and no bias.
        """
        if not self.keeps_input and self.training:
            tokens = tokens.clone()
        gate_up = grouped_gemm(tokens, self.linear_fc1.flatten(1, 2), tokens_per_expert)
        if self.recompute_activation and self.training:
            inner = checkpoint(weighted_swiglu, False, gate_up, probs)
        else:
            inner = weighted_swiglu(gate_up, probs)
        return grouped_gemm(inner, self.linear_fc2, tokens_per_expert), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, ShardedTensor]:
        """Global shapes `[experts, 2, width, hidden]` and `[experts, hidden, width]`."""
        prepended = len(sharded_offsets)
        expert_axis = (prepended, self.ep_group.rank(), self.ep_group.size())
        width_axis = (prepended + 2, self.etp_group.rank(), self.etp_group.size())
        return {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}{name}",
                weight,
                *sharded_offsets,
                expert_axis,
                width_axis,
                replica_id=(0, 0, self.edp_group.rank()),
                prepend_axis_num=prepended,
            )
            for name, weight in (("linear_fc1", self.linear_fc1), ("linear_fc2", self.linear_fc2))
        }
