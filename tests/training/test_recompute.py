"""Recomputed activations change no number, and are really recomputed."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlm.errors import ConfigError
from megatron_vlm.topology.layout import resolve_layout
from tests.parallel.layouts import DEEPSEEK
from tests.topology.words import config
from tests.training.driver import with_run
from tests.training_case import assemble, local_parts, recipe

STEPS = ("training.train_iters=3", "training.global_batch_size=4")
MODULES = ("core_attn", "moe_act", "mlp", "moe", "layernorm")
SELECTIVE = "recompute.language=selective"
CASES: dict[str, tuple[str, ...]] = {
    **{name: (SELECTIVE, f"recompute.language_modules=[{name}]") for name in MODULES},
    "all_modules": (SELECTIVE, f"recompute.language_modules=[{','.join(MODULES)}]"),
    "language_full": ("recompute.language=full",),
    "vision_selective": ("recompute.vision=selective",),
    "vision_full": ("recompute.vision=full",),
    "both_full": ("recompute.language=full", "recompute.vision=full"),
}
PP = "parallel.pipeline_model_parallel_size=2"
VPP_EP = (
    "parallel.virtual_pipeline_model_parallel_size=2",
    "parallel.expert_model_parallel_size=2",
)
OVERLAPPABLE = (SELECTIVE, "recompute.language_modules=[core_attn,moe_act,mlp,layernorm]")
"""What the combined 1F1B schedule allows."""
AGAIN: dict[str, set[str]] = {
    "core_attn": {"core_attn"},
    "moe_act": {"moe_act"},
    "mlp": {"mlp"},
    "moe": {"router", "moe_act"},
    "layernorm": {"norm"},
    "all_modules": {"core_attn", "moe_act", "mlp", "router", "norm"},
    "language_full": {"core_attn", "moe_act", "mlp", "router", "norm"},
    "vision_selective": {"vision_attention"},
    "vision_full": {"vision_attention", "vision_block"},
    "both_full": {
        *("core_attn", "moe_act", "mlp", "router", "norm"),
        *("vision_attention", "vision_block"),
    },
}
"""Which parts run a second time in each case."""


def _count_calls(calls: Counter[str]) -> None:
    """Count calls of each part; in this forked process, for good."""
    from megatron.core.transformer.mlp import MLP

    from megatron_vlm.models.language import experts
    from megatron_vlm.models.language.attention import PackedCoreAttention
    from megatron_vlm.models.language.norm import Norm
    from megatron_vlm.models.language.router import SigmoidRouter
    from megatron_vlm.models.vision.navit import Block

    def counted(owner: Any, attribute: str, name: str) -> None:
        real = getattr(owner, attribute)

        def wrapper(*arguments: Any, **options: Any) -> Any:
            # Shared experts are an MLP too, of another class.
            if name != "mlp" or type(arguments[0]) is MLP:
                calls[name] += 1
            return real(*arguments, **options)

        setattr(owner, attribute, wrapper)

    counted(PackedCoreAttention, "forward", "core_attn")
    counted(experts, "weighted_swiglu", "moe_act")
    counted(MLP, "forward", "mlp")
    counted(SigmoidRouter, "forward", "router")
    counted(Norm, "forward", "norm")
    counted(Block, "_attend", "vision_attention")
    counted(Block, "forward", "vision_block")


def _train(run: Any) -> dict[str, Any]:
    from megatron_vlm.engine.routers import routers

    calls: Counter[str] = Counter()
    _count_calls(calls)
    metrics, routing = [], []

    def observe(entry: dict[str, Any]) -> None:
        metrics.append(dict(entry))
        found = routers(run.step.model.chunks)
        routing.append([router.tokens_per_expert.tolist() for router in found])

    run.held_out = {}
    run.run(on_step=observe)
    return {
        "metrics": metrics,
        "routing": routing,
        "calls": dict(calls),
        "parts": local_parts(run.step.model.sharded_state_dict()),
    }


@pytest.fixture(scope="module")
def reference(nano_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process that keeps every activation."""
    run_config = recipe(nano_data, tmp_path_factory.mktemp("kept"), *STEPS)
    (found,) = with_run(run_config, _train)
    # Counts of a step are of its real tokens: what a double count would break.
    language = run_config.model.language
    tokens = [entry["consumed_tokens"] for entry in found["metrics"]]
    for total, before, layers in zip(tokens, [0, *tokens], found["routing"], strict=False):
        for counts in layers:
            assert sum(counts) == language.moe_router_topk * (total - before)
    return found


def _assert_same(
    ranks: list[dict[str, Any]], reference: dict[str, Any], limit: float = 1e-13
) -> None:
    names = ("lm_loss", "grad_norm", "load_balancing_loss", "expert_imbalance")
    for mine, other in zip(ranks[0]["metrics"], reference["metrics"], strict=True):
        for name in names:
            assert math.isclose(mine[name], other[name], rel_tol=limit), name
    assert len(reference["metrics"]) == 3
    expected = assemble([reference["parts"]])
    found = assemble([rank["parts"] for rank in ranks])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).norm() / value.norm().clamp(min=1.0)
        assert float(error) < limit, name


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_same_numbers(
    nano_data: Path, tmp_path: Path, reference: dict[str, Any], name: str
) -> None:
    (found,) = with_run(recipe(nano_data, tmp_path, *STEPS, *CASES[name]), _train)
    _assert_same([found], reference)
    assert found["routing"] == reference["routing"], "counted once, however often computed"
    once = reference["calls"]
    assert found["calls"].keys() == once.keys()
    again = {part for part, count in found["calls"].items() if count > once[part]}
    assert again == AGAIN[name], found["calls"]
    for part in AGAIN[name] - {"norm"}:
        # Inside a MoE layer that is recomputed, its activation is so once more.
        times = 3 if (name, part) == ("all_modules", "moe_act") else 2
        assert found["calls"][part] == times * once[part], part


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("words", "world_size"),
    [
        ((*CASES["both_full"], PP), 2),
        # Several micro-batches are under way when the first is recomputed: each needs its own rows.
        ((*CASES["moe"], PP), 2),
        ((*CASES["both_full"], PP, *VPP_EP), 4),
        ((*OVERLAPPABLE, PP, *VPP_EP, "parallel.overlap_moe_expert_parallel_comm=true"), 4),
    ],
    ids=["full_pp2", "moe_pp2", "full_pp2_vpp2_ep2", "selective_overlap"],
)
def test_recompute_in_a_pipeline(
    nano_data: Path,
    tmp_path: Path,
    reference: dict[str, Any],
    words: tuple[str, ...],
    world_size: int,
) -> None:
    run_config = recipe(nano_data, tmp_path, *STEPS, *words)
    # The sums of a pipeline with replicas are of another order.
    _assert_same(with_run(run_config, _train, world_size), reference, limit=1e-11)


@pytest.mark.unit
def test_what_cannot_be_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense model has no expert activations; norms on a GPU need Transformer Engine."""
    from megatron_vlm.models.language import engine_config as module

    run = config(f"experts=null recompute=selective modules=[{','.join(MODULES)}]")
    layout = resolve_layout(run, 1)
    built = module.engine_config(run, layout)
    assert set(built.recompute_modules) == set(MODULES) - {"moe_act"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "transformer_engine_serves", lambda dtype: False)
    with pytest.raises(
        ConfigError, match=r"recompute\.language_modules holds layernorm.*remove it"
    ):
        module.engine_config(run, layout)


@pytest.mark.distributed
def test_latent_attention_and_prediction(nano_data: Path, tmp_path: Path) -> None:
    """Their own recomputing: attention's core, and the whole layer that predicts further ahead."""
    words = (*STEPS, *DEEPSEEK)
    (kept,) = with_run(recipe(nano_data, tmp_path / "kept", *words), _train)
    for name in ("core_attn", "language_full"):
        (found,) = with_run(recipe(nano_data, tmp_path / name, *words, *CASES[name]), _train)
        _assert_same([found], kept)
        assert found["routing"] == kept["routing"]
        for part in AGAIN[name] & {"core_attn", "router"}:
            assert found["calls"][part] == 2 * kept["calls"][part], part
