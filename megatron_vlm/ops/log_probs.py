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
    @staticmethod
    def forward(ctx, logits, targets, group):  # type: ignore[no-untyped-def]
        size, rank = group.size(), group.rank()
        work = torch.promote_types(logits.dtype, torch.float32)
        shifted = logits.to(work)
        width = shifted.size(-1)
        peak = shifted.amax(dim=-1)
        if size > 1:
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
        shifted = shifted - peak.unsqueeze(-1)
        local = targets - rank * width
        mine = (local >= 0) & (local < width)
        index = local.clamp(0, width - 1).unsqueeze(-1)
        chosen = shifted.gather(-1, index).squeeze(-1).masked_fill(~mine, 0)
        weights = shifted.exp_()
        total = weights.sum(dim=-1)
        if size > 1:
            sums = torch.stack([chosen, total])
            dist.all_reduce(sums, group=group)
            chosen, total = sums.unbind(0)
        ctx.save_for_backward(weights.div_(total.unsqueeze(-1)), index, mine)
        ctx.dtype = logits.dtype
        return chosen - total.log()

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        probabilities, index, mine = ctx.saved_tensors
        result = probabilities * (-gradient).unsqueeze(-1)
        result.scatter_add_(-1, index, (gradient * mine).unsqueeze(-1))
        return result.to(ctx.dtype), None, None
