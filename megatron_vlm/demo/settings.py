"""The demo's configuration: its recipe, fitted to the number of processes, in the demo's folder."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_vlm.config import RunConfig, load_recipe
from megatron_vlm.config.schema import SourceConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.topology.layout import resolve_layout

RECIPE = "demo"
_EXPERTS = "parallel.expert_model_parallel_size"
_MICRO_BATCH = "training.micro_batch_size"
_BATCH = "training.global_batch_size"


def processes_on_cpu() -> int:
    """Two, so that experts are shared; one where there is but one core."""
    return min(2, len(os.sched_getaffinity(0)))


def demo_config(run_dir: Path, nproc: int, overrides: Sequence[str]) -> RunConfig:
    """The configuration of a demo below `run_dir` that `nproc` processes can run.

    Raises:
        ConfigError: an override is wrong or sets what the demo itself sets, or `nproc` processes
            cannot run it.
    """
    fitting = fitting_overrides(nproc, overrides)
    config = load_recipe(RECIPE, [*fitting, *overrides])
    resolve_layout(config, nproc)
    data = run_dir / "data"
    # Put in as they are: a path written into an override would be read as YAML.
    return config.model_copy(
        update={
            "run_dir": str(run_dir),
            "data": config.data.model_copy(
                update={
                    "train": {"train": SourceConfig(path=str(data / "train"))},
                    "validation": {"held_out": str(data / "held_out")},
                }
            ),
        }
    )


def fitting_overrides(nproc: int, overrides: Sequence[str]) -> list[str]:
    """What must change in the recipe for `nproc` processes; nothing that `overrides` settle.

    Raises:
        ConfigError: an override is wrong or sets what the demo itself sets.
    """
    given = {text.partition("=")[0] for text in overrides}
    config = load_recipe(RECIPE, overrides)
    _check_places(given, config)
    parallel, training = config.parallel, config.training
    stage = nproc // parallel.pipeline_model_parallel_size
    replicas = stage // (parallel.tensor_model_parallel_size * parallel.context_parallel_size)
    if replicas == 0:
        # Too few processes: for the layout to say.
        return []
    wanted: dict[str, int] = {}
    experts = parallel.expert_model_parallel_size
    if config.model.language.num_moe_experts is None:
        wanted[_EXPERTS] = 1
    else:
        wanted[_EXPERTS] = math.gcd(experts, stage)
    micro, batch = training.micro_batch_size, training.global_batch_size
    if _MICRO_BATCH not in given:
        # Rather fewer rows at a time than more in a step: the learning rate is for that many.
        micro = wanted[_MICRO_BATCH] = max(1, min(micro, batch // replicas))
    wanted[_BATCH] = math.ceil(batch / (micro * replicas)) * micro * replicas
    now = {
        _EXPERTS: experts,
        _MICRO_BATCH: training.micro_batch_size,
        _BATCH: training.global_batch_size,
    }
    return [
        f"{key}={value}" for key, value in wanted.items() if key not in given and now[key] != value
    ]


def _check_places(given: set[str], config: RunConfig) -> None:
    for key in sorted(given):
        if key == "run_dir":
            raise ConfigError(f"override {key}: the demo's folder is given as --run-dir DIR")
        if key.split(".")[:2] in (["data", "train"], ["data", "validation"]):
            raise ConfigError(_OWN_DATA.format(key))
    for key, value in (("train", config.data.train), ("validation", config.data.validation)):
        if value:
            raise ConfigError(_OWN_DATA.format(f"data.{key}"))


_OWN_DATA = (
    "override {}: the demo trains on data of its own; leave it out, or train on yours with "
    "`mvlm launch demo data.train=DIR`"
)
