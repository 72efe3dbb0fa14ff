"""What is trained for: named losses, each with its own denominator. The engine knows no other.

An objective sees the last stage's output of each micro-batch and returns sums; the engine divides
each by its denominator over the whole step and adds them by their weights. It may run further
forwards before the pipeline (`before_step`), with the model being trained or a frozen reference,
and keep what they found in each micro-batch's `extras`. Samples made of several segments (a
preferred and a rejected answer) share a micro-batch; `segment_sums` adds up over each segment,
across context-parallel ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist

from megatron_vlm.config.model_schema import ModelConfig
from megatron_vlm.engine.microbatch import MicroBatch
from megatron_vlm.errors import ConfigError
from megatron_vlm.ops.log_probs import token_log_probs
from megatron_vlm.topology.mesh import Topology

if TYPE_CHECKING:
    from megatron_vlm.engine.step import TrainStep


class Objective(ABC):
    """Named losses over packed micro-batches."""

    loss_weights: dict[str, float]
    """Each loss by name, with its weight in the total. The names are keys of the metrics."""
    output: Literal["logits", "hidden"] = "logits"
    """What the last stage hands to `losses`."""
    needs_reference: bool = False
    """Whether a frozen copy of the starting model is kept for `before_step`."""
    auxiliary: frozenset[str] = frozenset()
    """Losses that help training and are no part of what validation reports as its loss."""
    predicts_ahead: bool = False
    """Whether `losses` also gets the logits of the token after the next, as `ahead`."""

    def __init__(self, topology: Topology, model: ModelConfig) -> None:
        """Made once a run.

        Args:
            topology: this rank's place.
            model: what is trained.
        """
        self.topology, self.model = topology, model

    def before_step(  # noqa: B027 - most objectives have nothing to run first
        self, step: TrainStep, micro_batches: list[MicroBatch]
    ) -> None:
        """Run further forwards; called on every rank, before the pipeline of a step."""

    @abstractmethod
    def counts(self, batch: MicroBatch) -> dict[str, torch.Tensor]:
        """This rank's share of each loss's denominator; asked on ranks that report losses.

        Shares are summed over replicas and context-parallel ranks.
        """

    @abstractmethod
    def losses(
        self, output: torch.Tensor, batch: MicroBatch, ahead: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """This rank's sum of each loss, differentiable; asked on the loss stage.

        Args:
            output: what `output` names.
            batch: the micro-batch.
            ahead: logits of the token after the next, if `predicts_ahead`.
        """


class NextToken(Objective):
    """Cross-entropy of the next token on answer tokens, averaged over all of them in the step.

    Of a model with multi-token prediction also that of the token after it, as `mtp_loss`.
    """

    auxiliary = frozenset({"mtp_loss"})

    def __init__(self, topology: Topology, model: ModelConfig) -> None:
        super().__init__(topology, model)
        self.loss_weights = {"lm_loss": 1.0}
        self.predicts_ahead = model.language.mtp_num_layers is not None
        if self.predicts_ahead:
            self.loss_weights["mtp_loss"] = model.language.mtp_loss_scaling_factor

    def counts(self, batch: MicroBatch) -> dict[str, torch.Tensor]:
        """Answer tokens of this rank."""
        assert batch.loss_mask is not None
        counts = {"lm_loss": batch.loss_mask.sum()}
        if batch.ahead is not None:
            counts["mtp_loss"] = batch.ahead.loss_mask.sum()
        return counts

    def losses(
        self, output: torch.Tensor, batch: MicroBatch, ahead: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Summed negative log-likelihood of this rank's answer tokens."""
        assert batch.loss_mask is not None
        log_probs = label_log_probs(output, batch, self.topology)
        losses = {"lm_loss": -(log_probs * batch.loss_mask).sum()}
        if ahead is not None and batch.ahead is not None:
            log_probs = token_log_probs(ahead, batch.ahead.labels, self.topology.language.tp)
            losses["mtp_loss"] = -(log_probs * batch.ahead.loss_mask).sum()
        return losses


def label_log_probs(logits: torch.Tensor, batch: MicroBatch, topology: Topology) -> torch.Tensor:
    """Log-probability of each label: `[1, tokens / cp]` from `[1, tokens / cp, vocab / tp]`."""
    assert batch.labels is not None
    return token_log_probs(logits, batch.labels, topology.language.tp)


def segment_sums(values: torch.Tensor, batch: MicroBatch, topology: Topology) -> torch.Tensor:
    """Sum `[1, tokens / cp]` over each segment of the micro-batch: `[segments]`, on every rank.

    The gradient of a sum reaches every token of its segment, on whichever context-parallel rank.
    """
    sums = values.new_zeros(batch.num_segments)
    sums = sums.index_add(0, batch.segment_ids, values.flatten())
    return _SumOverRanks.apply(sums, topology.language.cp) if topology.layout.cp > 1 else sums


class _SumOverRanks(torch.autograd.Function):
    # Each context rank goes on to compute the same loss of the whole segment. A rank's loss is
    # counted once (on rank 0 of the group, see `counted_once`), so gradients are summed too.
    @staticmethod
    def forward(ctx, values, group):  # type: ignore[no-untyped-def]
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


def counted_once(value: torch.Tensor, topology: Topology) -> torch.Tensor:
    """A loss that every context-parallel rank computes in full: kept on the first, zero elsewhere.

    Multiplies instead of replacing, so that every rank keeps its part of the graph and its
    collectives in the backward pass.
    """
    return value if topology.coordinates.cp == 0 else value * 0


_REGISTRY: dict[str, Callable[[Topology, ModelConfig], Objective]] = {"next_token": NextToken}


def register_objective(name: str, build: Callable[[Topology, ModelConfig], Objective]) -> None:
    """Make an objective known as `training.objective`."""
    _REGISTRY[name] = build


def build_objective(name: str, topology: Topology, model: ModelConfig) -> Objective:
    """The objective registered under `name`.

    Raises:
        ConfigError: no such objective.
    """
    if name not in _REGISTRY:
        raise ConfigError(
            f"training.objective {name!r} is not known; expected one of: {', '.join(_REGISTRY)}"
        )
    return _REGISTRY[name](topology, model)
