"""Validation on held-out sets: the objective's losses over all of each set, in any layout alike."""

from __future__ import annotations

from collections import defaultdict

from megatron_vlm.config.schema import RunConfig
from megatron_vlm.data.loader import RankView, StepLoader
from megatron_vlm.data.plan import held_out_batches
from megatron_vlm.data.rows import RowSource
from megatron_vlm.engine.step import TrainStep
from megatron_vlm.training.datasets import OpenDataset, decode_threads


def validate(
    config: RunConfig, step: TrainStep, sets: dict[str, OpenDataset], view: RankView
) -> dict[str, float]:
    """Token-weighted losses: `validation_loss` over all sets, `validation_loss_NAME` for each.

    An objective with several losses reports its weighted total there, auxiliary ones left out, and
    every loss as `validation_LOSS`.
    """
    weights = step.objective.loss_weights
    main = {name: weights[name] for name in weights if name not in step.objective.auxiliary}
    metrics: dict[str, float] = {}
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, float] = defaultdict(float)
    for name, data in sets.items():
        found, totals = _one_set(config, step, data, view)
        metrics[f"validation_loss_{name}"] = _total(main, found, totals)
        for loss in weights:
            sums[loss] += found[loss]
            counts[loss] += totals[loss]
    metrics["validation_loss"] = _total(main, sums, counts)
    if len(weights) > 1:
        metrics |= {f"validation_{loss}": sums[loss] / (counts[loss] or 1.0) for loss in weights}
    return metrics


def _total(weights: dict[str, float], sums: dict[str, float], counts: dict[str, float]) -> float:
    return sum(weight * sums[loss] / (counts[loss] or 1.0) for loss, weight in weights.items())


def _one_set(
    config: RunConfig, step: TrainStep, data: OpenDataset, view: RankView
) -> tuple[dict[str, float], dict[str, float]]:
    training = config.training
    source: RowSource = data.source
    batches = held_out_batches(source, training.global_batch_size, training.eval_rows)
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, float] = defaultdict(float)
    loader = StepLoader(
        source,
        data.reader,
        view,
        global_batch_size=training.global_batch_size,
        micro_batch_size=training.micro_batch_size,
        vision=config.model.vision,
        prefetch_steps=min(1, config.data.prefetch_steps),
        decode_threads=decode_threads(config),
        batches=batches,
    )
    with loader:
        for loaded in loader:
            found, totals = step.evaluate(loaded)
            for loss, value in found.items():
                sums[loss] += value
                counts[loss] += totals[loss]
    return sums, counts
