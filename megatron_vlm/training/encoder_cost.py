"""What a run takes encoding to cost: FLOPs, or seconds that were measured once and are kept."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_vlm.checkpoint.folder import write_atomically
from megatron_vlm.data.balance import EncoderCost
from megatron_vlm.engine.encoder_timing import measure_cost
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.vision.flops import encoder_flops_terms
from megatron_vlm.training.console import logger

if TYPE_CHECKING:
    from megatron_vlm.config.schema import RunConfig
    from megatron_vlm.models.vlm import VisionLanguageModel

COST_FILE = "encoder_cost.json"
"""In the run folder: the measured cost, which a resume plans with again."""


def flops_cost(config: RunConfig) -> EncoderCost:
    """FLOPs of encoding pictures; 1 a patch without an encoder."""
    model = config.model
    if model.vision is None:
        return EncoderCost(0.0, 1.0, 0.0)
    per_patch, per_pair = encoder_flops_terms(
        model.vision, model.adapter, model.language.hidden_size
    )
    return EncoderCost(0.0, per_patch, per_pair)


def given_cost(config: RunConfig) -> EncoderCost | None:
    """The cost that a recipe gives; null: it is to be measured, or was.

    Raises:
        ConfigError: the file that `vision_parallel.cost` names is missing or damaged, or what the
            run folder keeps is.
    """
    said = config.vision_parallel.cost
    if said == "flops" or config.model.vision is None:
        return flops_cost(config)
    if said != "measured":
        return read_cost(Path(said), "vision_parallel.cost: ")
    kept = Path(config.run_dir) / COST_FILE
    if kept.exists():
        read_cost(kept)
    return None


def settled_cost(config: RunConfig, model: VisionLanguageModel) -> EncoderCost:
    """The cost that every rank plans with, measured if need be; collective."""
    found = given_cost(config)
    if found is not None:
        return found
    # Rank 0 alone looks at the folder: what it writes there must not change what others do.
    values: list[list[float]] = [[]]
    if dist.get_rank() == 0:
        values = [list(asdict(_kept_or_measured(config, model)).values())]
    dist.broadcast_object_list(values, src=0)
    return EncoderCost(*values[0])


def _kept_or_measured(config: RunConfig, model: VisionLanguageModel) -> EncoderCost:
    path, vision = Path(config.run_dir) / COST_FILE, config.model.vision
    if path.exists():
        return read_cost(path)
    assert vision is not None and model.encoder is not None
    cost = measure_cost(model.encoder, vision.max_pixels // vision.patch_size**2)
    write_atomically(path, json.dumps(asdict(cost), indent=2) + "\n")
    logger.info(
        "encoding takes %.3g s a picture, %.3g s a patch and %.3g s a pair of patches (%s)",
        cost.per_picture,
        cost.per_patch,
        cost.per_pair,
        path,
    )
    return cost


def read_cost(path: Path, said_by: str = "") -> EncoderCost:
    """A cost as `measured_cost` wrote it.

    Raises:
        ConfigError: no such file, or not numbers from 0 on with one above 0.
    """
    expected = (
        f"{path}: expected an object of numbers from 0 on, like {COST_FILE} of a run folder, with "
        "per_patch or per_pair above 0"
    )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{said_by}{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{said_by}{expected}; it is no JSON ({error})") from error
    try:
        cost = EncoderCost(**content)
        values = [float(value) for value in asdict(cost).values()]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{said_by}{expected} ({error})") from error
    if not all(math.isfinite(v) and v >= 0 for v in values) or not cost.per_patch + cost.per_pair:
        raise ConfigError(f"{said_by}{expected}; found {content}")
    return EncoderCost(*values)
