"""What a run is: a typed schema, YAML recipes and models, `key=value` overrides, validation."""

from megatron_vlm.config.load import dump_yaml, find_recipes, load_recipe, with_absolute_paths
from megatron_vlm.config.schema import (
    AdapterConfig,
    CheckpointConfig,
    DataConfig,
    LanguageConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RecomputeConfig,
    RunConfig,
    TrainingConfig,
    VisionConfig,
)

__all__ = [
    "AdapterConfig",
    "CheckpointConfig",
    "DataConfig",
    "LanguageConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RecomputeConfig",
    "RunConfig",
    "TrainingConfig",
    "VisionConfig",
    "dump_yaml",
    "find_recipes",
    "load_recipe",
    "with_absolute_paths",
]
