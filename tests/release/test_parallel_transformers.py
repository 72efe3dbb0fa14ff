"""Random models of transformers', imported, in every kind of layout: logits and all gradients.

Configurations are drawn: heads, ranks of compression, experts, top-k, groups, shared experts and
stretched rotary embeddings. In float32, documents packed into rows on our side and each alone on
theirs, one micro-batch on each replica.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_vlm.config import LanguageConfig, RunConfig, load_recipe
from megatron_vlm.platform import World, seed_step, start_distributed, stop
from megatron_vlm.topology.layout import resolve_layout
from tests.deepseek_map import deepseek_config, to_deepseek
from tests.dots1_map import dots1_config, text_step, to_dots1
from tests.ranks import run_ranks
from tests.training_case import RECIPE, assemble, local_parts

SEQ_LENGTH, PAD_MULTIPLE = 48, 4
LENGTHS = ((17, 9, 14), (31, 5))
"""Of each row's documents; a row lies on a replica of its own where there are two."""
TOLERANCE = 1e-5

TP2, EP2 = "parallel.tensor_model_parallel_size=2", "parallel.expert_model_parallel_size=2"
PP2 = "parallel.pipeline_model_parallel_size=2"
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "tp2": (2, (TP2,)),
    "ep2": (2, (EP2,)),
    "pp2": (2, (PP2,)),
    "tp2_ep2": (4, (TP2, EP2)),
}


def drawn(family: str, seed: int) -> LanguageConfig:
    """A small decoder of this family."""
    rng = random.Random(f"{family} {seed}")
    head = rng.choice((8, 12, 16))
    width = rng.choice((16, 24))
    experts = rng.choice((8, 16))
    values: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 48,
        "num_attention_heads": 4,
        "ffn_hidden_size": rng.choice((80, 96)),
        "vocab_size": 64,
        "rotary_base": rng.choice((1e4, 1e6)),
        "first_k_dense_replace": rng.choice((1, 2)),
        "num_moe_experts": experts,
        "moe_ffn_hidden_size": width,
        "moe_router_topk": rng.choice((2, 3, 4)),
        "moe_shared_expert_intermediate_size": width * rng.choice((1, 2)),
        "moe_router_topk_scaling_factor": rng.choice((1.0, 2.5)),
        "moe_aux_loss_coeff": 0.0,
    }
    if family == "dots1":
        values |= {"kv_channels": head, "num_query_groups": rng.choice((2, 4))}
        return LanguageConfig(**values)
    groups = rng.choice((None, 2, 4))
    yarn = {
        "type": "yarn",
        "factor": rng.choice((2.0, 8.0)),
        "original_max_position_embeddings": rng.choice((8, 16)),
        "mscale": rng.choice((1.0, 0.7)),
        "mscale_all_dim": rng.choice((1.0, 0.7)),
    }
    linear = {"type": "linear", "factor": 2.0}
    values |= {
        "qk_layernorm": False,
        "layernorm_epsilon": 1e-6,
        "kv_lora_rank": rng.choice((16, 20)),
        "q_lora_rank": rng.choice((None, 24)),
        "qk_head_dim": head,
        "qk_pos_emb_head_dim": rng.choice((4, 8)),
        "v_head_dim": rng.choice((8, 12)),
        "rotary_interleaved": rng.choice((True, False)),
        "rope_scaling": rng.choice((None, linear, yarn, yarn)),
        "moe_router_num_groups": groups,
        "moe_router_group_topk": None if groups is None else rng.randint(groups // 2, groups),
    }
    return LanguageConfig(**values)


def _save(family: str, language: LanguageConfig, folder: Path) -> Any:
    """Their model with random weights, saved and loaded again."""
    from transformers import AutoModelForCausalLM

    build = dots1_config if family == "dots1" else deepseek_config
    model = AutoModelForCausalLM.from_config(build(language), dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.randn(value.shape, generator=generator)
            if "norm" in name:
                value.copy_(1 + 0.2 * noise)
            elif name.endswith("correction_bias"):
                value.copy_(0.1 * noise)
            elif value.dim() > 1:
                value.copy_(noise * value.size(-1) ** -0.5)
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")


def _theirs(
    model: Any, documents: Sequence[Sequence[int]]
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Logits of each document, and gradients of the loss averaged over all targets."""
    targets = sum(len(document) - 1 for document in documents)
    logits = []
    for document in map(torch.tensor, documents):
        found = model(input_ids=document[None]).logits[0]
        (F.cross_entropy(found[:-1], document[1:], reduction="sum") / targets).backward()
        logits.append(found.detach())
    return logits, {name: value.grad for name, value in model.named_parameters()}


def _ours(world: World, config: RunConfig, checkpoint: Path, rows: list) -> dict[str, Any]:
    """This rank's pieces of all gradients, and its part of the logits of its rows."""
    from megatron_vlm.checkpoint.checkpointer import load_model
    from megatron_vlm.engine.objective import build_objective
    from megatron_vlm.engine.step import TrainStep
    from megatron_vlm.engine.trainable import make_trainable
    from megatron_vlm.models.vlm import build_model
    from megatron_vlm.topology.mesh import build_topology

    layout = resolve_layout(config, world.world_size)
    topology = build_topology(layout, start_distributed(world))
    seed_step(1, 0)
    model = build_model(config, topology)
    load_model(checkpoint, model, config)
    trainable = make_trainable(model, config)
    objective = build_objective("next_token", topology, config.model)
    step = TrainStep(config, topology, model, objective, chunks=list(trainable.chunks))
    count = len(rows) // layout.dp
    steps = [
        text_step(rows[i * count : (i + 1) * count], SEQ_LENGTH, PAD_MULTIPLE)
        for i in range(layout.dp)
    ]
    mine = steps[topology.coordinates.dp]
    plans = tuple(each.plan.micro_batches[0] for each in steps)
    data = mine._replace(plan=replace(mine.plan, micro_batches=plans))
    step.train(data)
    gradients = []
    with torch.no_grad():
        for chunk in model.chunks:
            for parameter in chunk.parameters():
                kept = parameter.detach().clone()
                gradients.append((parameter, kept))
                parameter.copy_(parameter.main_grad)
    parts = local_parts(model.sharded_state_dict())
    with torch.no_grad():
        for parameter, kept in gradients:
            parameter.copy_(kept)
    batches = step._micro_batches(data)
    logits = step.forward_only(model, batches, lambda output, batch: output[0].clone())
    at = topology.coordinates
    stop()
    return {"parts": parts, "place": (at.dp, at.tp), "logits": logits}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("family", "seed"),
    [
        pytest.param(family, seed, marks=[pytest.mark.slow] if seed > 1 else [])
        for family in ("dots1", "deepseek_v3")
        for seed in range(5)
    ],
)
def test_logits_and_gradients(family: str, seed: int, tmp_path: Path) -> None:
    from megatron_vlm.release.importing import import_folder

    language = drawn(family, seed)
    model = _save(family, language, tmp_path / "theirs")
    import_folder(tmp_path / "theirs", tmp_path / "ours")
    generator = torch.Generator().manual_seed(seed)
    rows = [
        [torch.randint(language.vocab_size, (n,), generator=generator).tolist() for n in row]
        for row in LENGTHS
    ]
    logits, gradients = _theirs(model, [document for row in rows for document in row])
    for name, (world_size, words) in LAYOUTS.items():
        config = load_recipe(
            str(RECIPE),
            [
                f"model={tmp_path / 'ours' / 'iter_0000000' / 'model.yaml'}",
                "training.precision=fp32",
                f"training.seq_length={SEQ_LENGTH}",
                "training.global_batch_size=2",
                f"data.pad_multiple={PAD_MULTIPLE}",
                "model.language.moe_aux_loss_coeff=0",
                *words,
            ],
        )
        micro = 2 // resolve_layout(config, world_size).dp
        config = config.model_copy(
            update={"training": config.training.model_copy(update={"micro_batch_size": micro})}
        )
        ranks = run_ranks(world_size, _ours, config, tmp_path / "ours", rows)
        _assert_logits(name, ranks, logits)
        found = {
            key.removeprefix("language."): value
            for key, value in assemble([rank["parts"] for rank in ranks]).items()
            if not key.endswith("expert_bias")
        }
        renamed = to_dots1(found, language) if family == "dots1" else to_deepseek(found)
        assert renamed.keys() == gradients.keys()
        for key, expected in gradients.items():
            gap = (renamed[key].reshape(expected.shape) - expected).norm() / expected.norm()
            assert gap < TOLERANCE, (name, key, float(gap))


def _assert_logits(name: str, ranks: list, expected: list[torch.Tensor]) -> None:
    """Rows of all replicas, columns of all tensor ranks, against each document's logits."""
    parts: dict[tuple[int, int], torch.Tensor] = {}
    for rank in ranks:
        if rank["logits"]:
            (parts[rank["place"]],) = rank["logits"]
    replicas = sorted({dp for dp, _ in parts})
    whole = torch.cat(
        [
            torch.cat([part for (at, _), part in sorted(parts.items()) if at == dp], dim=-1)
            for dp in replicas
        ]
    )
    starts = []
    for number, row in enumerate(LENGTHS):
        used = number * SEQ_LENGTH
        for length in row:
            starts.append(used)
            used += -(-length // PAD_MULTIPLE) * PAD_MULTIPLE
    for start, theirs in zip(starts, expected, strict=True):
        ours = whole[start : start + len(theirs)]
        gap = float((ours - theirs).norm() / theirs.norm())
        assert gap < TOLERANCE, (name, gap)
