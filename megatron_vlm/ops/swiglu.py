"""SwiGLU of experts, weighted by their routing: silu(gate) * up * weight of the token."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

_CHUNK_ELEMENTS = 1 << 17
"""Elements of one core's temporaries: they stay in its cache instead of going through memory."""


def weighted_swiglu(gate_up: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """Gate, and weigh each row.

    Args:
        gate_up: `[tokens, 2 * width]`, the gates first.
        probs: `[tokens]` weights, in the router's precision.

    Returns:
        `[tokens, width]` in the type of `gate_up`; computed in the wider of the two.
    """
    return _WeightedSwiGLU.apply(gate_up, probs)


class _WeightedSwiGLU(torch.autograd.Function):
    """Keeps its inputs alone, and on a CPU goes over them a few rows at a time.

    Left to autograd, half precision would keep everything again in float32.
    """

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up, probs)
        work = torch.promote_types(gate_up.dtype, probs.dtype)
        width = gate_up.size(1) // 2
        result = gate_up.new_empty(gate_up.size(0), width)
        rows = _rows(gate_up, width)
        for both, weight, out in zip(
            gate_up.split(rows), probs.split(rows), result.split(rows), strict=True
        ):
            gate, up = both.to(work).chunk(2, dim=-1)
            torch.mul(F.silu(gate).mul_(up), weight.to(work).unsqueeze(-1), out=out)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate_up, probs = ctx.saved_tensors
        work = torch.promote_types(gate_up.dtype, probs.dtype)
        width = gate_up.size(1) // 2
        to_gate_up, to_probs = torch.empty_like(gate_up), torch.empty_like(probs)
        rows = _rows(gate_up, width)
        for both, weight, given, out, to_weight in zip(
            gate_up.split(rows),
            probs.split(rows),
            gradient.split(rows),
            to_gate_up.split(rows),
            to_probs.split(rows),
            strict=True,
        ):
            gate, up = both.to(work).chunk(2, dim=-1)
            given = given.to(work)
            sigmoid = gate.sigmoid()
            silu = gate * sigmoid
            to_weight.copy_((silu * up).mul_(given).sum(-1))
            # From here on the gradient of silu(gate) * up.
            given = given * weight.to(work).unsqueeze(-1)
            to_gate, to_up = out.chunk(2, dim=-1)
            torch.mul(silu, given, out=to_up)
            # With s the sigmoid, the derivative of silu is silu + s * (1 - silu).
            slope = (silu + sigmoid).addcmul_(sigmoid, silu, value=-1)
            torch.mul(slope, given.mul_(up), out=to_gate)
        return to_gate_up, to_probs


def _rows(gate_up: torch.Tensor, width: int) -> int:
    if gate_up.is_cuda:
        return max(1, gate_up.size(0))
    return max(1, _CHUNK_ELEMENTS * torch.get_num_threads() // width)
