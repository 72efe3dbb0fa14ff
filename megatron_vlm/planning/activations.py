"""Bytes that the forward pass keeps for the backward pass: a decoder layer, an encoder block.

Counted tensor by tensor as the torch layer provider saves them, parameters left out; the tests
hold the sums against what autograd really saves. Shorthands in comments: t tokens of a
context-parallel rank, s the same under sequence parallelism (t / tp), h hidden size, q and kv the
widths of queries and of keys, f the width of a feed-forward.

Assumed: attention by a fused kernel that never holds the scores. On CUDA the norms are fused too;
on a CPU each keeps its normalised input besides, and half precision is computed in float32 there,
which is not counted. Transformer Engine's layers keep somewhat less (fused rotary embedding and
SwiGLU), so its runs fit where these sums do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_vlm.config.model_schema import LanguageConfig, ModelConfig, VisionConfig
from megatron_vlm.config.schema import RecomputeConfig

Device = Literal["cuda", "cpu"]

_INDEX = 8
_FLOAT32 = 4


@dataclass(frozen=True)
class Saved:
    """Bytes kept for the backward pass, and bytes that live only while it recomputes."""

    kept: float
    """From the forward pass until the backward pass of the same micro-batch."""
    recomputed: float = 0.0
    """Most that is held for a moment when dropped tensors are computed again."""


@dataclass(frozen=True)
class Share:
    """One rank's part of a micro-batch, and in what precision."""

    tokens: float
    """Tokens of its context-parallel part (micro-batch size x row length / context size)."""
    element: int
    """Bytes of a weight or activation: 2, 4 or 8."""
    tp: int = 1
    cp: int = 1
    etp: int = 1
    sequence_parallel: bool = False
    expert_imbalance: float = 1.0
    """Tokens of the busiest rank's experts over the mean."""
    sample_tokens: float = 0.0
    """Length of a sample: sizes the mask that context parallelism needs."""
    device: Device = "cuda"

    @property
    def split_tokens(self) -> float:
        """Tokens of this rank between tensor-parallel regions."""
        return self.tokens / self.tp if self.sequence_parallel else self.tokens

    @property
    def wide(self) -> int:
        """Bytes of what is computed in float32 or finer: norms' statistics, router scores."""
        return max(_FLOAT32, self.element)


def decoder_layer_bytes(
    language: LanguageConfig, has_experts: bool, share: Share, recompute: RecomputeConfig
) -> Saved:
    """One decoder layer's saved bytes on one rank for one micro-batch, its input included."""
    entry = language.hidden_size * share.split_tokens * share.element
    modules = _attention(language, share)
    modules |= _experts(language, share) if has_experts else _dense(language, share)
    everything = entry + sum(modules.values())
    if recompute.language == "none":
        return Saved(everything)
    if recompute.language == "full":
        return Saved(entry, everything - entry)
    named: set[str] = set(recompute.language_modules)
    if "moe" in named:
        # The whole layer of experts, its activation included.
        named |= {"moe_act", "router"}
    dropped = {name: size for name, size in modules.items() if name in named}
    if "core_attn" in named and share.cp > 1 and not language.multi_latent_attention:
        # Instead of the gathered keys, the checkpoint keeps the rank's own.
        kept_keys = language.query_groups * language.head_dim / share.tp
        dropped["core_attn"] -= kept_keys * share.tokens * share.element
    whole_experts = sum(dropped.get(name, 0.0) for name in ("moe", "moe_act", "router"))
    largest = max([whole_experts, *dropped.values()], default=0.0)
    return Saved(everything - sum(dropped.values()), largest)


def _attention(language: LanguageConfig, share: Share) -> dict[str, float]:
    """Attention and both norms, the layer's input left out; keys are recomputable modules."""
    t, s, b, hidden = share.tokens, share.split_tokens, share.element, language.hidden_size
    norms = 2 * (hidden * b + share.wide) * s
    if share.device == "cpu":
        norms += 2 * hidden * b * s
    if language.multi_latent_attention:
        return _latent_attention(language, share) | {"layernorm": norms}
    head, tp = language.head_dim, share.tp
    queries = language.num_attention_heads * head / tp
    keys = language.query_groups * head / tp
    # The sum after attention, which the second norm reads.
    fixed = hidden * s * b
    # Fused queries, keys and values; rotated queries; the output of attention.
    fixed += (queries + 2 * keys) * t * b + queries * t * b + queries * t * b
    # Cosines and sines for queries and for keys.
    fixed += 4 * head * t * b
    if share.cp == 1:
        fixed += keys * t * b
    if language.qk_layernorm:
        fixed += (queries + keys) / head * t * share.wide
        if share.device == "cpu":
            fixed += (queries + keys) * t * b
        if language.query_groups != language.num_attention_heads:
            # Queries of a group lie beside its key and value: reading them apart is a copy.
            fixed += queries * t * b
    core = queries / head * t * share.wide
    if share.cp > 1:
        # All ranks' keys and values, the mask, and the output before rows without a key are
        # zeroed.
        core += 2 * keys * t * share.cp * b + share.sample_tokens * t * b + queries * t * b
    return {"fixed": fixed, "layernorm": norms, "core_attn": core}


def _latent_attention(language: LanguageConfig, share: Share) -> dict[str, float]:
    """Multi-latent attention, both norms of the layer left out."""
    t, s, b, heads = (
        share.tokens,
        share.split_tokens,
        share.element,
        language.num_attention_heads / share.tp,
    )
    rotary, value = language.qk_pos_emb_head_dim, language.v_head_dim
    query = language.qk_head_dim + rotary
    # Kernels want one head size: values are widened.
    widest = max(query, value)
    # The sum after attention, which the second norm reads; expanded queries, which are cut in two
    # and rotated; queries, keys and values of the kernel; its output.
    fixed = language.hidden_size * s * b
    fixed += heads * (query + 2 * query + 2 * value) * t * b
    # Cosines and sines of queries and of keys; shared channels before they are rotated.
    fixed += (2 * rotary + rotary) * t * b
    compressed = language.kv_lora_rank or 0
    normed = compressed + (language.q_lora_rank or 0)
    # What is compressed, and the same normed.
    fixed += (2 * normed + rotary) * s * b + 2 * share.wide * s
    if share.device == "cpu":
        fixed += normed * s * b
    core = heads * t * share.wide
    if widest > value:
        # Values as the kernel wants them instead, and its output as it gives it.
        core += heads * (widest - value + widest) * t * b
    if share.cp > 1:
        core += heads * (query + value) * t * share.cp * b
        core += share.sample_tokens * t * b + heads * widest * t * b
    return {"fixed": fixed, "core_attn": core}


def _dense(language: LanguageConfig, share: Share) -> dict[str, float]:
    return {"mlp": _swiglu(language.ffn_hidden_size, share)}


def _swiglu(width: int, share: Share) -> float:
    # Gate and up, the activated gate, a copy of up, the product.
    return 5 * width / share.tp * share.tokens * share.element


def _experts(language: LanguageConfig, share: Share) -> dict[str, float]:
    s, b, hidden = share.split_tokens, share.element, language.hidden_size
    experts, chosen = language.num_moe_experts or 1, language.moe_router_topk
    width = (language.moe_ffn_hidden_size or 0) / share.etp
    wide = share.wide
    # Scores, normalised scores, transposed weights and mask; choices, their weights and sums.
    router = s * (experts * (3 * wide + 1) + chosen * (_INDEX + wide) + 2 * wide + _INDEX + 1)
    if b < _FLOAT32:
        router += s * hidden * _FLOAT32
    rows = chosen * s
    router += rows * _INDEX
    rows *= share.etp * share.expert_imbalance
    # The experts' input, gate and up, the weighted product, the weights.
    moe = rows * (hidden * b + 3 * width * b + wide)
    moe += _swiglu(language.moe_shared_expert_intermediate_size or 0, share)
    # What lies between is computed again from gate and up.
    return {"router": router, "moe": moe, "moe_act": 0.0}


def head_bytes(language: LanguageConfig, share: Share) -> float:
    """Final norm, output layer and loss on one rank, at their fullest.

    The loss holds the logits and two copies in float32 (one when the logits are that already).
    """
    norm = 2 * language.hidden_size * share.split_tokens * share.element
    if share.device == "cpu":
        norm += language.hidden_size * share.split_tokens * share.element
    copies = 2 * share.wide + (share.element if share.element < share.wide else 0)
    return norm + language.vocab_size / share.tp * share.tokens * copies


def encoder_bytes(
    model: ModelConfig,
    patches: float,
    element: int,
    recompute: RecomputeConfig,
    device: Device = "cuda",
    frozen: Sequence[str] = (),
    elsewhere: float = 0.0,
) -> Saved:
    """Trunk and adapter over `patches` patches, the features they give not included.

    Args:
        model: with or without a vision tower.
        patches: of all pictures that the rank encodes in a step.
        element: bytes of a weight.
        recompute: its `vision` field is read.
        device: where the run computes.
        frozen: the parts named in `training.freeze`; a frozen trunk keeps nothing.
        elsewhere: patches that other ranks hold of the pictures that this rank has parts of; 0
            where all its pictures are whole.
    """
    vision = model.vision
    if vision is None or {"vision", "adapter"} <= set(frozen):
        return Saved(0.0)
    wide, hidden = max(_FLOAT32, element), vision.hidden_size
    merged, inner = model.adapter.widths(vision)
    # The adapter: its input, the merged patches (side by side they are the normalised input), the
    # first linear's output, GELU's output.
    per_token = merged + 2 * inner
    adapter = patches * (hidden * element + 2 * wide)
    adapter += patches / vision.spatial_merge_size**2 * per_token * element
    if "vision" in frozen:
        return Saved(adapter)
    block = encoder_block_bytes(vision, patches, element, recompute, device, elsewhere)
    head_dim = hidden // vision.num_attention_heads
    pixels = vision.in_channels * vision.patch_size**2
    # Pixels; the patch embedding; rotary cosines and sines; the last norm's input.
    ends = patches * (pixels * element + hidden * element + 2 * head_dim * wide)
    ends += patches * (hidden * element + 2 * wide)
    if device == "cpu":
        ends += patches * 2 * hidden * element
    return Saved(adapter + ends + vision.num_layers * block.kept, block.recomputed)


def encoder_block_bytes(
    vision: VisionConfig,
    patches: float,
    element: int,
    recompute: RecomputeConfig,
    device: Device,
    elsewhere: float = 0.0,
) -> Saved:
    """One block of the trunk over `patches` patches, its input included.

    With parts of pictures (`elsewhere`, as above) keys and values are gathered for attention.
    """
    hidden, inner, wide = vision.hidden_size, vision.ffn_hidden_size, max(_FLOAT32, element)
    entry = hidden * element * patches
    gated = vision.gated_linear_unit
    # Both norms' outputs, the sum between; queries, keys and values; attention's output; then
    # gate, up and their product, or GELU's input and output.
    fixed = 7.0 * hidden * element + (3 if gated else 2) * inner * element + 2 * wide
    if device == "cpu":
        fixed += 2 * hidden * element
    fixed *= patches
    # Rotated queries and keys, the sums of exponentials.
    attention = patches * (2 * hidden * element + vision.num_attention_heads * wide)
    if vision.qk_layernorm:
        attention += patches * 2 * vision.num_attention_heads * wide
        if device == "cpu":
            attention += patches * 2 * hidden * element
    if elsewhere:
        # Gathered keys and values stand for the rank's own rotated keys.
        attention += (2 * (patches + elsewhere) - patches) * hidden * element
    # The activated gate.
    activation = patches * inner * element if gated else 0.0
    everything = fixed + attention + activation
    if elsewhere and not vision.qk_layernorm:
        # No one reads queries, keys and values as they were projected any more.
        everything -= patches * 3 * hidden * element
    if recompute.vision == "full":
        return Saved(entry, everything)
    if recompute.vision == "selective":
        return Saved(entry + fixed, max(attention, activation))
    return Saved(entry + everything)
