"""One matrix product per expert over tokens sorted by expert."""

from __future__ import annotations

from typing import Any

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
    return _ProductPerExpert.apply(tokens, weights, tokens_per_expert.tolist())


class _ProductPerExpert(torch.autograd.Function):
    """Every product writes straight into its part of the result.

    Left to autograd, the parts would be concatenated forwards, and backwards the weights'
    gradients stacked from transposed pieces, which took as long as a third of the products.
    """

    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, weights: torch.Tensor, counts: list[int]
    ) -> torch.Tensor:
        ctx.save_for_backward(tokens, weights)
        ctx.counts = counts
        result = tokens.new_empty(tokens.size(0), weights.size(1))
        for rows, weight, out in zip(
            tokens.split(counts), weights, result.split(counts), strict=True
        ):
            torch.mm(rows, weight.t(), out=out)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        tokens, weights = ctx.saved_tensors
        gradients = gradient.split(ctx.counts)
        to_tokens = to_weights = None
        if ctx.needs_input_grad[0]:
            to_tokens = torch.empty_like(tokens)
            for given, weight, out in zip(
                gradients, weights, to_tokens.split(ctx.counts), strict=True
            ):
                torch.mm(given, weight, out=out)
        if ctx.needs_input_grad[1]:
            to_weights = torch.empty_like(weights)
            for given, rows, out in zip(
                gradients, tokens.split(ctx.counts), to_weights, strict=True
            ):
                torch.mm(given.t(), rows, out=out)
        return to_tokens, to_weights, None


class _ContiguousGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, product: torch.Tensor) -> torch.Tensor:
        return product.view_as(product)

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.contiguous()
