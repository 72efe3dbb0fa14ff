"""Validation on held-out sets: the objective's losses over all of each set, in any layout alike."""

from __future__ import annotations

from collections import defaultdict

from megatron_vlm.config.schema import RunConfig
from megatron_vlm.data.decoders import PictureDecoder
from megatron_vlm.data.loader import RankView
from megatron_vlm.engine.step import TrainStep
from megatron_vlm.training.datasets import OpenData
from megatron_vlm.training.feed import agreed, open_loader


def validate(
    config: RunConfig,
    step: TrainStep,
    sets: dict[str, OpenData],
    decoder: PictureDecoder,
    view: RankView,
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
        found, totals = _one_set(config, step, data, decoder, view)
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
    config: RunConfig,
    step: TrainStep,
    data: OpenData,
    decoder: PictureDecoder,
    view: RankView,
) -> tuple[dict[str, float], dict[str, float]]:
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, float] = defaultdict(float)
    loader = open_loader(
        config,
        data,
        view,
        decoder,
        prefetch_steps=min(1, config.data.prefetch_steps),
        max_rows=config.training.eval_rows,
    )
    with loader:
        for loaded in loader:
            found, totals = step.evaluate(agreed(loaded, config, data, step.topology))
            for loss, value in found.items():
                sums[loss] += value
                counts[loss] += totals[loss]
    return sums, counts
