"""The decoder's FLOP formulas against torch's own counter and the parameters that exist.

Two differences are meant. The counter sees whole score matrices, the formula a causal half; so
twice the formula's attention is compared. Neither counts norms, softmax, rotary embeddings,
activations, the embedding lookup and the optimizer, which are no matrix products.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlm.config import LanguageConfig, RunConfig
from megatron_vlm.models.language.flops import (
    attention_flops,
    linear_flops_per_token,
)
from megatron_vlm.planning.shapes import active_parameters
from tests.parallel.layouts import DEEPSEEK
from tests.training.driver import with_run
from tests.training_case import recipe

pytestmark = pytest.mark.distributed

SEGMENTS, LENGTH = 4, 24
MODELS = {
    "moe": [],
    "dense": ["model.language.num_moe_experts=null"],
    "odd": [
        "model.language.num_moe_experts=6",
        "model.language.moe_router_topk=3",
        "model.language.first_k_dense_replace=2",
        "model.language.num_query_groups=2",
        "model.language.kv_channels=24",
        "model.language.moe_shared_expert_intermediate_size=48",
    ],
    "tied": [
        "model.language.num_moe_experts=null",
        "model.language.share_embeddings_and_output_weights=true",
        "model.language.qk_layernorm=false",
    ],
    # As wide a value head as a query head: kernels want one size, and widen what is narrower.
    "deepseek": [*DEEPSEEK, "model.language.v_head_dim=24"],
    "deepseek_full_queries": [
        *DEEPSEEK,
        "model.language.v_head_dim=24",
        "model.language.q_lora_rank=null",
        "model.language.mtp_num_layers=null",
    ],
}


def _counted(run: Any) -> dict[str, float]:
    """FLOPs of a forward and of a backward pass; elements of all parameters."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_vlm.models.language.packing import PackedRows

    (chunk,) = run.step.model.chunks
    bounds = torch.arange(0, (SEGMENTS + 1) * LENGTH, LENGTH, dtype=torch.int32)
    tokens = torch.randint(0, 300, (1, SEGMENTS * LENGTH))
    rows = PackedRows(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=LENGTH,
        max_seqlen_kv=LENGTH,
        row_ids=torch.zeros(SEGMENTS * LENGTH, dtype=torch.int64),
        row_tokens=torch.tensor([SEGMENTS * LENGTH]),
        position_ids=torch.arange(LENGTH).repeat(SEGMENTS),
        next_tokens=tokens if chunk.multi_token is not None else None,
    )
    decoder_input = chunk.embed(tokens, None, None)
    # The counter does not know the fused kernel of the CPU: plain products in its place.
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):
        output = chunk(
            input_ids=tokens,
            position_ids=None,
            attention_mask=None,
            decoder_input=decoder_input,
            packed_seq_params=rows,
        )
    logits = output if isinstance(output, tuple) else (output,)
    with FlopCounterMode(display=False) as backward:
        sum(part.sum() for part in logits).backward()
    parameters = sum(
        p.numel() for name, p in chunk.named_parameters() if not name.startswith("multi_token.")
    )
    return {
        "forward": forward.get_total_flops(),
        "backward": backward.get_total_flops(),
        "parameters": parameters,
    }


def _expected(language: LanguageConfig) -> float:
    attention = attention_flops(language, SEGMENTS * LENGTH**2)
    return linear_flops_per_token(language) * SEGMENTS * LENGTH + 2 * attention


def _idle_experts(language: LanguageConfig) -> int:
    """Parameters of the experts that one token does not pass through."""
    if language.num_moe_experts is None or language.moe_ffn_hidden_size is None:
        return 0
    idle = language.num_moe_experts - language.moe_router_topk
    each = 3 * language.hidden_size * language.moe_ffn_hidden_size
    return sum(language.moe_layer_freq) * idle * each


@pytest.mark.parametrize("name", MODELS)
def test_formulas(nano_data: Path, tmp_path: Path, name: str) -> None:
    config: RunConfig = recipe(nano_data, tmp_path, *MODELS[name])
    (found,) = with_run(config, _counted)
    language = config.model.language
    assert found["forward"] == _expected(language)
    assert found["backward"] == 2 * found["forward"]
    assert active_parameters(language) == found["parameters"] - _idle_experts(language)
