"""Grouped experts against a loop over tokens, in values and in every gradient."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_vlm.topology.layout import resolve_layout
from tests.topology.words import config

pytestmark = pytest.mark.unit

HIDDEN, WIDTH, EXPERTS = 64, 32, 4


def _group(size: int = 1, rank: int = 0) -> Any:
    return SimpleNamespace(size=lambda: size, rank=lambda: rank)


def _experts(text: str = "", tensor_size: int = 1) -> Any:
    from megatron_vlm.models.language.engine_config import engine_config
    from megatron_vlm.models.language.experts import GroupedExperts

    run = config(text)
    engine = engine_config(run, resolve_layout(run, 1))
    groups = SimpleNamespace(
        ep=_group(2, 1), expt_tp=_group(tensor_size, tensor_size - 1), expt_dp=_group(3, 2)
    )
    experts = GroupedExperts(EXPERTS, engine, groups)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in experts.parameters():
            weight.copy_(torch.randn_like(weight) * 0.2)
    return experts


def _plain(
    fc1: torch.Tensor,
    fc2: torch.Tensor,
    tokens: torch.Tensor,
    counts: list[int],
    probs: torch.Tensor,
) -> torch.Tensor:
    """fc2(silu(gate) * up) * weight, token by token."""
    experts = [expert for expert, count in enumerate(counts) for _ in range(count)]
    rows = []
    for number, expert in enumerate(experts):
        gate, up = fc1[expert, 0] @ tokens[number], fc1[expert, 1] @ tokens[number]
        inner = gate / (1 + torch.exp(-gate)) * up
        rows.append(probs[number] * (fc2[expert] @ inner))
    return torch.stack(rows)


@pytest.mark.parametrize("counts", [[3, 0, 5, 2], [0, 0, 0, 6], [1, 1, 1, 1]])
@pytest.mark.parametrize(
    "text", ["", "recompute=selective modules=[moe_act]"], ids=["kept", "recomputed"]
)
def test_against_the_loop(counts: list[int], text: str) -> None:
    experts = _experts(text)
    assert experts.recompute_activation == bool(text)
    total = sum(counts)
    tokens = torch.randn(total, HIDDEN, dtype=torch.float64, requires_grad=True)
    probs = torch.rand(total, dtype=torch.float64, requires_grad=True)
    upper = torch.randn(total, HIDDEN, dtype=torch.float64)
    out, bias = experts(tokens, torch.tensor(counts), probs)
    out.backward(upper)
    assert bias is None
    leaves = [
        value.detach().clone().requires_grad_()
        for value in (experts.linear_fc1, experts.linear_fc2, tokens, probs)
    ]
    expected = _plain(leaves[0], leaves[1], leaves[2], counts, leaves[3])
    expected.backward(upper)
    assert torch.allclose(out, expected, rtol=0, atol=1e-13)
    for mine, plain in zip(
        (experts.linear_fc1, experts.linear_fc2, tokens, probs), leaves, strict=True
    ):
        assert mine.grad is not None and plain.grad is not None
        assert torch.allclose(mine.grad, plain.grad, rtol=0, atol=1e-12)
    for expert, count in enumerate(counts):
        for weight in experts.parameters():
            assert bool((weight.grad[expert] == 0).all()) == (count == 0)


@pytest.mark.parametrize("text", ["", "recompute=selective modules=[moe_act]"])
def test_no_tokens_at_all(text: str) -> None:
    """A rank whose experts nobody chose still takes part in the reduction of gradients."""
    experts = _experts(text)
    tokens = torch.zeros(0, HIDDEN, dtype=torch.float64, requires_grad=True)
    probs = torch.zeros(0, dtype=torch.float64, requires_grad=True)
    out, _ = experts(tokens, torch.zeros(EXPERTS, dtype=torch.int64), probs)
    assert out.shape == (0, HIDDEN)
    out.sum().backward()
    for weight in experts.parameters():
        assert weight.grad is not None and bool((weight.grad == 0).all())


def test_parts_of_the_width_add_up() -> None:
    """Expert tensor parallelism: each rank has half of every expert's width."""
    whole = _experts()
    tokens, probs = torch.randn(6, HIDDEN, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    counts = torch.tensor([2, 0, 3, 1])
    expected, _ = whole(tokens, counts, probs)
    total = torch.zeros_like(expected)
    for rank in range(2):
        part = _experts("etp=1", tensor_size=2)
        assert part.linear_fc1.shape == (EXPERTS, 2, WIDTH // 2, HIDDEN)
        columns = slice(rank * WIDTH // 2, (rank + 1) * WIDTH // 2)
        with torch.no_grad():
            part.linear_fc1.copy_(whole.linear_fc1[:, :, columns])
            part.linear_fc2.copy_(whole.linear_fc2[:, :, columns])
        total += part(tokens, counts, probs)[0]
    assert torch.allclose(total, expected, atol=1e-13)


def test_shards() -> None:
    """Names, global shapes and offsets that any other layout can read."""
    experts = _experts(tensor_size=2)
    state = experts.sharded_state_dict("layer.", ((0, 3, 5),))
    fc1, fc2 = state["layer.linear_fc1"], state["layer.linear_fc2"]
    assert fc1.key == "layer.linear_fc1" and fc1.data is experts.linear_fc1
    # 5 layers, 2 expert ranks, 2 tensor ranks; this is layer 3, expert rank 1, tensor rank 1.
    assert fc1.global_shape == (5, 2 * EXPERTS, 2, WIDTH, HIDDEN)
    assert fc1.global_offset == (3, EXPERTS, 0, WIDTH // 2, 0)
    assert fc2.global_shape == (5, 2 * EXPERTS, HIDDEN, WIDTH)
    assert fc2.global_offset == (3, EXPERTS, 0, WIDTH // 2)
    assert fc1.replica_id == fc2.replica_id == (0, 0, 2)
    for weight in experts.parameters():
        assert weight.tensor_model_parallel, "else tensor ranks above 0 are left out of the norm"
