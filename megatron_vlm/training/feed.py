"""What feeds a run: its loaders, and the log of what they could not read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_vlm.data.decoders import PictureDecoder
from megatron_vlm.data.loader import LoadedStep, RankView, StepLoader
from megatron_vlm.data.rows import Cursor
from megatron_vlm.engine.agreement import agree_on_failures
from megatron_vlm.topology.mesh import Topology
from megatron_vlm.training.console import logger
from megatron_vlm.training.datasets import OpenData, num_workers

if TYPE_CHECKING:
    from megatron_vlm.config.schema import RunConfig


def rank_view(topology: Topology) -> RankView:
    """Which part of a step a rank fetches."""
    return RankView(
        rank=topology.rank,
        world_size=topology.layout.world_size,
        replica=topology.coordinates.dp,
        num_replicas=topology.layout.dp,
        needs_text=topology.embeds_tokens or topology.computes_loss,
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
