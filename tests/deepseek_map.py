"""The decoder beside `transformers.DeepseekV3ForCausalLM`: its configuration, weights and loss.

Written from the two modules' shapes alone, not from the exporter, like tests/dots1_map.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from megatron_vlm.config.model_schema import LanguageConfig
from tests.dots1_map import rename_mlp

if TYPE_CHECKING:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM


def deepseek_config(language: LanguageConfig, **options: Any) -> DeepseekV3Config:
    """The configuration of the same decoder, every field set."""
    from transformers import DeepseekV3Config

    width, shared = language.moe_ffn_hidden_size, language.moe_shared_expert_intermediate_size
    assert width and shared and shared % width == 0 and language.kv_lora_rank
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": language.rotary_base}
    scaling = language.rope_scaling
    if scaling is not None:
        told = (
            {"factor"} if scaling.type == "linear" else set(type(scaling).model_fields) - {"type"}
        )
        rope = {
            **scaling.model_dump(include=told, exclude_none=True),
            "rope_type": scaling.type,
            "rope_theta": language.rotary_base,
        }
    return DeepseekV3Config(
        vocab_size=language.vocab_size,
        hidden_size=language.hidden_size,
        intermediate_size=language.ffn_hidden_size,
        moe_intermediate_size=width,
        num_hidden_layers=language.num_layers,
        num_attention_heads=language.num_attention_heads,
        num_key_value_heads=language.num_attention_heads,
        n_shared_experts=shared // width,
        n_routed_experts=language.num_moe_experts,
        routed_scaling_factor=language.moe_router_topk_scaling_factor,
        kv_lora_rank=language.kv_lora_rank,
        q_lora_rank=language.q_lora_rank,
        qk_rope_head_dim=language.qk_pos_emb_head_dim,
        v_head_dim=language.v_head_dim,
        qk_nope_head_dim=language.qk_head_dim,
        n_group=language.moe_router_num_groups or 1,
        topk_group=language.moe_router_group_topk or 1,
        num_experts_per_tok=language.moe_router_topk,
        first_k_dense_replace=language.first_k_dense_replace,
        norm_topk_prob=True,
        hidden_act="silu",
        max_position_embeddings=language.max_position_embeddings,
        initializer_range=language.init_method_std,
        rms_norm_eps=language.layernorm_epsilon,
        use_cache=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
        rope_parameters=rope,
        rope_interleave=language.rotary_interleaved,
        attention_bias=False,
        attention_dropout=0.0,
        num_mtp_layers=language.mtp_num_layers or 0,
        **options,
    )


def to_deepseek(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename and cut an unsharded decoder's tensors: weights, or gradients.

    Args:
        ours: by the name in checkpoints, without `language.`.

    Returns:
        By the name in `DeepseekV3ForCausalLM.state_dict()`; those of multi-token prediction by
        the name in transformers' `MtpModel.state_dict()`, under `mtp.`.

    Raises:
        KeyError: a name that has no counterpart.
    """
    theirs: dict[str, torch.Tensor] = {}
    for name, tensor in ours.items():
        if name in _OUTSIDE:
            theirs[_OUTSIDE[name]] = tensor
            continue
        room, _, number, inner = name.split(".", 3)
        prefix = f"model.layers.{number}."
        if room == "mtp":
            prefix = f"mtp.layers.{number}."
            if inner in _AHEAD:
                theirs[prefix + _AHEAD[inner]] = tensor
                continue
            prefix, inner = f"{prefix}mtp_block.", inner.removeprefix("transformer_layer.")
        if inner in _IN_LAYERS:
            theirs[prefix + _IN_LAYERS[inner]] = tensor
        else:
            theirs |= rename_mlp(prefix, inner, tensor)
    return theirs


def their_losses(
    weights: dict[str, torch.Tensor],
    language: LanguageConfig,
    documents: Sequence[Sequence[int]],
    dtype: torch.dtype = torch.float64,
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Losses of next and further tokens, and the gradients of their weighted sum.

    Every document in a batch of its own; each loss is averaged over all of its targets.
    """
    from transformers import DeepseekV3ForCausalLM
    from transformers.modeling_layers import MtpModel

    config = deepseek_config(language, attn_implementation="sdpa")
    main = DeepseekV3ForCausalLM(config).to(dtype)
    # Its default, grouped_mm, knows no float64.
    main.set_experts_implementation("eager")
    _set_norms(main, language)
    main.load_state_dict({name: w for name, w in weights.items() if not name.startswith("mtp.")})
    ahead = None
    if language.mtp_num_layers:
        ahead = MtpModel(main, 1).to(dtype)
        ahead.set_experts_implementation("eager")
        _set_norms(ahead, language)
        own = {name[4:]: w for name, w in weights.items() if name.startswith("mtp.")}
        missing, unexpected = ahead.load_state_dict(own, strict=False)
        assert not unexpected and all(name.startswith(("embed", "shared")) for name in missing)
    tensors = [torch.tensor(document) for document in documents]
    losses = {"lm_loss": 0.0} | ({"mtp_loss": 0.0} if ahead is not None else {})
    for ids in tensors:
        count = sum(len(t) - 1 for t in tensors)
        hidden = main.model(input_ids=ids[None]).last_hidden_state
        logits = main.lm_head(hidden)[0]
        loss = F.cross_entropy(logits[:-1], ids[1:], reduction="sum") / count
        losses["lm_loss"] += float(loss.detach())
        if ahead is not None and len(ids) > 2:
            count = sum(max(0, len(t) - 2) for t in tensors)
            further = _further(main, ahead, ids, hidden)
            extra = F.cross_entropy(further[0, :-1], ids[2:], reduction="sum") / count
            losses["mtp_loss"] += float(extra.detach())
            loss = loss + language.mtp_loss_scaling_factor * extra
        loss.backward()
    gradients = {name: value.grad for name, value in main.named_parameters()}
    if ahead is not None:
        gradients |= {
            f"mtp.{name}": value.grad
            for name, value in ahead.named_parameters()
            if name.startswith("layers.")
        }
    return losses, gradients


def _further(
    main: DeepseekV3ForCausalLM, ahead: Any, ids: torch.Tensor, hidden: torch.Tensor
) -> torch.Tensor:
    """Logits of the token after the next: `[1, tokens - 1, vocab]`."""
    length = len(ids) - 1
    embedded = main.model.embed_tokens(ids[None, 1:])
    positions = torch.arange(length)[None]
    out = ahead.layers[0](
        embedded,
        hidden[:, :-1],
        position_embeddings=main.model.rotary_emb(embedded, positions),
        attention_mask=None,
        position_ids=positions,
        past_key_values=None,
    )
    return main.lm_head(out)


def _set_norms(model: torch.nn.Module, language: LanguageConfig) -> None:
    # transformers builds the norms of compressed vectors with its own epsilon, 1e-6.
    for name, module in model.named_modules():
        if name.endswith(("q_a_layernorm", "kv_a_layernorm")):
            module.variance_epsilon = language.layernorm_epsilon


_OUTSIDE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}

_AHEAD = {
    "enorm.weight": "enorm.weight",
    "hnorm.weight": "hnorm.weight",
    "eh_proj.weight": "eh_proj.weight",
    "final_layernorm.weight": "post_norm.weight",
}

_IN_LAYERS = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.linear_q_proj.weight": "self_attn.q_proj.weight",
    "self_attention.linear_q_down_proj.weight": "self_attn.q_a_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_a_layernorm.weight",
    "self_attention.linear_q_up_proj.weight": "self_attn.q_b_proj.weight",
    "self_attention.linear_kv_down_proj.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "self_attention.kv_layernorm.weight": "self_attn.kv_a_layernorm.weight",
    "self_attention.linear_kv_up_proj.weight": "self_attn.kv_b_proj.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
}
