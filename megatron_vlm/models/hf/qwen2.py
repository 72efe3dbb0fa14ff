"""Qwen2, dense with biases of queries, keys and values: `Qwen2ForCausalLM` of transformers."""

from __future__ import annotations

from typing import Any

from megatron_vlm.config.model_schema import LanguageConfig, ModelConfig
from megatron_vlm.models.hf.fields import (
    Fields,
    Traits,
    read_attention,
    read_full_attention,
    read_rope,
    read_sizes,
    write_rope,
    write_sizes,
)
from megatron_vlm.models.hf.names import Copy, NameMap, Row, grouped, layers, same, stacked

ARCHITECTURE = "Qwen2ForCausalLM"


def _tied(model: ModelConfig) -> bool:
    return model.language.share_embeddings_and_output_weights


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
            Row(
                "self_attention.linear_qkv.bias",
                grouped,
                ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
            ),
            Row("self_attention.linear_proj.weight", same, ("self_attn.o_proj.weight",)),
            Row("pre_mlp_layernorm.weight", same, ("post_attention_layernorm.weight",)),
            Row(
                "mlp.linear_fc1.weight",
                stacked,
                ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
            ),
            Row("mlp.linear_fc2.weight", same, ("mlp.down_proj.weight",)),
        ),
        Row("language.decoder.final_layernorm.weight", same, ("model.norm.weight",)),
        Row("language.output_layer.weight", same, ("lm_head.weight",)),
    ),
    # Some releases write the tied head beside the embedding; transformers does not.
    (Copy("lm_head.weight", of="model.embed_tokens.weight", written=False, applies=_tied),),
)


def read_config(fields: Fields) -> dict[str, Any]:
    """Our language fields from a config.json's.

    Raises:
        ConversionError: a field has a value that our model does not build.
    """
    sizes = read_sizes(fields)
    used = fields.flag("use_sliding_window", False)
    read_full_attention(fields, sizes["num_layers"], used, first_default=28)
    # No field of the class, whose biases are always there; dots.ocr writes it nevertheless.
    fields.expect("attention_bias", True)
    return {
        **sizes,
        **read_attention(fields),
        **read_rope(fields),
        "num_moe_experts": None,
        "qk_layernorm": False,
        "add_qkv_bias": True,
    }


def write_config(language: LanguageConfig) -> dict[str, Any]:
    """A config.json's fields from ours.

    Raises:
        ConversionError: the model has a trait that the class lacks.
    """
    traits = Traits(language, "model.language", ARCHITECTURE)
    traits.need("kv_lora_rank", None)
    traits.need("num_moe_experts", None)
    traits.need("qk_layernorm", False)
    traits.need("add_qkv_bias", True)
    traits.need("rotary_interleaved", False)
    traits.need("mrope_section", None)
    traits.need("mtp_num_layers", None)
    return {
        **write_sizes(language),
        "num_attention_heads": language.num_attention_heads,
        "num_key_value_heads": language.query_groups,
        "head_dim": language.head_dim,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": language.num_layers,
        **write_rope(language),
    }
