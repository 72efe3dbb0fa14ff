"""Latent attention, groups and multi-token prediction against transformers' DeepSeek-V3.

Both losses and the gradient of every weight; ours packed into rows, theirs each document alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_vlm.config import LanguageConfig
from tests.deepseek_map import their_losses, to_deepseek
from tests.models.test_dots1_forward import TOLERANCE, our_step, random_rows
from tests.ranks import run_ranks

pytestmark = pytest.mark.unit

SMALL: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 80,
    "vocab_size": 61,
    "rotary_base": 10000.0,
    "rotary_interleaved": True,
    "qk_layernorm": False,
    "layernorm_epsilon": 1e-6,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_head_dim": 12,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 10,
    "mtp_num_layers": 1,
    "mtp_loss_scaling_factor": 0.3,
    "num_moe_experts": 16,
    "moe_ffn_hidden_size": 24,
    "moe_router_topk": 4,
    "moe_router_num_groups": 4,
    "moe_router_group_topk": 2,
    "moe_shared_expert_intermediate_size": 24,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_aux_loss_coeff": 0.0,
}
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 0.6,
}
CASES = {
    "as_published": SMALL | {"rope_scaling": YARN},
    "plain": SMALL
    | {
        "q_lora_rank": None,
        "mtp_num_layers": None,
        "moe_router_num_groups": None,
        "moe_router_group_topk": None,
        "first_k_dense_replace": 2,
        "rotary_interleaved": False,
        "v_head_dim": 24,
    },
    # k / groups is not 2 here: the engine's own router would choose otherwise.
    "three_of_a_group": SMALL
    | {
        "moe_router_topk": 3,
        "moe_router_group_topk": 1,
        "first_k_dense_replace": 0,
        "layernorm_epsilon": 1e-4,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "moe_shared_expert_intermediate_size": 48,
    },
    "other_yarn": SMALL
    | {
        "rope_scaling": {
            "type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 8,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
        },
    },
}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_match_transformers(case: str) -> None:
    language = LanguageConfig(**CASES[case])
    rows = random_rows(language, torch.Generator().manual_seed(len(case)))
    (ours,) = run_ranks(1, our_step, language, rows)
    documents = [document for row in rows for document in row]
    losses, gradients = their_losses(to_deepseek(_named(ours["weights"])), language, documents)
    assert ours["losses"].keys() == losses.keys()
    for name, loss in losses.items():
        assert ours["losses"][name] == pytest.approx(loss, rel=TOLERANCE), name
    renamed = to_deepseek(_named(ours["gradients"]))
    assert renamed.keys() == gradients.keys()
    for name, expected in gradients.items():
        found = renamed[name].reshape(expected.shape)
        assert expected.norm() > 0, name
        assert (found - expected).norm() <= TOLERANCE * expected.norm(), name


def _named(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By the names in checkpoints."""
    return {name.replace("multi_token.", "mtp."): tensor for name, tensor in tensors.items()}
