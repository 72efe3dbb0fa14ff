"""One product per expert against a loop over single tokens in float64."""

from __future__ import annotations

import pytest
import torch

from megatron_vlm.ops.grouped_gemm import grouped_gemm
from megatron_vlm.ops.swiglu import weighted_swiglu

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2}
COUNTS = {
    "mixed": [3, 0, 7, 1, 0, 5],
    "one_expert": [9],
    "last_empty": [4, 0],
    "first_empty": [0, 4],
    "no_tokens": [0, 0, 0],
}


def _loop(tokens: torch.Tensor, weights: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Token by token and channel by channel."""
    experts = [expert for expert, count in enumerate(counts) for _ in range(count)]
    rows = [
        torch.stack([(token * channel).sum() for channel in weights[expert]])
        for token, expert in zip(tokens, experts, strict=True)
    ]
    # The sum keeps every weight in the graph, as the product must.
    return torch.stack(rows) if rows else weights.new_zeros(0, weights.size(1)) + weights.sum() * 0


def _compare(device: str, dtype: torch.dtype, counts: list[int]) -> None:
    torch.manual_seed(sum(counts))
    total, wide, narrow = sum(counts), 16, 8
    tokens = torch.randn(total, wide, device=device, dtype=dtype, requires_grad=True)
    weights = torch.randn(len(counts), narrow, wide, device=device, dtype=dtype, requires_grad=True)
    upper = torch.randn(total, narrow, device=device, dtype=dtype)
    found = grouped_gemm(tokens, weights, torch.tensor(counts))
    found.backward(upper)
    exact_tokens = tokens.detach().double().cpu().requires_grad_()
    exact_weights = weights.detach().double().cpu().requires_grad_()
    expected = _loop(exact_tokens, exact_weights, counts)
    expected.backward(upper.double().cpu())
    assert found.dtype == dtype and found.shape == (total, narrow)
    pairs = [
        (found, expected),
        (tokens.grad, exact_tokens.grad),
        (weights.grad, exact_weights.grad),
    ]
    for mine, exact in pairs:
        if exact is None:
            assert mine is not None and not mine.numel(), "tokens that do not exist"
            continue
        assert mine is not None
        scale = exact.detach().abs().max().clamp(min=1.0) if exact.numel() else 1.0
        error = (mine.detach().double().cpu() - exact.detach()).abs()
        assert error.numel() == 0 or float((error / scale).max()) < TOLERANCE[dtype]
    for expert, count in enumerate(counts):
        gradient = weights.grad[expert]  # type: ignore[index]
        assert bool((gradient == 0).all()) == (count == 0), "zero, not None or noise"


@pytest.mark.unit
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", COUNTS)
def test_products_and_gradients(name: str, dtype: torch.dtype) -> None:
    _compare("cpu", dtype, COUNTS[name])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", COUNTS)
def test_products_and_gradients_on_gpu(name: str, dtype: torch.dtype) -> None:
    _compare("cuda", dtype, COUNTS[name])


@pytest.mark.unit
def test_unwritten_memory_never_shows() -> None:
    """An expert without tokens gets zeros also where the gradient's memory held something else."""
    counts = torch.tensor([2, 0])
    for _ in range(20):
        rubbish = torch.full((2, 64, 64), float("nan"))
        del rubbish
        weights = torch.randn(2, 64, 64, requires_grad=True)
        grouped_gemm(torch.randn(2, 64), weights, counts).sum().backward()
        assert weights.grad is not None and bool((weights.grad[1] == 0).all())


@pytest.mark.unit
def test_gradient_checker_agrees() -> None:
    tokens = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 4, 3, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([2, 0, 3])
    assert torch.autograd.gradcheck(lambda x, w: grouped_gemm(x, w, counts), (tokens, weights))
    # Frozen on either side.
    assert torch.autograd.gradcheck(lambda x: grouped_gemm(x, weights.detach(), counts), (tokens,))
    assert torch.autograd.gradcheck(lambda w: grouped_gemm(tokens.detach(), w, counts), (weights,))


@pytest.mark.unit
@pytest.mark.parametrize("rows", [0, 1, 7, 700])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-14), (torch.float32, 1e-5)])
def test_weighted_swiglu(rows: int, dtype: torch.dtype, limit: float) -> None:
    """700 rows of 256 go over the chunk size."""
    torch.manual_seed(rows)
    width = 256
    gate_up = torch.randn(rows, 2 * width, dtype=dtype, requires_grad=True)
    probs = torch.rand(rows, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    upper = torch.randn(rows, width, dtype=dtype)
    found = weighted_swiglu(gate_up, probs)
    found.backward(upper)
    exact_input = gate_up.detach().double().requires_grad_()
    exact_probs = probs.detach().double().requires_grad_()
    gate, up = exact_input[:, :width], exact_input[:, width:]
    expected = gate / (1 + torch.exp(-gate)) * up * exact_probs[:, None]
    expected.backward(upper.double())
    assert found.dtype == dtype
    for mine, exact in (
        (found, expected),
        (gate_up.grad, exact_input.grad),
        (probs.grad, exact_probs.grad),
    ):
        assert mine is not None and exact is not None
        assert torch.allclose(mine.double(), exact, rtol=limit, atol=limit * 20)
