"""From our configuration to megatron-core's TransformerConfig."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from megatron_vlm.config.model_schema import LanguageConfig
from megatron_vlm.config.schema import RunConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.language.provider import (
    transformer_engine_serves,
    transformer_engine_usable,
)
from megatron_vlm.models.language.rotary import rotary_factor
from megatron_vlm.topology.layout import Layout

_FP8_RECIPES = {"fp8_delayed": "delayed", "fp8_current": "tensorwise", "fp8_blockwise": "blockwise"}


def parameter_dtype(precision: str) -> torch.dtype:
    """The dtype that weights are computed with."""
    return {"fp64": torch.float64, "fp32": torch.float32}.get(precision, torch.bfloat16)


def engine_config(config: RunConfig, layout: Layout) -> TransformerConfig:
    """Everything the engine wants to know about the decoder and its schedule.

    Raises:
        ConfigError: the precision or the recompute needs Transformer Engine and there is none.
    """
    language, precision = config.model.language, config.training.precision
    dtype = parameter_dtype(precision)
    if precision in _FP8_RECIPES and not transformer_engine_usable():
        raise ConfigError(
            f"training.precision {precision} needs Transformer Engine on a GPU; use bf16, or "
            "install megatron-vlm[gpu] on a machine with one"
        )
    options: dict[str, Any] = {
        "num_layers": language.num_layers,
        "hidden_size": language.hidden_size,
        "num_attention_heads": language.num_attention_heads,
        "num_query_groups": language.query_groups,
        # Of multi-latent attention only the rotary table reads it.
        "kv_channels": language.rotary_channels,
        "add_qkv_bias": language.add_qkv_bias,
        "rotary_interleaved": language.rotary_interleaved,
        "ffn_hidden_size": language.ffn_hidden_size,
        "layernorm_epsilon": language.layernorm_epsilon,
        # The engine would sum gradients of whatever is called q_layernorm over tensor ranks: right
        # for norms of heads, wrong for that of compressed queries, which all ranks hold alike.
        "qk_layernorm": language.qk_layernorm and not language.multi_latent_attention,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": language.init_method_std,
        # Weights come from (seed, name) in models/initialize.py, alike in every layout.
        "perform_initialization": False,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        # Losses are scaled where they are computed, so gradients are plain sums.
        "calculate_per_token_loss": True,
        # Frees what was sent; gloo, unlike a CUDA stream, may still be sending it.
        "deallocate_pipeline_outputs": torch.cuda.is_available(),
        # Layers differ (dense, experts): one key a layer, whatever the stages.
        "hetereogenous_dist_checkpoint": True,
        **_parallel_options(config, layout),
        **_fusion_options(language, dtype),
    }
    if language.num_moe_experts is not None:
        options |= _expert_options(config)
    if precision in _FP8_RECIPES:
        options |= {"fp8": "hybrid", "fp8_recipe": _FP8_RECIPES[precision]}
    if config.recompute.language == "full":
        options |= {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    elif config.recompute.language == "selective":
        options |= {
            "recompute_granularity": "selective",
            "recompute_modules": _recompute_modules(config),
        }
    with warnings.catch_warnings():
        # About options of CUDA graphs that are not used here.
        warnings.simplefilter("ignore", UserWarning)
        built = TransformerConfig(**options)
    # The engine's own check wants bf16 for the combined schedule; its code does not, and proofs
    # of equality need float64.
    built.overlap_moe_expert_parallel_comm = config.parallel.overlap_moe_expert_parallel_comm
    scaling = language.rope_scaling
    if scaling is not None and scaling.type == "yarn":
        # Where the engine's attention looks for the factor on cosines and sines.
        built.yarn_rotary_scaling_factor = scaling.factor
        built.yarn_mscale = scaling.mscale
        built.yarn_mscale_all_dim = scaling.mscale_all_dim
    return built


def _recompute_modules(config: RunConfig) -> list[str]:
    modules: list[str] = list(config.recompute.language_modules)
    precision = config.training.precision
    if (
        "layernorm" in modules
        and torch.cuda.is_available()
        and not transformer_engine_serves(parameter_dtype(precision))
    ):
        # The engine asks Transformer Engine about fp8 there, whatever the precision.
        raise ConfigError(
            "recompute.language_modules holds layernorm, which on a GPU needs Transformer Engine "
            f"and half precision (training.precision is {precision}); remove it"
        )
    if "moe" in modules and precision in _FP8_RECIPES:
        raise ConfigError(
            f"recompute.language_modules holds moe, which training.precision {precision} does not "
            "know (the layer would be recomputed with other scales); remove it, or use bf16"
        )
    unknown = {"moe_act", "layernorm"} & set(modules)
    if unknown and precision == "fp8_delayed":
        raise ConfigError(
            f"recompute.language_modules holds {min(unknown)}, which training.precision "
            "fp8_delayed does not know (its scales come from earlier steps); remove it, or use "
            "fp8_current or fp8_blockwise"
        )
    if config.model.language.num_moe_experts is None and "moe_act" in modules:
        # Nothing to recompute in a dense model, but the engine would refuse the word.
        modules.remove("moe_act")
    return modules


def _parallel_options(config: RunConfig, layout: Layout) -> dict[str, Any]:
    uneven = config.parallel.pipeline_model_parallel_layout is not None
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "pipeline_model_parallel_layout": "|".join(layout.stages) if uneven else None,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "sequence_parallel": layout.sequence_parallel,
        "batch_p2p_comm": layout.batch_p2p_comm,
        # Interleaved stages overlap their sends with compute, which excludes batching them.
        "overlap_p2p_comm": layout.vpp is not None and not layout.batch_p2p_comm,
    }


def _expert_options(config: RunConfig) -> dict[str, Any]:
    language = config.model.language
    return {
        "num_moe_experts": language.num_moe_experts,
        "moe_ffn_hidden_size": language.moe_ffn_hidden_size,
        "moe_layer_freq": language.moe_layer_freq,
        "moe_router_topk": language.moe_router_topk,
        "moe_router_topk_scaling_factor": language.moe_router_topk_scaling_factor,
        "moe_router_score_function": "sigmoid",
        "moe_shared_expert_intermediate_size": language.moe_shared_expert_intermediate_size,
        "moe_router_num_groups": language.moe_router_num_groups,
        "moe_router_group_topk": language.moe_router_group_topk,
        "moe_token_dispatcher_type": language.moe_token_dispatcher_type,
        "moe_grouped_gemm": True,
        # Bias, balance loss and padding are our router's: the engine's versions stay off.
        "moe_router_enable_expert_bias": False,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


def _fusion_options(language: LanguageConfig, dtype: torch.dtype) -> dict[str, Any]:
    engine_layers = transformer_engine_serves(dtype)
    # The output layer is the engine's own also beside Transformer Engine, and it needs Apex's.
    apex_wgrad = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    return {
        "gradient_accumulation_fusion": torch.cuda.is_available() and apex_wgrad,
        # The fused one knows no factor on cosines and sines and no angle but the position's, and
        # multi-latent attention none.
        "apply_rope_fusion": engine_layers
        and rotary_factor(language) == 1
        and language.mrope_section is None
        and not language.multi_latent_attention,
        "moe_permute_fusion": engine_layers,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "persist_layer_norm": False,
    }
