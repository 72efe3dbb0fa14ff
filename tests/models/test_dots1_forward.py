"""The decoder against transformers' Dots1ForCausalLM: one loss, and the gradient of every weight.

Ours sees documents packed into rows, through the engine's own step; theirs sees each alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_vlm.config import LanguageConfig, ModelConfig, RunConfig, TrainingConfig
from megatron_vlm.platform import World, start_distributed, stop
from megatron_vlm.topology.layout import resolve_layout
from tests.dots1_map import dots1_config, text_step, to_dots1
from tests.ranks import run_ranks

pytestmark = pytest.mark.unit

SEQ_LENGTH = 48
DOCUMENTS = [[17, 9, 14], [31, 5]]
"""Tokens of each row's documents: with padding inside the rows and filler at their ends."""
TOLERANCE = 3e-6
"""Relative; theirs computes norms, angles and the router in float32 whatever the weights are."""

SMALL: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 80,
    "vocab_size": 61,
    "rotary_base": 10000.0,
    "num_moe_experts": 6,
    "moe_ffn_hidden_size": 24,
    "moe_router_topk": 2,
    "moe_shared_expert_intermediate_size": 48,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_aux_loss_coeff": 0.0,
}
CASES = {
    "as_published": SMALL,
    "grouped_queries": SMALL
    | {
        "num_query_groups": 2,
        "kv_channels": 12,
        "first_k_dense_replace": 2,
        "num_moe_experts": 9,
        "moe_router_topk": 3,
        "moe_router_topk_scaling_factor": 1.0,
        "layernorm_epsilon": 1e-3,
    },
    "experts_everywhere": SMALL
    | {
        "num_layers": 2,
        "num_query_groups": 1,
        "first_k_dense_replace": 0,
        "num_moe_experts": 16,
        "moe_router_topk": 4,
        "moe_shared_expert_intermediate_size": 24,
        "rotary_base": 1e7,
    },
}


def random_rows(language: LanguageConfig, generator: torch.Generator) -> list[list[list[int]]]:
    """Documents of random tokens, row by row."""
    return [
        [torch.randint(language.vocab_size, (n,), generator=generator).tolist() for n in row]
        for row in DOCUMENTS
    ]


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_match_transformers(case: str) -> None:
    language = LanguageConfig(**CASES[case])
    generator = torch.Generator().manual_seed(len(case))
    rows = random_rows(language, generator)
    (ours,) = run_ranks(1, our_step, language, rows)
    loss, gradients = _their_step(to_dots1(ours["weights"], language), language, rows)
    assert ours["losses"]["lm_loss"] == pytest.approx(loss, rel=TOLERANCE)
    renamed = to_dots1(ours["gradients"], language)
    assert renamed.keys() == gradients.keys()
    for name, expected in gradients.items():
        found = renamed[name].reshape(expected.shape)
        assert expected.norm() > 0, name
        assert (found - expected).norm() <= TOLERANCE * expected.norm(), name


def our_step(
    world: World,
    language: LanguageConfig,
    rows: list,
    pictures: Sequence[tuple[int, int, int]] = (),
) -> dict[str, Any]:
    """Losses, weights and gradients of one step of ours in float64, from random weights."""
    # Here and not at the top: these import the engine, which must stay out of test collection.
    from megatron_vlm.engine.objective import build_objective
    from megatron_vlm.engine.step import TrainStep
    from megatron_vlm.engine.trainable import make_trainable
    from megatron_vlm.models.vlm import build_model
    from megatron_vlm.topology.mesh import build_topology, destroy_topology

    config = RunConfig(
        model=ModelConfig(language=language),
        training=TrainingConfig(
            train_iters=1,
            seq_length=SEQ_LENGTH,
            micro_batch_size=len(rows),
            global_batch_size=len(rows),
            precision="fp64",
        ),
    )
    topology = build_topology(resolve_layout(config, 1), start_distributed(world))
    model = build_model(config, topology, predicts_ahead=True)
    (chunk,) = model.chunks
    _randomize(chunk)
    weights = dict(chunk.named_parameters())
    biases = {name: b for name, b in chunk.named_buffers() if name.endswith("expert_bias")}
    kept = {name: value.detach().clone() for name, value in (weights | biases).items()}
    trainable = make_trainable(model, config)
    objective = build_objective("next_token", topology, config.model)
    step = TrainStep(config, topology, model, objective, chunks=list(trainable.chunks))
    result = step.train(text_step(rows, SEQ_LENGTH, pad_multiple=4, pictures=pictures))
    gradients = {name: value.main_grad.clone() for name, value in weights.items()}
    destroy_topology()
    stop()
    return {"losses": result.losses, "weights": kept, "gradients": gradients}


@torch.no_grad()
def _randomize(chunk: torch.nn.Module) -> None:
    """Weights at which every part matters: norms unlike one, biases that change the choice."""
    generator = torch.Generator().manual_seed(5)
    for name, value in [*chunk.named_parameters(), *chunk.named_buffers()]:
        drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        if "norm" in name:
            value.copy_(1 + 0.2 * drawn)
        elif name.endswith("expert_bias"):
            value.copy_(0.1 * drawn)
        elif value.dim() > 1:
            value.copy_(drawn * (0.5 if "embedding" in name else value.size(-1) ** -0.5))


def _their_step(
    weights: dict[str, torch.Tensor], language: LanguageConfig, rows: list
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients with every document in a batch of its own."""
    from transformers import Dots1ForCausalLM

    model = Dots1ForCausalLM(dots1_config(language, attn_implementation="sdpa")).double()
    # Its default, grouped_mm, knows no float64.
    model.set_experts_implementation("eager")
    model.load_state_dict(weights)
    documents = [torch.tensor(document) for row in rows for document in row]
    targets = sum(len(document) - 1 for document in documents)
    total = 0.0
    for document in documents:
        logits = model(input_ids=document[None]).logits[0]
        loss = F.cross_entropy(logits[:-1], document[1:], reduction="sum") / targets
        loss.backward()
        total += float(loss.detach())
    return total, {name: value.grad for name, value in model.named_parameters()}
