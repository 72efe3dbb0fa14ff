"""One matrix product per expert over tokens sorted by expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def grouped_gemm(
    tokens: torch.Tensor, weights: torch.Tensor, tokens_per_expert: torch.Tensor
) -> torch.Tensor:
    """Multiply each expert's tokens by its weight.

    Args:
        tokens: `[total, in]`, the tokens of expert 0 first, then of expert 1, and so on.
        weights: `[experts, out, in]`.
        tokens_per_expert: `[experts]`, whole numbers that sum to `total`; may hold zeros.

    Returns:
        `[total, out]`. Every expert's weight takes part in the graph, also one without tokens.
    """
    on_gpu = tokens.is_cuda and tokens.dtype in (torch.bfloat16, torch.float32)
    if on_gpu and tokens.size(0) > 0:
        offsets = tokens_per_expert.to(tokens.device).cumsum(0).to(torch.int32)
        # torch's backward of grouped_mm refuses gradients with zero strides (seen in 2.13).
        product = F.grouped_mm(tokens, weights.transpose(-1, -2), offs=offsets)
        return _ContiguousGradient.apply(product)
    # On CPU one product per expert is as fast as grouped_mm, and knows float64.
    parts = tokens.split(tokens_per_expert.tolist())
    return torch.cat(
        [part @ weight.t() for part, weight in zip(parts, weights.unbind(0), strict=True)]
    )


class _ContiguousGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, product: torch.Tensor) -> torch.Tensor:
        return product.view_as(product)

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient.contiguous()
