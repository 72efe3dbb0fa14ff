"""The router of dots.llm1 and DeepSeek-V3: sigmoid gate, bias-corrected top-k, balance by row.

Ours rather than the engine's TopKRouter, because there padding cannot be kept out of the bias and
the balance loss, the balance loss of packed rows depends on the micro-batch size, its weight on
the layout, and the bias moves also on steps that the optimizer skips.

Semantics (dots.llm1 report, section on load balancing; DeepSeek-V3, equations 16-20): scores are
sigmoids; the experts of a token are the top k of score + bias; their weights are the unbiased
scores, normalised to sum one and scaled. With groups, a token first keeps the best groups, each
scored by the sum of its two best experts (the engine sums its top k / groups: another choice
wherever that is not 2). For a row of T real tokens and E experts, with scores
normalised over experts, the balance loss is sum over e of [E/k * share of tokens that chose e]
* [mean score of e]: 1 when balanced. It is averaged over the rows of the step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.moe.router import Router

from megatron_vlm.models.language.packing import PackedRows

_EPSILON = 1e-20  # as in the released modelling code: keeps a sum of zeros finite


class SigmoidRouter(Router):
    """Chooses experts, counts the choices, and attaches the balance loss.

    `rows` is set by the layer before each call. `tokens_per_expert` and `balance_loss` add up
    over the micro-batches of a step, on this rank's real tokens only.
    """

    rows: PackedRows | None = None

    def __init__(self, config: Any, pg_collection: Any = None) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        experts, device = config.num_moe_experts, self.weight.device
        self.top_k = config.moe_router_topk
        self.scaling = config.moe_router_topk_scaling_factor or 1.0
        self.groups: tuple[int, int] | None = None
        if config.moe_router_num_groups:
            self.groups = (config.moe_router_num_groups, config.moe_router_group_topk)
        zeros = torch.zeros(experts, dtype=torch.float32, device=device)
        self.register_buffer("expert_bias", zeros)
        self.register_buffer("tokens_per_expert", zeros.clone(), persistent=False)
        balance = torch.zeros((), dtype=torch.float64, device=device)
        self.register_buffer("balance_loss", balance, persistent=False)

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Gate scores before the sigmoid, in float32 or finer."""
        work = torch.promote_types(self.weight.dtype, torch.float32)
        return F.linear(input.to(work), self.weight.to(work))

    def routing(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and choices `[tokens, experts]` from logits of the same shape."""
        scores = torch.sigmoid(logits)
        biased = scores.detach() + self.expert_bias
        if self.groups is not None:
            biased = self._within_groups(biased, *self.groups)
        chosen = torch.topk(biased, self.top_k, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if self.top_k > 1:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + _EPSILON)
        weights = weights * self.scaling
        probs = torch.zeros_like(scores).scatter(-1, chosen, weights)
        choices = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)
        if self.training and torch.is_grad_enabled() and self.rows is not None:
            # Not under no_grad: a recomputed layer would count twice.
            probs = self._balance(probs, scores, choices, self.rows)
        return probs, choices

    @staticmethod
    def _within_groups(biased: torch.Tensor, groups: int, chosen: int) -> torch.Tensor:
        """Scores with all but the `chosen` best groups out of reach."""
        grouped = biased.unflatten(-1, (groups, -1))
        best = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(chosen, dim=-1).indices
        outside = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, False)
        return grouped.masked_fill(outside.unsqueeze(-1), -torch.inf).flatten(-2)

    def forward(
        self, input: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route `[tokens, 1, hidden]`; padding is known from `rows`, not from `padding_mask`."""
        logits = self.gating(input)
        return self.routing(logits.view(-1, logits.size(-1)))

    def _balance(
        self,
        probs: torch.Tensor,
        scores: torch.Tensor,
        choices: torch.Tensor,
        rows: PackedRows,
    ) -> torch.Tensor:
        row_ids, row_tokens = rows.row_ids, rows.row_tokens
        assert row_ids is not None and row_tokens is not None
        if row_ids.size(0) != scores.size(0):
            # Sequence parallelism: this tensor rank has one contiguous part of the tokens.
            row_ids = row_ids.chunk(self.tp_group.size())[self.tp_group.rank()]
        real = row_ids >= 0
        counted = (choices & real.unsqueeze(-1)).to(scores.dtype)
        self.tokens_per_expert += counted.detach().sum(dim=0)
        shares = scores / (scores.sum(dim=-1, keepdim=True) + _EPSILON)
        shares = shares * real.unsqueeze(-1)
        index = row_ids.clamp(min=0)
        count_rows, experts = row_tokens.size(0), scores.size(-1)
        per_row = scores.new_zeros(count_rows, experts)
        chosen = per_row.index_add(0, index, counted).detach()
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(chosen, group=self.tp_cp_group)
        score = per_row.index_add(0, index, shares)
        tokens = row_tokens.to(scores.dtype).clamp(min=1).unsqueeze(-1)
        frequency = chosen / tokens * (experts / self.top_k)
        loss = (frequency * (score / tokens)).sum()
        self.balance_loss += loss.detach()
        return _AttachLoss.apply(probs, loss * rows.balance_weight)


class _AttachLoss(torch.autograd.Function):
    """Add a loss to the graph at an activation: its gradient is one, whatever comes from above."""

    @staticmethod
    def forward(ctx, activation, loss):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(loss)
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        (loss,) = ctx.saved_tensors
        return gradient, torch.ones_like(loss)
