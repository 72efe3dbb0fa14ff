"""Forward FLOPs of the decoder, two per multiply-add, from its configuration alone."""

from __future__ import annotations

from megatron_vlm.config.schema import LanguageConfig


def linear_flops_per_token(language: LanguageConfig) -> float:
    """All matrix products of one token, output layer included, attention scores not."""
    hidden, head = language.hidden_size, language.head_dim
    queries, keys = language.num_attention_heads * head, 2 * language.query_groups * head
    attention = hidden * (queries + keys) + queries * hidden
    total = 0.0
    for has_experts in language.moe_layer_freq:
        if has_experts:
            width = language.moe_router_topk * (language.moe_ffn_hidden_size or 0)
            width += language.moe_shared_expert_intermediate_size or 0
            mlp = 3 * hidden * width + hidden * (language.num_moe_experts or 0)
        else:
            mlp = 3 * hidden * language.ffn_hidden_size
        total += attention + mlp
    return 2 * (total + hidden * language.vocab_size)


def attention_flops(language: LanguageConfig, squared_lengths: float) -> float:
    """Causal scores and weighted values; `squared_lengths` is the sum of squared sample lengths."""
    per_pair = 2 * 2 * language.num_attention_heads * language.head_dim
    return language.num_layers * per_pair * squared_lengths / 2


def active_parameters(language: LanguageConfig) -> int:
    """Parameters that one token passes through, embedding included."""
    hidden, head = language.hidden_size, language.head_dim
    norms = (2 * hidden + (2 * head if language.qk_layernorm else 0)) * language.num_layers + hidden
    tied = language.share_embeddings_and_output_weights
    embeddings = language.vocab_size * hidden * (1 if tied else 2)
    linear = linear_flops_per_token(language) / 2 - hidden * language.vocab_size
    return int(linear) + norms + embeddings
