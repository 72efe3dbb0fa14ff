"""Initial weights as a function of (seed, name, position): alike in every layout.

Each row of a parameter is drawn by its own counter-based generator, keyed by the seed and the
parameter's name in checkpoints, so a rank draws just the rows it holds and any layout starts from
the very same model. It works on sharded state dictionaries: initialising is loading from a
checkpoint that is computed instead of read.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from megatron_vlm.config.model_schema import ModelConfig


@torch.no_grad()
def initialize(sharded: dict[str, Any], model: ModelConfig, seed: int) -> None:
    """Fill every tensor of a model's sharded state in place.

    Norm weights become one, biases zero, everything else normal with its part's
    `init_method_std`.
    """
    for entry in sharded.values():
        if isinstance(entry, ShardedTensorFactory):
            built = entry.build()
            values = dict_list_map_inplace(lambda part: _draw(part, model, seed), built)
            entry.data.copy_(entry.merge_fn(values))
        elif isinstance(entry, ShardedTensor):
            entry.data.copy_(_draw(entry, model, seed))


def _draw(part: ShardedTensor, model: ModelConfig, seed: int) -> torch.Tensor:
    shape = part.local_shape
    if part.key.endswith("bias"):
        return torch.zeros(shape)
    if "norm" in part.key:
        return torch.ones(shape)
    *leading, width = part.global_shape
    offset, skipped = part.global_offset, part.prepend_axis_num
    local = (*[1] * skipped, *shape)
    ranges = [np.arange(offset[i], offset[i] + local[i]) for i in range(len(leading))]
    grids = np.meshgrid(*ranges, indexing="ij") if ranges else []
    rows = np.ravel_multi_index(grids, leading).ravel() if grids else np.zeros(1, dtype=np.int64)
    digest = hashlib.sha256(f"{seed}/{part.key}".encode()).digest()
    key = np.frombuffer(digest[:16], dtype=np.uint64)
    first, count = offset[-1], local[-1]
    drawn = np.empty((len(rows), count), dtype=np.float32)
    for i, row in enumerate(rows):
        generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, int(row), 0]))
        drawn[i] = generator.standard_normal(width, dtype=np.float32)[first : first + count]
    return torch.from_numpy(drawn).reshape(shape).mul_(_std(part.key, model))


def _std(key: str, model: ModelConfig) -> float:
    if key.startswith("vision.adapter."):
        return model.adapter.init_method_std
    if key.startswith("vision."):
        assert model.vision is not None
        return model.vision.init_method_std
    return model.language.init_method_std


def count_parameters(sharded: dict[str, Any]) -> int:
    """Elements of the whole model, from the global shapes of one process's sharded state."""
    total = 0
    for entry in sharded.values():
        if isinstance(entry, ShardedTensorFactory):
            total += entry.data.numel()
        elif isinstance(entry, ShardedTensor):
            total += math.prod(entry.global_shape)
    return total
