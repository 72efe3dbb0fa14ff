"""What a run is: a typed schema, YAML recipes and models, `key=value` overrides, validation."""

from megatron_vlm.config.load import dump_yaml, find_recipes, load_recipe, with_absolute_paths
from megatron_vlm.config.model_schema import (
    AdapterConfig,
    LanguageConfig,
    ModelConfig,
    VisionConfig,
)
from megatron_vlm.config.schema import (
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    RecomputeConfig,
    RunConfig,
    TrainingConfig,
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
