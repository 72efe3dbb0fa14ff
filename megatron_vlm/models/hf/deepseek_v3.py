"""DeepSeek-V3: `DeepseekV3ForCausalLM` of transformers (the report: arXiv 2412.19437)."""

from __future__ import annotations

from typing import Any

from megatron_vlm.config.model_schema import LanguageConfig, ModelConfig
from megatron_vlm.models.hf.fields import (
    Fields,
    Traits,
    read_experts,
    read_rope,
    read_sizes,
    write_experts,
    write_rope,
    write_sizes,
)
from megatron_vlm.models.hf.names import Copy, NameMap, Row, experts, layers, same, stacked

ARCHITECTURE = "DeepseekV3ForCausalLM"

LATENT_EPSILON = 1e-6
"""Epsilon of the norms of what is compressed: fixed in the class, while ours have the model's."""


def _predicts(model: ModelConfig) -> bool:
    return bool(model.language.mtp_num_layers)


NAMES = NameMap(
    (
        Row("language.embedding.word_embeddings.weight", same, ("model.embed_tokens.weight",)),
        *layers(
            Row("input_layernorm.weight", same, ("input_layernorm.weight",)),
            Row("self_attention.linear_q_proj.weight", same, ("self_attn.q_proj.weight",)),
            Row("self_attention.linear_q_down_proj.weight", same, ("self_attn.q_a_proj.weight",)),
            Row("self_attention.q_layernorm.weight", same, ("self_attn.q_a_layernorm.weight",)),
            Row("self_attention.linear_q_up_proj.weight", same, ("self_attn.q_b_proj.weight",)),
            Row(
                "self_attention.linear_kv_down_proj.weight",
                same,
                ("self_attn.kv_a_proj_with_mqa.weight",),
            ),
            Row("self_attention.kv_layernorm.weight", same, ("self_attn.kv_a_layernorm.weight",)),
            Row("self_attention.linear_kv_up_proj.weight", same, ("self_attn.kv_b_proj.weight",)),
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
        Row("language.mtp.layers.{mtp}.enorm.weight", same, ("model.layers.{after}.enorm.weight",)),
        Row("language.mtp.layers.{mtp}.hnorm.weight", same, ("model.layers.{after}.hnorm.weight",)),
        Row(
            "language.mtp.layers.{mtp}.eh_proj.weight",
            same,
            ("model.layers.{after}.eh_proj.weight",),
        ),
        Row(
            "language.mtp.layers.{mtp}.final_layernorm.weight",
            same,
            ("model.layers.{after}.shared_head.norm.weight",),
        ),
    ),
    # Each prediction layer of a release carries the tables that it shares with the model.
    (
        Copy(
            "model.layers.{after}.embed_tokens.weight",
            of="model.embed_tokens.weight",
            written=True,
            applies=_predicts,
        ),
        Copy(
            "model.layers.{after}.shared_head.head.weight",
            of="lm_head.weight",
            written=True,
            applies=_predicts,
        ),
    ),
)


def read_config(fields: Fields) -> dict[str, Any]:
    """Our language fields from a config.json's.

    Raises:
        ConversionError: a field has a value that our model does not build.
    """
    found = read_traits(fields)
    if found["layernorm_epsilon"] != LATENT_EPSILON:
        raise fields.refusal(
            "rms_norm_eps",
            found["layernorm_epsilon"],
            f"{LATENT_EPSILON}: {ARCHITECTURE} norms what it compresses with that, and ours has "
            "one for all norms",
        )
    return found


def read_traits(fields: Fields) -> dict[str, Any]:
    """As `read_config`, whatever the epsilon: not every server fixes that of the compressed."""
    sizes = read_sizes(fields)
    number = sizes["num_layers"]
    heads = fields.integer("num_attention_heads")
    fields.expect("num_key_value_heads", heads)
    fields.expect("attention_bias", False)
    fields.expect("attention_dropout", 0.0, 0)
    plain, rotated = fields.integer("qk_nope_head_dim"), fields.integer("qk_rope_head_dim")
    # transformers derives these two and writes them out.
    fields.expect("head_dim", rotated)
    fields.expect("qk_head_dim", plain + rotated)
    return {
        **sizes,
        "num_attention_heads": heads,
        "kv_lora_rank": fields.integer("kv_lora_rank"),
        "q_lora_rank": fields.integer("q_lora_rank", None),
        "qk_head_dim": plain,
        "qk_pos_emb_head_dim": rotated,
        "v_head_dim": fields.integer("v_head_dim"),
        "rotary_interleaved": fields.flag("rope_interleave", True),
        **read_rope(fields),
        **read_experts(fields, number, required=True),
        "mtp_num_layers": _read_prediction(fields),
    }


def _read_prediction(fields: Fields) -> int | None:
    # Written under the older name, but a configuration may have been made by hand.
    newer = fields.integer("num_mtp_layers", None)
    number = fields.integer("num_nextn_predict_layers", newer)
    if newer is not None and newer != number:
        raise fields.refusal("num_mtp_layers", newer, f"num_nextn_predict_layers's {number}")
    if (number or 0) > 1:
        raise fields.refusal("num_nextn_predict_layers", number, "0 or 1")
    return number or None


def write_config(language: LanguageConfig) -> dict[str, Any]:
    """A config.json's fields from ours.

    Raises:
        ConversionError: the model has a trait that the class lacks.
    """
    Traits(language, "model.language", ARCHITECTURE).need("layernorm_epsilon", LATENT_EPSILON)
    return write_traits(language, ARCHITECTURE)


def write_traits(language: LanguageConfig, architecture: str) -> dict[str, Any]:
    """As `write_config`, whatever the epsilon."""
    traits = Traits(language, "model.language", architecture)
    if not language.multi_latent_attention:
        raise traits.refusal("kv_lora_rank", "compressed keys and values")
    traits.need("mrope_section", None)
    return {
        **write_sizes(language),
        "num_attention_heads": language.num_attention_heads,
        "num_key_value_heads": language.num_attention_heads,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "kv_lora_rank": language.kv_lora_rank,
        "q_lora_rank": language.q_lora_rank,
        "qk_nope_head_dim": language.qk_head_dim,
        "qk_rope_head_dim": language.qk_pos_emb_head_dim,
        "v_head_dim": language.v_head_dim,
        "rope_interleave": language.rotary_interleaved,
        **write_rope(language),
        **_routing(language, traits),
        "num_nextn_predict_layers": language.mtp_num_layers or 0,
    }


def _routing(language: LanguageConfig, traits: Traits) -> dict[str, Any]:
    # The class's own defaults are DeepSeek-V3's, so a dense model must say all of it too.
    dense = {
        "n_routed_experts": None,
        "moe_intermediate_size": None,
        "n_shared_experts": None,
        "num_experts_per_tok": None,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "scoring_func": "sigmoid",
    }
    return {**dense, **write_experts(language, traits)}
