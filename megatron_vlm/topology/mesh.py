"""The two meshes as one frozen object: process groups of the language model and of the encoder.

The language mesh is megatron-core's (tensor, context, data, pipeline; experts beside). The
vision mesh is data parallel over every rank: its group collection has the world as its data
parallel group and groups of one everywhere else. The engine's default groups would be wrong for
the encoder: its gradients and shards would be reduced over the language model's replicas only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_vlm.platform import install

# Here and not for the whole room: layouts are checked without torch.
install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402

from megatron_vlm.topology.layout import Coordinates, Layout  # noqa: E402


@dataclass(frozen=True)
class Topology:
    """This rank's place and groups, passed to whoever needs them."""

    layout: Layout
    rank: int
    device: torch.device
    coordinates: Coordinates
    language: ProcessGroupCollection
    vision: ProcessGroupCollection
    features_out: dist.ProcessGroup
    """The world, for features on their way to where they are embedded."""
    features_back: dist.ProcessGroup
    """The world, for their gradients."""

    @property
    def embeds_tokens(self) -> bool:
        """Whether this rank's stage turns tokens into the decoder's input."""
        return self.coordinates.pp == self.layout.embedding_stage

    @property
    def computes_loss(self) -> bool:
        """Whether this rank's stage ends in the loss."""
        return self.coordinates.pp == self.layout.loss_stage

    @property
    def reports_loss(self) -> bool:
        """Whether this rank's losses count in sums over the world.

        On the loss stage every tensor-parallel rank holds the same values; each context-parallel
        rank holds its own tokens'.
        """
        return self.computes_loss and self.coordinates.tp == 0


def build_topology(layout: Layout, device: torch.device) -> Topology:
    """Make the process groups of `layout`; every rank of the world calls this once."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        create_gloo_process_groups=False,
    )
    rank = dist.get_rank()
    place = layout.coordinates(rank)
    found = Coordinates(
        tp=parallel_state.get_tensor_model_parallel_rank(),
        cp=parallel_state.get_context_parallel_rank(),
        dp=parallel_state.get_data_parallel_rank(),
        pp=parallel_state.get_pipeline_model_parallel_rank(),
    )
    if found != place:
        # Every plan relies on this arithmetic: a different order would exchange wrong pictures.
        raise RuntimeError(f"the engine placed rank {rank} at {found}, expected {place}")
    return Topology(
        layout=layout,
        rank=rank,
        device=device,
        coordinates=place,
        language=ProcessGroupCollection.use_mpu_process_groups(),
        vision=_vision_groups(rank, layout.world_size),
        features_out=_messages(device),
        features_back=_messages(device),
    )


def destroy_topology() -> None:
    """Forget the engine's groups, so that another layout can be built in this process."""
    parallel_state.destroy_model_parallel()


def _messages(device: torch.device) -> dist.ProcessGroup:
    """A group of the whole world for messages between some of it at a time."""
    group = dist.new_group()
    # NCCL wants that all members take part in a group's first operation.
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    return group


def _vision_groups(rank: int, world_size: int) -> ProcessGroupCollection:
    world = dist.group.WORLD
    # Only the member itself takes part: a group a rank would cost every rank a barrier each.
    alone = dist.new_group([rank], use_local_synchronization=True) if world_size > 1 else world
    groups = ProcessGroupCollection()
    for name in ("dp", "dp_cp", "intra_dp_cp", "intra_dist_opt"):
        setattr(groups, name, world)
    for name in ("tp", "pp", "cp", "ep", "mp", "tp_ep_pp", "expt_tp", "expt_dp", "intra_expt_dp"):
        setattr(groups, name, alone)
    return groups
