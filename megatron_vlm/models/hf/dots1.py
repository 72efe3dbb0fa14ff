"""dots.llm1: `Dots1ForCausalLM` of transformers (the report: arXiv 2506.05767)."""

from __future__ import annotations

from typing import Any

from megatron_vlm.config.model_schema import LanguageConfig
from megatron_vlm.models.hf.fields import (
    Fields,
    Traits,
    read_attention,
    read_experts,
    read_full_attention,
    read_rope,
    read_sizes,
    write_experts,
    write_rope,
    write_sizes,
)
from megatron_vlm.models.hf.names import NameMap, Row, experts, grouped, layers, same, stacked

ARCHITECTURE = "Dots1ForCausalLM"

NAMES = NameMap(
    (
        Row("language.embedding.word_embeddings.weight", same, ("model.embed_tokens.weight",)),
        *layers(
            Row("input_layernorm.weight", same, ("input_layernorm.weight",)),
            Row(
                "self_attention.linear_qkv.weight",
                grouped,
                (
                    "self_attn.q_proj.weight",
                    "self_attn.k_proj.weight",
                    "self_attn.v_proj.weight",
                ),
            ),
            Row("self_attention.q_layernorm.weight", same, ("self_attn.q_norm.weight",)),
            Row("self_attention.k_layernorm.weight", same, ("self_attn.k_norm.weight",)),
            Row("self_attention.linear_proj.weight", same, ("self_attn.o_proj.weight",)),
            Row("pre_mlp_layernorm.weight", same, ("post_attention_layernorm.weight",)),
            Row(
                "mlp.linear_fc1.weight",
                stacked,
                ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
            ),
            Row("mlp.linear_fc2.weight", same, ("mlp.down_proj.weight",)),
            Row("mlp.router.weight", same, ("mlp.gate.weight",)),
            Row("mlp.router.expert_bias", same, ("mlp.gate.e_score_correction_bias",)),
            Row(
                "mlp.experts.linear_fc1",
                experts,
                (
                    "mlp.experts.{expert}.gate_proj.weight",
                    "mlp.experts.{expert}.up_proj.weight",
                ),
            ),
            Row("mlp.experts.linear_fc2", experts, ("mlp.experts.{expert}.down_proj.weight",)),
            Row(
                "mlp.shared_experts.linear_fc1.weight",
                stacked,
                ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
            ),
            Row(
                "mlp.shared_experts.linear_fc2.weight",
                same,
                ("mlp.shared_experts.down_proj.weight",),
            ),
        ),
        Row("language.decoder.final_layernorm.weight", same, ("model.norm.weight",)),
        Row("language.output_layer.weight", same, ("lm_head.weight",)),
    )
)


def read_config(fields: Fields) -> dict[str, Any]:
    """Our language fields from a config.json's.

    Raises:
        ConversionError: a field has a value that our model does not build.
    """
    sizes = read_sizes(fields)
    number = sizes["num_layers"]
    fields.expect("attention_bias", False)
    read_full_attention(fields, number, used=True, first_default=62)
    return {
        **sizes,
        **read_attention(fields),
        **read_rope(fields),
        **read_experts(fields, number, required=False),
        "qk_layernorm": True,
    }


def write_config(language: LanguageConfig) -> dict[str, Any]:
    """A config.json's fields from ours.

    Raises:
        ConversionError: the model has a trait that the class lacks.
    """
    traits = Traits(language, "model.language", ARCHITECTURE)
    traits.need("kv_lora_rank", None)
    traits.need("qk_layernorm", True)
    traits.need("add_qkv_bias", False)
    traits.need("rotary_interleaved", False)
    traits.need("mrope_section", None)
    traits.need("mtp_num_layers", None)
    return {
        **write_sizes(language),
        **write_attention(language),
        **write_rope(language),
        **write_experts(language, traits),
        "sliding_window": None,
        "max_window_layers": language.num_layers,
    }


def write_attention(language: LanguageConfig) -> dict[str, Any]:
    """Heads, without biases."""
    return {
        "num_attention_heads": language.num_attention_heads,
        "num_key_value_heads": language.query_groups,
        "head_dim": language.head_dim,
        "attention_bias": False,
        "attention_dropout": 0.0,
    }
