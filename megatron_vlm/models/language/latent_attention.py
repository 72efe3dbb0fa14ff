"""Multi-latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), right under every TP.

Ours rather than the engine's, whose torch version cuts the compressing projections by columns: the
channels with positions, which all heads share, then miss the gradients of other ranks' heads, and
without sequence parallelism the norm of the compressed queries counts its gradient twice. Here
what compresses is held whole by every tensor-parallel rank, and what expands is cut by heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module

from megatron_vlm.config.model_schema import LanguageConfig
from megatron_vlm.models.language.packing import PackedRows
from megatron_vlm.models.language.replicated import ReplicatedLinear
from megatron_vlm.models.language.rotary import latent_score_scale, rotary_factor, rotate


@dataclass
class LatentAttentionSubmodules:
    """What the layer provider gives."""

    column_parallel_linear: type
    row_parallel_linear: type
    norm: type
    core_attention: type


class LatentAttention(MegatronModule):
    """Attention whose keys and values are expanded from one narrow vector a token.

    Channels of a head are laid out as in the published weights: of a query first those without
    positions, then those with; of the expanded pair first the key, then the value; of what is
    compressed first keys and values, then the channels with positions.
    """

    def __init__(
        self,
        config: Any,
        submodules: LatentAttentionSubmodules,
        layer_number: int,
        language: LanguageConfig,
        attn_mask_type: Any = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        self.language, self.tp_group = language, pg_collection.tp
        heads, hidden = language.num_attention_heads, language.hidden_size
        query = language.qk_head_dim + language.qk_pos_emb_head_dim
        compressed = language.kv_lora_rank
        assert compressed is not None
        epsilon = language.layernorm_epsilon

        def expand(width: int, channels: int) -> Any:
            return build_module(
                submodules.column_parallel_linear,
                width,
                heads * channels,
                config=config,
                init_method=config.init_method,
                gather_output=False,
                bias=False,
                skip_bias_add=False,
                is_expert=False,
                tp_group=self.tp_group,
            )

        if language.q_lora_rank is None:
            self.linear_q_proj = expand(hidden, query)
        else:
            self.linear_q_down_proj = ReplicatedLinear(hidden, language.q_lora_rank, config)
            self.q_layernorm = build_module(
                submodules.norm, config=config, hidden_size=language.q_lora_rank, eps=epsilon
            )
            self.linear_q_up_proj = expand(language.q_lora_rank, query)
        self.linear_kv_down_proj = ReplicatedLinear(
            hidden, compressed + language.qk_pos_emb_head_dim, config
        )
        self.kv_layernorm = build_module(
            submodules.norm, config=config, hidden_size=compressed, eps=epsilon
        )
        self.linear_kv_up_proj = expand(compressed, language.qk_head_dim + language.v_head_dim)
        self.core_attention = build_module(
            submodules.core_attention,
            config=config,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type="self",
            softmax_scale=latent_score_scale(language),
            k_channels=query,
            v_channels=language.v_head_dim,
            cp_comm_type=cp_comm_type,
            pg_collection=pg_collection,
        )
        self.linear_proj = build_module(
            submodules.row_parallel_linear,
            heads * language.v_head_dim,
            hidden,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_group=self.tp_group,
        )
        self.recompute_core = (
            config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotary_pos_emb: Any = None,
        packed_seq_params: PackedRows | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend within each segment.

        Args:
            hidden_states: `[tokens / cp (/ tp under sequence parallelism), 1, hidden]`.
            attention_mask: unused; segments say who sees whom.
            rotary_pos_emb: angles, `[positions or tokens, 1, 1, channels]`.
            packed_seq_params: segments of this context-parallel rank's tokens, and the angle of
                each.

        Returns:
            The shape of `hidden_states`, and no bias.
        """
        rows = packed_seq_params
        if rows is None or rows.position_ids is None:
            raise TypeError("multi-latent attention runs over PackedRows with position_ids only")
        query, key, value = self._expand(hidden_states, self._angles(rotary_pos_emb, rows))

        def attend(*qkv: torch.Tensor) -> torch.Tensor:
            return self.core_attention(*qkv, attention_mask=None, packed_seq_params=rows)

        if self.recompute_core and self.training:
            attended = tensor_parallel.checkpoint(attend, False, query, key, value)
        else:
            attended = attend(query, key, value)
        return self.linear_proj(attended.reshape(query.size(0), 1, -1))

    def backward_dw(self) -> None:
        """Weight gradients that were put off, of those maps that can: the engine asks for it."""
        for module in self.children():
            if hasattr(module, "backward_dw"):
                module.backward_dw()

    def _angles(self, rotary_pos_emb: Any, rows: PackedRows) -> torch.Tensor:
        table = rotary_pos_emb[0] if isinstance(rotary_pos_emb, tuple) else rotary_pos_emb
        # The engine's table holds every angle twice, side by side where pairs are neighbours.
        pairs = table.flatten(1)
        interleaved = self.language.rotary_interleaved
        pairs = pairs[:, ::2] if interleaved else pairs[:, : pairs.size(1) // 2]
        ids = rows.position_ids if rows.rotary_ids is None else rows.rotary_ids
        return pairs.index_select(0, ids)

    def _expand(
        self, hidden: torch.Tensor, angles: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value `[tokens / cp, heads / tp, channels]` of all tokens of a region."""
        language, factor = self.language, rotary_factor(self.language)
        plain, rotary = language.qk_head_dim, language.qk_pos_emb_head_dim
        if language.q_lora_rank is None:
            expanded, _ = self.linear_q_proj(hidden)
        else:
            expanded, _ = self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(hidden)))
        query = expanded.squeeze(1).unflatten(-1, (-1, plain + rotary))
        q_plain, q_rotary = query.split([plain, rotary], dim=-1)
        compressed, shared = self.linear_kv_down_proj(hidden).split(
            [self.linear_kv_down_proj.out_features - rotary, rotary], dim=-1
        )
        expanded, _ = self.linear_kv_up_proj(self.kv_layernorm(compressed))
        pair = expanded.squeeze(1).unflatten(-1, (-1, plain + language.v_head_dim))
        k_plain, value = pair.split([plain, language.v_head_dim], dim=-1)
        # Every head of every tensor rank reads these channels: their gradients are summed.
        if self.config.sequence_parallel:
            shared = gather_from_sequence_parallel_region(
                shared.contiguous(), tensor_parallel_output_grad=True, group=self.tp_group
            )
        else:
            shared = copy_to_tensor_model_parallel_region(shared, group=self.tp_group)
        interleaved = language.rotary_interleaved
        q_rotary = rotate(q_rotary, angles, factor, interleaved)
        k_rotary = rotate(shared, angles, factor, interleaved).expand(-1, k_plain.size(1), -1)
        return (
            torch.cat([q_plain, q_rotary], dim=-1),
            torch.cat([k_plain, k_rotary], dim=-1),
            value.contiguous(),
        )
