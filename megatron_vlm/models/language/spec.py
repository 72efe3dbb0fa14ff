"""The decoder's layers as megatron-core specs: dense first, then experts."""

from __future__ import annotations

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_vlm.config.model_schema import LanguageConfig
from megatron_vlm.models.language.latent_attention import (
    LatentAttention,
    LatentAttentionSubmodules,
)
from megatron_vlm.models.language.layer import DecoderLayer, PackedMoELayer
from megatron_vlm.models.language.router import SigmoidRouter


def decoder_spec(
    language: LanguageConfig, provider: BackendSpecProvider, layers: range
) -> TransformerBlockSubmodules:
    """Specs of the layers `layers` (numbers from 0) of one model chunk."""
    kinds = language.moe_layer_freq
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(language, provider, has_experts=bool(kinds[i])) for i in layers],
        layer_norm=provider.layer_norm(rms_norm=True),
    )


def layer_spec(
    language: LanguageConfig, provider: BackendSpecProvider, has_experts: bool
) -> ModuleSpec:
    """Spec of one layer."""
    norm = provider.layer_norm(rms_norm=True)
    head_norm = provider.layer_norm(rms_norm=True, for_qk=True)
    qk_norm: Any = head_norm if language.qk_layernorm else IdentityOp
    linears = MLPSubmodules(
        linear_fc1=provider.column_parallel_linear(), linear_fc2=provider.row_parallel_linear()
    )
    if language.multi_latent_attention:
        attention = ModuleSpec(
            module=LatentAttention,
            params={"attn_mask_type": AttnMaskType.causal, "language": language},
            submodules=LatentAttentionSubmodules(
                column_parallel_linear=provider.column_parallel_linear(),
                row_parallel_linear=provider.row_parallel_linear(),
                norm=norm,
                core_attention=provider.core_attention(),
            ),
        )
    else:
        attention = ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=provider.column_parallel_linear(),
                core_attention=provider.core_attention(),
                linear_proj=provider.row_parallel_linear(),
                q_layernorm=qk_norm,
                k_layernorm=qk_norm,
            ),
        )
    if has_experts:
        experts, _ = provider.grouped_mlp_modules(True, False)
        mlp = ModuleSpec(
            module=PackedMoELayer,
            submodules=MoESubmodules(
                router=SigmoidRouter,
                experts=ModuleSpec(module=experts),
                shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=linears),
            ),
        )
    else:
        mlp = ModuleSpec(module=MLP, submodules=linears)
    return ModuleSpec(
        module=DecoderLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
