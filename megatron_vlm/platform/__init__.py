"""CUDA or CPU: the one seam. Makes megatron-core run on CPU, starts torch.distributed, seeds."""

from megatron_vlm.platform.cpu_engine import install, is_cpu
from megatron_vlm.platform.distributed import (
    World,
    detect_world,
    free_port,
    start_distributed,
    stop,
)
from megatron_vlm.platform.seed import seed_step

__all__ = [
    "World",
    "detect_world",
    "free_port",
    "install",
    "is_cpu",
    "seed_step",
    "start_distributed",
    "stop",
]
