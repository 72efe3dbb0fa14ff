"""Forward FLOPs of the decoder, two per multiply-add, from its configuration alone."""

from __future__ import annotations

from megatron_vlm.config.model_schema import LanguageConfig


def linear_flops_per_token(language: LanguageConfig) -> float:
    """All matrix products of one token, output layer included, attention scores not.

    Multi-token prediction is counted: its projection, its layer, and the output layer once more.
    """
    hidden, kinds = language.hidden_size, language.moe_layer_freq
    total = float(hidden * language.vocab_size)
    if language.mtp_num_layers:
        kinds = kinds + kinds[-1:] * language.mtp_num_layers
        total += language.mtp_num_layers * hidden * (language.vocab_size + 2 * hidden)
    attention = _attention_weights(language)
    for has_experts in kinds:
        if has_experts:
            width = language.moe_router_topk * (language.moe_ffn_hidden_size or 0)
            width += language.moe_shared_expert_intermediate_size or 0
            mlp = 3 * hidden * width + hidden * (language.num_moe_experts or 0)
        else:
            mlp = 3 * hidden * language.ffn_hidden_size
        total += attention + mlp
    return 2 * total


def attention_flops(language: LanguageConfig, squared_lengths: float) -> float:
    """Causal scores and weighted values; `squared_lengths` is the sum of squared sample lengths."""
    channels = 2 * language.head_dim
    if language.multi_latent_attention:
        channels = language.qk_head_dim + language.qk_pos_emb_head_dim + language.v_head_dim
    layers = language.num_layers + (language.mtp_num_layers or 0)
    per_pair = 2 * language.num_attention_heads * channels
    return layers * per_pair * squared_lengths / 2


def _attention_weights(language: LanguageConfig) -> int:
    hidden, heads = language.hidden_size, language.num_attention_heads
    if not language.multi_latent_attention:
        queries, keys = heads * language.head_dim, 2 * language.query_groups * language.head_dim
        return hidden * (queries + keys) + queries * hidden
    compressed, rotary = language.kv_lora_rank or 0, language.qk_pos_emb_head_dim
    queries = heads * (language.qk_head_dim + rotary)
    weights = hidden * (compressed + rotary) + heads * language.v_head_dim * hidden
    weights += compressed * heads * (language.qk_head_dim + language.v_head_dim)
    if language.q_lora_rank is None:
        return weights + hidden * queries
    return weights + hidden * language.q_lora_rank + language.q_lora_rank * queries
