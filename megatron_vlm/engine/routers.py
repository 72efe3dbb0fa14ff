"""Statistics of a step's routing, and the bias update that balances experts without a loss."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_vlm.config.schema import RunConfig
from megatron_vlm.models.language.model import LanguageModel
from megatron_vlm.models.language.router import SigmoidRouter
from megatron_vlm.topology.mesh import Topology


def routers(chunks: list[LanguageModel]) -> list[SigmoidRouter]:
    """The routers of this rank's layers, in order."""
    return [
        module
        for chunk in chunks
        for module in chunk.modules()
        if isinstance(module, SigmoidRouter)
    ]


def reset_router_statistics(chunks: list[LanguageModel]) -> None:
    """Forget counts and balance losses of earlier steps."""
    for router in routers(chunks):
        router.tokens_per_expert.zero_()
        router.balance_loss.zero_()


def collect_router_statistics(
    chunks: list[LanguageModel], topology: Topology, config: RunConfig, predicts_ahead: bool
) -> tuple[float | None, float | None]:
    """Mean balance loss (1 is balanced) and mean of max over mean expert load, over all layers.

    Sums the routers' token counts over the ranks that share a layer, in place: `update_bias`
    relies on it. A layer of multi-token prediction counts where it is trained (`predicts_ahead`).
    Returns (None, None) for a dense model.
    """
    language = config.model.language
    layers = sum(language.moe_layer_freq)
    if predicts_ahead:
        layers += language.moe_layer_freq[-1] * (language.mtp_num_layers or 0)
    if not layers:
        return None, None
    mine = routers(chunks)
    totals = torch.zeros(2, dtype=torch.float64, device=topology.device)
    group = topology.language.tp_dp_cp
    if mine:
        counts = torch.stack([router.tokens_per_expert for router in mine]).double()
        dist.all_reduce(counts, group=group)
        for router, summed in zip(mine, counts, strict=True):
            router.tokens_per_expert.copy_(summed)
        means = counts.mean(dim=-1).clamp(min=1e-9)
        totals[0] = torch.stack([router.balance_loss for router in mine]).sum()
        # Every rank of the group holds the same counts now.
        totals[1] = (counts.amax(dim=-1) / means).sum() / group.size()
    dist.all_reduce(totals)
    rows = config.training.global_batch_size
    return float(totals[0] / (layers * rows)), float(totals[1] / layers)


@torch.no_grad()
def update_bias(chunks: list[LanguageModel], rate: float) -> None:
    """Move every expert's bias by `rate` towards a balanced load.

    bias += rate * sign(mean load - load), with the counts that `collect_router_statistics` has
    summed. Called only when the optimizer took its step, so a skipped step leaves no trace.
    """
    for router in routers(chunks):
        load = router.tokens_per_expert
        router.expert_bias += rate * torch.sign(load.mean() - load)
