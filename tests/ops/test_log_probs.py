"""Log-probabilities over a vocabulary split between ranks, against a plain softmax in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_vlm.ops import log_probs
from megatron_vlm.ops.log_probs import token_log_probs
from megatron_vlm.platform import World, start_distributed, stop
from tests.ranks import run_ranks

ONE: Any = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
VOCABULARY = 24
LIMITS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2}


def _inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, among them huge, equal and far apart ones; targets on every rank's slice."""
    torch.manual_seed(3)
    logits = torch.randn(2, 13, VOCABULARY, dtype=torch.float64) * 3
    logits[0, 0] += 5000
    logits[0, 1] -= 5000
    logits[0, 2] = 1.0
    logits[0, 3, 5] = 300
    logits[0, 4, :12] = -1e6
    targets = torch.arange(26).view(2, 13) * 7 % VOCABULARY
    upper = torch.randn(2, 13, dtype=torch.float64)
    return logits.to(dtype), targets, upper


def _plain(
    logits: torch.Tensor, targets: torch.Tensor, upper: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula, and its gradient by hand: one at the target minus the probabilities."""
    exact = logits.double()
    peak = exact.amax(-1, keepdim=True)
    normal = (exact - peak).exp().sum(-1, keepdim=True).log() + peak
    values = (exact - normal).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    onehot = torch.nn.functional.one_hot(targets, VOCABULARY)
    return values, (onehot - (exact - normal).exp()) * upper.unsqueeze(-1)


def _check(values: torch.Tensor, gradient: torch.Tensor, dtype: torch.dtype) -> None:
    expected, by_hand = _plain(*_inputs(dtype))
    # The loss of half-precision logits is computed in float32.
    assert values.dtype == torch.promote_types(dtype, torch.float32) and gradient.dtype == dtype
    limit = LIMITS[dtype]
    loose = LIMITS[values.dtype]
    assert torch.allclose(values.double(), expected, rtol=loose, atol=20 * loose)
    assert torch.allclose(gradient.double(), by_hand, rtol=limit, atol=limit)


@pytest.mark.unit
@pytest.mark.parametrize("dtype", LIMITS)
def test_one_rank(dtype: torch.dtype) -> None:
    logits, targets, upper = _inputs(dtype)
    logits.requires_grad_()
    values = token_log_probs(logits, targets, ONE)
    values.backward(upper.to(values.dtype))
    assert logits.grad is not None
    _check(values.detach(), logits.grad, dtype)


@pytest.mark.unit
def test_in_parts_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are gone over a few at a time: however many, the result is the same."""
    logits, targets, upper = _inputs(torch.float64)
    found = []
    for rows in (1, 3, 1000):
        monkeypatch.setattr(log_probs, "_rows", lambda scores, rows=rows: rows)
        leaf = logits.clone().requires_grad_()
        values = token_log_probs(leaf, targets, ONE)
        values.backward(upper)
        found.append((values.detach(), leaf.grad))
    for values, gradient in found[1:]:
        assert torch.equal(values, found[0][0]) and torch.equal(gradient, found[0][1])


@pytest.mark.unit
def test_no_tokens() -> None:
    logits = torch.zeros(1, 0, VOCABULARY, requires_grad=True)
    values = token_log_probs(logits, torch.zeros(1, 0, dtype=torch.int64), ONE)
    values.sum().backward()
    assert values.shape == (1, 0) and logits.grad is not None


def _on_rank(world: World, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    start_distributed(world)
    logits, targets, upper = _inputs(dtype)
    mine = logits.chunk(world.world_size, dim=-1)[world.rank].clone().requires_grad_()
    group = dist.group.WORLD
    assert group is not None
    values = token_log_probs(mine, targets, group)
    # Every rank goes on to the same loss, as in training.
    values.backward(upper.to(values.dtype))
    stop()
    assert mine.grad is not None
    return values.detach(), mine.grad


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dtype", LIMITS)
def test_split_vocabulary(size: int, dtype: torch.dtype) -> None:
    ranks = run_ranks(size, _on_rank, dtype)
    for values, _ in ranks:
        assert torch.equal(values, ranks[0][0]), "the same on every rank"
    _check(ranks[0][0], torch.cat([gradient for _, gradient in ranks], dim=-1), dtype)
