"""What a run takes encoding to cost: FLOPs, or seconds that were measured once and are kept."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_vlm.checkpoint.folder import write_atomically
from megatron_vlm.data.balance import EncoderCost
from megatron_vlm.engine.encoder_timing import measure_cost, seconds_per_byte
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.language.engine_config import parameter_dtype
from megatron_vlm.models.vision.flops import flops_terms
from megatron_vlm.training.console import logger

if TYPE_CHECKING:
    from megatron_vlm.config.model_schema import VisionConfig
    from megatron_vlm.config.schema import RunConfig
    from megatron_vlm.models.vlm import VisionLanguageModel

_FLOPS_PER_BYTE = 4000.0
"""What a byte on its way costs, beside FLOPs: an H100 that reaches 400 TFLOPs a second with links
of 400 gigabits a second. Our choice."""

COST_FILE = "encoder_cost.json"
"""In the run folder: the measured cost, which a resume plans with again."""


def flops_cost(config: RunConfig) -> EncoderCost:
    """FLOPs of a forward pass over pictures; 1 a patch without an encoder."""
    model = config.model
    if model.vision is None:
        return EncoderCost(0.0, 1.0, 0.0)
    per_patch, per_pair = flops_terms(model.vision, model.adapter, model.language.hidden_size)
    sent = shared_patch_bytes(model.vision, config.training.precision)
    return EncoderCost(0.0, per_patch, per_pair, sent * _FLOPS_PER_BYTE)


def shared_patch_bytes(vision: VisionConfig, precision: str) -> float:
    """Bytes of a patch's keys and values in all layers, on their way in the forward pass."""
    return 2.0 * vision.num_layers * vision.hidden_size * parameter_dtype(precision).itemsize


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
    path = Path(config.run_dir) / COST_FILE
    kept = [asdict(read_cost(path)) if dist.get_rank() == 0 and path.exists() else None]
    dist.broadcast_object_list(kept, src=0)
    if kept[0] is not None:
        return EncoderCost(**kept[0])
    return _measured(config, model, path)


def _measured(config: RunConfig, model: VisionLanguageModel, path: Path) -> EncoderCost:
    vision, group = config.model.vision, model.topology.vision.dp
    assert vision is not None and model.encoder is not None
    cost = EncoderCost(0.0, 1.0, 0.0)
    if dist.get_rank() == 0:
        cost = measure_cost(model.encoder, vision.max_pixels // vision.patch_size**2)
    # While one measures, the others leave the machine to it.
    dist.barrier()
    # Keys and values forward, once more where attention is recomputed, and their gradients.
    times = 2 if config.recompute.vision == "none" else 3
    sent = times * shared_patch_bytes(vision, config.training.precision)
    cost = replace(cost, per_shared_patch=sent * seconds_per_byte(group, model.topology.device))
    found = [asdict(cost)]
    dist.broadcast_object_list(found, src=0)
    if dist.get_rank() == 0:
        write_atomically(path, json.dumps(found[0], indent=2) + "\n")
        logger.info(
            "encoding takes %.3g s a picture, %.3g s a patch, %.3g s a pair of patches, and %.3g s "
            "a patch of a picture that ranks share (%s)", *found[0].values(), path,
        )  # fmt: skip
    return EncoderCost(**found[0])


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
