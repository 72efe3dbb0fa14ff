"""The decoder beside `transformers.Dots1ForCausalLM`: its configuration, weights, and tokens.

Written from the two modules' shapes alone, not from the exporter, so that it checks both the
decoder and whatever else claims to know Hugging Face's names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_vlm.config.model_schema import LanguageConfig

if TYPE_CHECKING:
    from transformers import Dots1Config

    from megatron_vlm.data.loader import LoadedStep


def dots1_config(language: LanguageConfig, **options: Any) -> Dots1Config:
    """The configuration of the same decoder, every field set.

    Args:
        language: a decoder with experts, normalised queries and keys, at least two experts a
            token, and shared experts whose width is a multiple of a routed one's.
        options: passed on, for example `attn_implementation`.
    """
    from transformers import Dots1Config

    width = language.moe_ffn_hidden_size
    shared = language.moe_shared_expert_intermediate_size
    assert language.qk_layernorm and language.num_moe_experts and language.moe_router_topk > 1
    assert width and shared and shared % width == 0
    return Dots1Config(
        vocab_size=language.vocab_size,
        hidden_size=language.hidden_size,
        intermediate_size=language.ffn_hidden_size,
        moe_intermediate_size=width,
        num_hidden_layers=language.num_layers,
        num_attention_heads=language.num_attention_heads,
        num_key_value_heads=language.query_groups,
        # No field of the class, but its modules read it.
        head_dim=language.head_dim,
        n_shared_experts=shared // width,
        n_routed_experts=language.num_moe_experts,
        output_router_logits=False,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=language.moe_router_topk,
        first_k_dense_replace=language.first_k_dense_replace,
        norm_topk_prob=True,
        hidden_act="silu",
        max_position_embeddings=language.max_position_embeddings,
        initializer_range=language.init_method_std,
        rms_norm_eps=language.layernorm_epsilon,
        use_cache=False,
        tie_word_embeddings=language.share_embeddings_and_output_weights,
        rope_parameters={"rope_type": "default", "rope_theta": language.rotary_base},
        attention_bias=False,
        attention_dropout=0.0,
        routed_scaling_factor=language.moe_router_topk_scaling_factor,
        sliding_window=None,
        max_window_layers=language.num_layers,
        layer_types=["full_attention"] * language.num_layers,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        **options,
    )


def to_dots1(ours: dict[str, torch.Tensor], language: LanguageConfig) -> dict[str, torch.Tensor]:
    """Rename and cut an unsharded decoder's tensors: weights, or gradients (the map is linear).

    Args:
        ours: by the name in `LanguageModel.state_dict()`; buffers may be left out.
        language: the decoder.

    Returns:
        By the name in `Dots1ForCausalLM.state_dict()`; views where possible.

    Raises:
        KeyError: a name that has no counterpart.
    """
    theirs: dict[str, torch.Tensor] = {}
    for name, tensor in ours.items():
        if not name.startswith("decoder.layers."):
            theirs[_OUTSIDE_LAYERS[name]] = tensor
            continue
        number, inner = name.removeprefix("decoder.layers.").split(".", 1)
        prefix = f"model.layers.{number}."
        if inner in _IN_LAYERS:
            theirs[prefix + _IN_LAYERS[inner]] = tensor
        elif inner == "self_attention.linear_qkv.weight":
            for part, weight in zip("qkv", _split_qkv(tensor, language), strict=True):
                theirs[f"{prefix}self_attn.{part}_proj.weight"] = weight
        else:
            theirs |= rename_mlp(prefix, inner, tensor)
    return theirs


def rename_mlp(prefix: str, inner: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Names and parts of a feed-forward's or its router's tensor, alike in all their models.

    Args:
        prefix: of the layer, in their names.
        inner: the name within our layer.
        tensor: its value.
    """
    if inner in _MLP:
        return {prefix + _MLP[inner]: tensor}
    if inner == "mlp.experts.linear_fc1":
        return {f"{prefix}mlp.experts.gate_up_proj": tensor.flatten(1, 2)}
    module = _GATE_UP[inner]
    gate, up = tensor.chunk(2)
    return {f"{prefix}{module}.gate_proj.weight": gate, f"{prefix}{module}.up_proj.weight": up}


_OUTSIDE_LAYERS = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}

_IN_LAYERS = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
}

_MLP = {
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.expert_bias": "mlp.gate.e_score_correction_bias",
    "mlp.experts.linear_fc2": "mlp.experts.down_proj",
    "mlp.shared_experts.linear_fc2.weight": "mlp.shared_experts.down_proj.weight",
}

_GATE_UP = {
    "mlp.linear_fc1.weight": "mlp",
    "mlp.shared_experts.linear_fc1.weight": "mlp.shared_experts",
}


def _split_qkv(
    weight: torch.Tensor, language: LanguageConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows lie group by group: the group's queries, its key, its value."""
    groups, channels = language.query_groups, language.head_dim
    queries = language.num_attention_heads // groups * channels
    grouped = weight.unflatten(0, (groups, -1))
    query, key, value = grouped.split([queries, channels, channels], dim=1)
    return query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)


def text_step(
    rows: Sequence[Sequence[Sequence[int]]],
    seq_length: int,
    pad_multiple: int,
    pad: int = 0,
    pictures: Sequence[tuple[int, int, int]] = (),
) -> LoadedStep:
    """A step of one micro-batch on one replica, as the loader would hand it over.

    Args:
        rows: documents of each row, as token ids; every token but a document's first is a target.
        seq_length: tokens of a row; what its documents leave free becomes filler.
        pad_multiple: each document is padded to a multiple of this many tokens.
        pad: token id of padding.
        pictures: first token, rows and columns of what has the positions of a picture, though it
            is text.
    """
    from megatron_vlm.data.collate import TextBatch, structure
    from megatron_vlm.data.loader import LoadedStep
    from megatron_vlm.data.picture_batch import PictureBatch
    from megatron_vlm.data.picture_table import PictureTable, Shares
    from megatron_vlm.data.plan import StepPlan
    from megatron_vlm.data.rows import Cursor, Window
    from tests.engine.plans import laid_out

    total = len(rows) * seq_length
    tokens, labels = np.full(total, pad, dtype=np.int64), np.full(total, pad, dtype=np.int64)
    mask = np.zeros(total, dtype=np.float32)
    planned = []
    for number, row in enumerate(rows):
        used, members = 0, []
        for document in row:
            length = len(document)
            space = -(-length // pad_multiple) * pad_multiple
            start = number * seq_length + used
            tokens[start : start + length] = document
            labels[start : start + length - 1] = document[1:]
            mask[start : start + length - 1] = 1
            members.append((length, space))
            used += space
        planned.append(members)
    plan = replace(
        laid_out(planned, seq_length),
        picture_spans=np.array(
            [(start, high * wide) for start, high, wide in pictures], np.int64
        ).reshape(-1, 2),
        picture_columns=np.array([wide for _, _, wide in pictures], np.int64),
    )
    lengths = [length for members in planned for length, _ in members]
    step = StepPlan(
        first_row=0,
        micro_batches=((plan,),),
        pictures=PictureTable.of([]),
        shares=Shares(*np.zeros((4, 0), np.int64)),
        document_loss_tokens=np.array(lengths) - 1,
        document_tokens=np.array(lengths),
        document_samples=np.ones(len(lengths), np.int64),
        image_patches=0,
    )
    no_pictures = PictureBatch(
        torch.empty(0, 0), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    )
    text = TextBatch(
        torch.from_numpy(tokens),
        torch.from_numpy(labels),
        torch.from_numpy(mask),
        structure(plan).position_ids,
    )
    return LoadedStep(step, no_pictures, [text], 0, Cursor(Window(0, 0, 0, (0,), (0,))))
