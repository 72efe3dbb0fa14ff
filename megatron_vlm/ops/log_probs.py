"""Log-probabilities of chosen tokens from logits split over tensor-parallel ranks by vocabulary.

In the precision of the logits, at least float32: float64 proofs stay float64, which the engine's
own cross entropy (always float32) does not allow.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def token_log_probs(
    logits: torch.Tensor, targets: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    """Log-probability of each target token.

    Args:
        logits: `[..., vocab / tensor ranks]`, this rank's slice of the vocabulary.
        targets: `[...]` token ids of the whole vocabulary.
        group: the tensor-parallel group that shares the vocabulary.

    Returns:
        `[...]` log-probabilities, the same on every rank of `group`.
    """
    return _TokenLogProbs.apply(logits, targets, group)


class _TokenLogProbs(torch.autograd.Function):
    """Keeps the logits and two numbers a token; probabilities exist a few rows at a time.

    Whole, in float32, they would be the largest tensor of a training step.
    """

    @staticmethod
    def forward(ctx, logits, targets, group):  # type: ignore[no-untyped-def]
        size, rank = group.size(), group.rank()
        work = torch.promote_types(logits.dtype, torch.float32)
        width = logits.size(-1)
        scores = logits.reshape(-1, width)
        peak = scores.amax(dim=-1, keepdim=True).to(work)
        if size > 1:
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
        total = torch.empty_like(peak)
        rows = _rows(scores)
        for part, highest, out in zip(
            scores.split(rows), peak.split(rows), total.split(rows), strict=True
        ):
            torch.sum((part - highest).exp_(), dim=-1, keepdim=True, out=out)
        local = targets.reshape(-1, 1) - rank * width
        mine = (local >= 0) & (local < width)
        index = local.clamp(0, width - 1)
        chosen = (scores.gather(-1, index) - peak).masked_fill(~mine, 0)
        if size > 1:
            sums = torch.stack([chosen, total])
            dist.all_reduce(sums, group=group)
            chosen, total = sums.unbind(0)
        ctx.save_for_backward(logits, peak, total, index, mine)
        return (chosen - total.log()).view(targets.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        logits, peak, total, index, mine = ctx.saved_tensors
        result = torch.empty_like(logits, memory_format=torch.contiguous_format)
        scores, gradient = logits.reshape(-1, logits.size(-1)), gradient.reshape(-1, 1)
        rows = _rows(scores)
        for part, highest, factor, place, own, out in zip(
            scores.split(rows),
            peak.split(rows),
            (-gradient / total).split(rows),
            index.split(rows),
            (gradient * mine).split(rows),
            result.view_as(scores).split(rows),
            strict=True,
        ):
            out.copy_((part - highest).exp_().mul_(factor).scatter_add_(-1, place, own))
        return result, None, None


def _rows(scores: torch.Tensor) -> int:
    # On CPU a part stays in the caches; on a GPU it only has to be much less than all.
    elements = 1 << 25 if scores.is_cuda else torch.get_num_threads() << 18
    return max(1, elements // scores.size(-1))
