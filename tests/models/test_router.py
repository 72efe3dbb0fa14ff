"""The router against its formulas, written as a loop over tokens and experts in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from megatron_vlm.topology.layout import resolve_layout
from tests.topology.words import config

pytestmark = pytest.mark.unit

HIDDEN, EXPERTS = 64, 8
ONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
ROW_IDS = [0] * 9 + [-1] * 3 + [1] * 5 + [-1] + [1] * 4 + [-1] * 2
"""24 tokens: row 0 with 9 real ones, row 1 with 9 in two segments."""


def _router(top_k: int = 2, seed: int = 0) -> Any:
    from megatron_vlm.models.language.engine_config import engine_config
    from megatron_vlm.models.language.router import SigmoidRouter

    run = config(f"model.language.moe_router_topk={top_k}")
    engine = engine_config(run, resolve_layout(run, 1))
    groups = SimpleNamespace(tp=ONE, cp=ONE, tp_cp=ONE, tp_dp_cp=ONE)
    router = SigmoidRouter(engine, pg_collection=groups)
    torch.manual_seed(seed)
    with torch.no_grad():
        router.weight.copy_(torch.randn(EXPERTS, HIDDEN) * 0.2)
        # Large enough to change choices, which only then differ from the scores' order.
        router.expert_bias.copy_(torch.randn(EXPERTS) * 0.3)
    return router


def _rows(row_ids: list[int], weight: float) -> Any:
    from megatron_vlm.models.language.packing import PackedRows

    count = max(row_ids) + 1
    return PackedRows(
        qkv_format="thd",
        row_ids=torch.tensor(row_ids),
        row_tokens=torch.tensor([row_ids.count(row) for row in range(count)]),
        balance_weight=weight,
    )


def _tokens(count: int, seed: int = 1) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(count, 1, HIDDEN, dtype=torch.float64)


class Plain(NamedTuple):
    """What the loop finds."""

    probs: torch.Tensor
    choices: list[set[int]]
    counts: list[int]
    balance: torch.Tensor


def _plain(
    weight: torch.Tensor, bias: list[float], tokens: torch.Tensor, row_ids: list[int], top_k: int
) -> Plain:
    """The formulas of the router's docstring, one scalar at a time; differentiable."""
    scaling = 2.5
    probs, choices, scores_of = [], [], []
    for token in tokens[:, 0]:
        scores = [1 / (1 + torch.exp(-(weight[e] * token).sum())) for e in range(EXPERTS)]
        ranked = sorted(
            range(EXPERTS), key=lambda e: float(scores[e].detach()) + bias[e], reverse=True
        )
        chosen = ranked[:top_k]
        total = sum(scores[e] for e in chosen) if top_k > 1 else 1.0
        zero = scores[0] * 0
        probs.append(
            torch.stack(
                [scores[e] / total * scaling if e in chosen else zero for e in range(EXPERTS)]
            )
        )
        choices.append(set(chosen))
        scores_of.append(scores)
    real = [t for t, row in enumerate(row_ids) if row >= 0]
    counts = [sum(e in choices[t] for t in real) for e in range(EXPERTS)]
    balance = weight.sum() * 0
    for row in range(max(row_ids) + 1):
        members = [t for t in real if row_ids[t] == row]
        size = len(members)
        for e in range(EXPERTS):
            share = sum(e in choices[t] for t in members) / size
            mean = sum(scores_of[t][e] / sum(scores_of[t]) for t in members) / size
            balance = balance + EXPERTS / top_k * share * mean
    return Plain(torch.stack(probs), choices, counts, balance)


def _both(top_k: int, balance_weight: float) -> tuple[Any, torch.Tensor, Any, Plain, torch.Tensor]:
    """A router after forward and backward; its probs and choices; the loop; its gradient."""
    router, tokens = _router(top_k), _tokens(len(ROW_IDS))
    router.rows = _rows(ROW_IDS, balance_weight)
    probs, choices = router(tokens)
    torch.manual_seed(2)
    upper = torch.randn_like(probs)
    (probs * upper).sum().backward()
    weight = router.weight.detach().clone().requires_grad_()
    plain = _plain(weight, router.expert_bias.tolist(), tokens, ROW_IDS, top_k)
    ((plain.probs * upper).sum() + balance_weight * plain.balance).backward()
    assert weight.grad is not None
    return router, probs, choices, plain, weight.grad


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("balance_weight", [0.0, 0.37])
def test_against_the_loop(top_k: int, balance_weight: float) -> None:
    router, probs, choices, plain, gradient = _both(top_k, balance_weight)
    assert probs.dtype == torch.float64 and choices.dtype == torch.bool
    assert [set(row.nonzero().flatten().tolist()) for row in choices] == plain.choices
    assert torch.allclose(probs, plain.probs, rtol=0, atol=1e-14)
    assert router.tokens_per_expert.tolist() == plain.counts
    assert sum(plain.counts) == top_k * 18
    if balance_weight:
        assert float(router.balance_loss) == pytest.approx(float(plain.balance), rel=1e-13)
    assert torch.allclose(router.weight.grad, gradient, rtol=1e-11, atol=1e-14)


def test_bias_changes_choices_and_not_weights() -> None:
    router, tokens = _router(), _tokens(24)
    with_bias = router(tokens)
    router.expert_bias.zero_()
    without = router(tokens)
    assert not torch.equal(with_bias[1], without[1])
    scores = torch.sigmoid(tokens[:, 0] @ router.weight.t())
    for probs, choices in (with_bias, without):
        chosen = scores * choices
        expected = 2.5 * chosen / chosen.sum(-1, keepdim=True)
        assert torch.allclose(probs, expected, atol=1e-14)
    assert not router.expert_bias.requires_grad


def test_balance_gradient_by_finite_differences() -> None:
    """The choices are held: they are constants of the loss, as its definition says."""
    router, tokens, weight = _router(), _tokens(len(ROW_IDS)), 0.9
    router.rows = _rows(ROW_IDS, weight)

    def loss() -> float:
        router.balance_loss.zero_()
        router(tokens)
        return float(router.balance_loss)

    probs, before = router(tokens)
    (probs * 0).sum().backward()
    step = 1e-6
    for expert, channel in ((0, 3), (5, 60), (7, 0)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                router.weight[expert, channel] += sign * step
            values.append(loss())
            assert torch.equal(router(tokens)[1], before)
            with torch.no_grad():
                router.weight[expert, channel] -= sign * step
        slope = weight * (values[0] - values[1]) / (2 * step)
        assert float(router.weight.grad[expert, channel]) == pytest.approx(slope, rel=1e-5)


def test_even_routing_has_a_balance_loss_of_one() -> None:
    router = _router()
    with torch.no_grad():
        router.weight.zero_()
        router.expert_bias.zero_()
    # All scores alike; tokens take the experts in turn through the bias.
    total = 0.0
    for turn in range(4):
        bias = torch.zeros(EXPERTS)
        bias[[2 * turn, 2 * turn + 1]] = 1.0
        router.expert_bias.copy_(bias)
        router.rows = _rows([0], 1.0)
        router(_tokens(1))
        total += float(router.balance_loss)
        router.balance_loss.zero_()
    assert total / 4 == pytest.approx(1.0, rel=1e-12)
    assert router.tokens_per_expert.tolist() == [1.0] * 8


def test_padding_takes_no_part() -> None:
    """Whatever stands in padding, counts, balance loss and its gradient are the same."""
    found = []
    for seed in (3, 4):
        router, tokens = _router(), _tokens(len(ROW_IDS))
        padding = torch.tensor(ROW_IDS) < 0
        tokens[padding] = _tokens(int(padding.sum()), seed) * 10
        router.rows = _rows(ROW_IDS, 1.0)
        probs, _ = router(tokens)
        # The task's own gradient of padding is zero: no token looks at it.
        probs[~padding].sum().backward()
        found.append((router.tokens_per_expert, router.balance_loss, router.weight.grad))
    for mine, other in zip(*found, strict=True):
        assert torch.equal(mine, other)
    assert float(found[0][0].sum()) == 2 * 18


def test_all_padding() -> None:
    router = _router()
    router.rows = _rows([0, 0, -1, -1], 1.0)
    router.rows.row_ids = torch.full((4,), -1)
    router.rows.row_tokens = torch.zeros(1, dtype=torch.int64)
    probs, _ = router(_tokens(4))
    (probs * 0).sum().backward()
    assert float(router.tokens_per_expert.sum()) == 0 and float(router.balance_loss) == 0
    assert bool((router.weight.grad == 0).all())


def test_rows_together_as_one_by_one() -> None:
    """The micro-batch size changes nothing: two rows at once, or each in a call of its own."""
    tokens = _tokens(len(ROW_IDS))
    together = _router()
    together.rows = _rows(ROW_IDS, 0.25)
    probs, _ = together(tokens)
    (probs**2).sum().backward()
    single = _router()
    for part, row_ids in ((tokens[:12], ROW_IDS[:12]), (tokens[12:], ROW_IDS[12:])):
        single.rows = _rows([min(row, 0) for row in row_ids], 0.25)
        probs, _ = single(part)
        (probs**2).sum().backward()
    assert torch.equal(together.tokens_per_expert, single.tokens_per_expert)
    assert float(together.balance_loss) == pytest.approx(float(single.balance_loss), rel=1e-13)
    assert torch.allclose(together.weight.grad, single.weight.grad, rtol=1e-12, atol=1e-15)


def test_nothing_is_counted_without_gradients() -> None:
    router = _router()
    router.rows = _rows(ROW_IDS, 1.0)
    with torch.no_grad():
        router(_tokens(24))
    router.eval()
    router(_tokens(24))
    assert float(router.tokens_per_expert.sum()) == 0 and float(router.balance_loss) == 0
    router.train()
    router.rows = None
    router(_tokens(24))
    assert float(router.tokens_per_expert.sum()) == 0


def test_recomputed_forward_counts_once() -> None:
    from megatron.core.tensor_parallel.random import checkpoint, get_cuda_rng_tracker

    get_cuda_rng_tracker()
    results = []
    for recompute in (False, True):
        router, tokens = _router(), _tokens(len(ROW_IDS)).requires_grad_()
        router.rows = _rows(ROW_IDS, 0.5)
        run = (
            (lambda x, r=router: checkpoint(lambda y: r(y)[0], False, x))
            if recompute
            else (lambda x, r=router: r(x)[0])
        )
        (run(tokens) ** 2).sum().backward()
        results.append(
            (router.tokens_per_expert, router.balance_loss, router.weight.grad, tokens.grad)
        )
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)


def test_scores_are_at_least_float32() -> None:
    router = _router()
    router.weight.data = router.weight.data.bfloat16()
    tokens = _tokens(24).bfloat16()
    probs, _ = router(tokens)
    assert probs.dtype == torch.float32
    logits = router.gating(tokens)
    exact = tokens.double() @ router.weight.double().t()
    assert torch.allclose(logits.double(), exact, atol=1e-5), "not a product in bfloat16"


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.25])
def test_bias_moves_by_the_rate_towards_balance(rate: float) -> None:
    from megatron_vlm.engine.routers import reset_router_statistics, routers, update_bias

    first, second = _router(seed=0), _router(seed=5)
    chunks: Any = [torch.nn.ModuleList([first]), torch.nn.Sequential(second)]
    assert routers(chunks) == [first, second]
    first.tokens_per_expert.copy_(torch.tensor([8.0, 0, 4, 4, 4, 4, 5, 3]))
    second.tokens_per_expert.fill_(4.0)
    before = first.expert_bias.clone(), second.expert_bias.clone()
    update_bias(chunks, rate)
    sign = torch.tensor([-1.0, 1, 0, 0, 0, 0, -1, 1])
    assert torch.allclose(first.expert_bias - before[0], rate * sign, rtol=0, atol=1e-7)
    assert torch.equal(second.expert_bias, before[1]), "balanced already"
    # Overloaded experts become less likely, so repeated updates spread the load.
    if rate:
        tokens = _tokens(512)
        spread = []
        for _ in range(40):
            reset_router_statistics(chunks)
            first.rows = _rows([0] * 512, 0.0)
            first(tokens)
            load = first.tokens_per_expert
            spread.append(float(load.max() / load.mean()))
            update_bias(chunks, 0.02)
        assert spread[-1] < 1.3 < spread[0] and math.isfinite(spread[0])
    reset_router_statistics(chunks)
    assert float(first.tokens_per_expert.sum()) == 0 and float(second.balance_loss) == 0
