"""Every tensor of a model by its name in our checkpoints, from the configuration alone.

The same shapes as `models/language` and `models/vision` build, written down a second time on
purpose: a conversion is planned, and proven whole, before anything is read, built or allocated.
The tests hold this table against models that are really built.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_vlm.config.model_schema import (
    AdapterConfig,
    LanguageConfig,
    ModelConfig,
    VisionConfig,
)

Shape = tuple[int, ...]

EXPERT_BIAS = "mlp.router.expert_bias"
"""End of the names of what stays in float32 whatever the weights are."""


def model_tensors(model: ModelConfig) -> dict[str, Shape]:
    """Names and global shapes of everything a checkpoint of `model` holds besides its optimizer.

    In an order in which a reader may want them: decoder, bottom up, then encoder.
    """
    tensors = {f"language.{name}": shape for name, shape in _language(model.language)}
    if model.vision is not None:
        width = model.language.hidden_size
        tensors |= {f"vision.trunk.{name}": shape for name, shape in _trunk(model.vision)}
        parts = _adapter(model.adapter, model.vision, width)
        tensors |= {f"vision.adapter.{name}": shape for name, shape in parts}
    return tensors


def _language(language: LanguageConfig) -> Iterator[tuple[str, Shape]]:
    vocab, hidden = language.vocab_size, language.hidden_size
    yield "embedding.word_embeddings.weight", (vocab, hidden)
    for number, has_experts in enumerate(language.moe_layer_freq):
        for name, shape in _layer(language, bool(has_experts)):
            yield f"decoder.layers.{number}.{name}", shape
    yield "decoder.final_layernorm.weight", (hidden,)
    if not language.share_embeddings_and_output_weights:
        yield "output_layer.weight", (vocab, hidden)
    for number in range(language.mtp_num_layers or 0):
        prefix = f"mtp.layers.{number}"
        for norm in ("enorm", "hnorm"):
            yield f"{prefix}.{norm}.weight", (hidden,)
        yield f"{prefix}.eh_proj.weight", (hidden, 2 * hidden)
        # The kind of the last layer: experts, where the model has any.
        for name, shape in _layer(language, bool(language.moe_layer_freq[-1])):
            yield f"{prefix}.transformer_layer.{name}", shape
        yield f"{prefix}.final_layernorm.weight", (hidden,)


def _layer(language: LanguageConfig, has_experts: bool) -> Iterator[tuple[str, Shape]]:
    hidden = language.hidden_size
    yield "input_layernorm.weight", (hidden,)
    attention = _latent_attention if language.multi_latent_attention else _attention
    for name, shape in attention(language):
        yield f"self_attention.{name}", shape
    yield "pre_mlp_layernorm.weight", (hidden,)
    if not has_experts:
        yield from _feed_forward("mlp", language.ffn_hidden_size, hidden)
        return
    experts, width = language.num_moe_experts, language.moe_ffn_hidden_size
    assert experts is not None and width is not None
    yield "mlp.router.weight", (experts, hidden)
    yield EXPERT_BIAS, (experts,)
    yield "mlp.experts.linear_fc1", (experts, 2, width, hidden)
    yield "mlp.experts.linear_fc2", (experts, hidden, width)
    shared = language.moe_shared_expert_intermediate_size
    if shared is not None:
        yield from _feed_forward("mlp.shared_experts", shared, hidden)


def _attention(language: LanguageConfig) -> Iterator[tuple[str, Shape]]:
    hidden, head = language.hidden_size, language.head_dim
    rows = (language.num_attention_heads + 2 * language.query_groups) * head
    yield "linear_qkv.weight", (rows, hidden)
    if language.add_qkv_bias:
        yield "linear_qkv.bias", (rows,)
    if language.qk_layernorm:
        yield "q_layernorm.weight", (head,)
        yield "k_layernorm.weight", (head,)
    yield "linear_proj.weight", (hidden, language.num_attention_heads * head)


def _latent_attention(language: LanguageConfig) -> Iterator[tuple[str, Shape]]:
    hidden, heads = language.hidden_size, language.num_attention_heads
    rank, queries = language.kv_lora_rank, language.q_lora_rank
    assert rank is not None
    positions = language.qk_pos_emb_head_dim
    query_rows = heads * (language.qk_head_dim + positions)
    if queries is None:
        yield "linear_q_proj.weight", (query_rows, hidden)
    else:
        yield "linear_q_down_proj.weight", (queries, hidden)
        yield "q_layernorm.weight", (queries,)
        yield "linear_q_up_proj.weight", (query_rows, queries)
    yield "linear_kv_down_proj.weight", (rank + positions, hidden)
    yield "kv_layernorm.weight", (rank,)
    key_value_rows = heads * (language.qk_head_dim + language.v_head_dim)
    yield "linear_kv_up_proj.weight", (key_value_rows, rank)
    yield "linear_proj.weight", (hidden, heads * language.v_head_dim)


def _feed_forward(name: str, width: int, hidden: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.linear_fc1.weight", (2 * width, hidden)
    yield f"{name}.linear_fc2.weight", (hidden, width)


def _trunk(vision: VisionConfig) -> Iterator[tuple[str, Shape]]:
    hidden, inner = vision.hidden_size, vision.ffn_hidden_size
    yield "patch_embed.proj.weight", (hidden, vision.in_channels * vision.patch_size**2)
    yield "patch_embed.proj.bias", (hidden,)
    yield "patch_embed.norm.weight", (hidden,)
    for number in range(vision.num_layers):
        prefix = f"blocks.{number}"
        yield f"{prefix}.norm1.weight", (hidden,)
        yield f"{prefix}.qkv.weight", (3 * hidden, hidden)
        if vision.qk_layernorm:
            for norm in ("q_norm", "k_norm"):
                yield f"{prefix}.{norm}.weight", (hidden // vision.num_attention_heads,)
        yield f"{prefix}.proj.weight", (hidden, hidden)
        yield f"{prefix}.norm2.weight", (hidden,)
        yield f"{prefix}.fc1.weight", (inner, hidden)
        if vision.gated_linear_unit:
            yield f"{prefix}.fc3.weight", (inner, hidden)
        yield f"{prefix}.fc2.weight", (hidden, inner)
    yield "post_trunk_norm.weight", (hidden,)


def _adapter(
    adapter: AdapterConfig, vision: VisionConfig, width: int
) -> Iterator[tuple[str, Shape]]:
    merged, inner = adapter.widths(vision)
    yield "norm.weight", (vision.hidden_size,)
    yield "norm.bias", (vision.hidden_size,)
    yield "fc1.weight", (inner, merged)
    yield "fc1.bias", (inner,)
    yield "fc2.weight", (width, inner)
    yield "fc2.bias", (width,)
