"""What feeds a run: its loaders, and the log of what they could not read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_vlm.data.balance import EncoderCost
from megatron_vlm.data.decoders import PictureDecoder
from megatron_vlm.data.loader import LoadedStep, RankView, StepLoader
from megatron_vlm.data.rows import Cursor
from megatron_vlm.data.sharing import Sharing
from megatron_vlm.engine.agreement import agree_on_failures
from megatron_vlm.topology.layout import Layout
from megatron_vlm.topology.mesh import Topology
from megatron_vlm.training.console import logger
from megatron_vlm.training.datasets import OpenData, num_workers

if TYPE_CHECKING:
    from megatron_vlm.config.schema import RunConfig


def share_out(config: RunConfig, layout: Layout, cost: EncoderCost) -> Sharing:
    """How pictures are shared out over the ranks of a layout."""
    settings, world = config.vision_parallel, layout.world_size
    vision = config.model.vision
    places = [layout.coordinates(rank) for rank in range(world)]
    first_stage = settings.placement == "first_stage"
    return Sharing(
        replica_of_rank=tuple(place.dp for place in places),
        cost=cost,
        method=settings.balance,
        groups=layout.dp if first_stage else world // (settings.balance_group_size or world),
        encodes=tuple(p.pp == layout.embedding_stage for p in places) if first_stage else None,
        max_parts=settings.max_parts,
        unit=vision.spatial_merge_size**2 if vision is not None else 1,
    )


def rank_view(topology: Topology, sharing: Sharing) -> RankView:
    """Which part of a step a rank fetches."""
    return RankView(
        rank=topology.rank,
        replica=topology.coordinates.dp,
        needs_text=topology.embeds_tokens or topology.computes_loss,
        sharing=sharing,
    )


def open_loader(
    config: RunConfig,
    data: OpenData,
    view: RankView,
    decoder: PictureDecoder,
    cursor: Cursor | None = None,
    *,
    prefetch_steps: int,
    max_rows: int | None = None,
) -> StepLoader:
    """A loader with the recipe's settings.

    Args:
        config: the run.
        data: what is read.
        view: which part of it.
        decoder: of pictures.
        cursor: where it starts; null: at the first row.
        prefetch_steps: steps fetched ahead.
        max_rows: end after so many rows; null: where the data end.
    """
    return StepLoader(
        data.stream,
        data.readers,
        view,
        cursor,
        global_batch_size=config.training.global_batch_size,
        micro_batch_size=config.training.micro_batch_size,
        vision=config.model.vision,
        decoder=decoder,
        prefetch_steps=prefetch_steps,
        num_workers=num_workers(config),
        max_rows=max_rows,
        warn_seconds=config.data.warn_seconds,
        timeout_seconds=config.data.timeout_seconds,
    )


def agreed(loaded: LoadedStep, config: RunConfig, data: OpenData, topology: Topology) -> LoadedStep:
    """A step without what any rank could not read; collective.

    Raises:
        TaskFailed: on every rank, when more than `data.max_failed_share` failed.
    """
    for failure in loaded.failures:
        logger.warning("%s: left blank (%s)", failure.name, failure.reason)
    pad_id = data.readers[0].index.special_ids.pad
    return agree_on_failures(loaded, topology.device, pad_id, config.data.max_failed_share)
