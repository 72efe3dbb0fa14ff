"""The numbers of a step, brought together over all ranks."""

from __future__ import annotations

from typing import Any

import psutil
import torch
import torch.distributed as dist

from megatron_vlm.checkpoint.checkpointer import Progress
from megatron_vlm.config import RunConfig
from megatron_vlm.data.loader import LoadedStep
from megatron_vlm.engine.clock import StepClock
from megatron_vlm.engine.step import StepResult
from megatron_vlm.models.language.engine_config import parameter_dtype
from megatron_vlm.platform.peak import peak_tflops
from megatron_vlm.topology.mesh import Topology
from megatron_vlm.training.metrics import model_flops, vision_imbalance

_GIB = 1 << 30


class StepMeter:
    """Measures the steps of a run."""

    def __init__(self, config: RunConfig, topology: Topology, clock: StepClock) -> None:
        """Of `config` on these ranks; `clock` times the parts of each step."""
        self._config, self._topology, self._clock = config, topology, clock
        precision = config.training.precision
        self._peak = peak_tflops(
            topology.device, parameter_dtype(precision), fp8=precision.startswith("fp8")
        )

    def of_step(
        self,
        progress: Progress,
        loaded: LoadedStep,
        result: StepResult | None,
        norm: float,
        rate: float,
        elapsed: float,
        waited: float,
    ) -> dict[str, Any]:
        """Metrics of a step, by the names of `metrics.jsonl`; collective.

        Args:
            progress: of the run, after the step.
            loaded: the step.
            result: what it came to; null where it was passed over, which has no losses.
            norm: of its gradient.
            rate: its learning rate.
            elapsed: seconds that it took here.
            waited: of them, for data.
        """
        config, plan, world = self._config, loaded.plan, self._topology.layout.world_size
        clock = self._clock
        encoding = clock.seconds("encode", "encode_backward")
        exchanging = clock.seconds("exchange", "exchange_back")
        slowest = self._largest([elapsed, waited, self._memory(), encoding, exchanging])
        seconds, data_seconds, memory, encode_seconds, exchange_seconds = slowest
        tflops = model_flops(plan, config) / seconds / world / 1e12
        metrics: dict[str, Any] = {
            "iteration": progress.iteration,
            "consumed_samples": progress.consumed_samples,
            "consumed_documents": progress.consumed_documents,
            "consumed_tokens": progress.consumed_tokens,
            "images": len(plan.pictures),
            "image_patches": plan.image_patches,
            **(result.losses if result is not None else {}),
            "grad_norm": norm,
            "learning_rate": rate,
            "global_batch_size": config.training.global_batch_size,
            "step_time_s": seconds,
            "data_time_s": data_seconds,
            "encode_time_s": encode_seconds,
            "exchange_time_s": exchange_seconds,
            "bubble_time_s": self._mean(clock.waited_seconds()),
            "tokens_per_second_per_device": plan.tokens / seconds / world,
            "images_per_second_per_device": len(plan.pictures) / seconds / world,
            "tflops_per_device": tflops,
            "mfu": tflops / self._peak,
            "memory_gib": memory,
            "vision_imbalance": vision_imbalance(plan, config, world),
            "skipped_iterations": progress.skipped_iterations,
            "nan_iterations": progress.nan_iterations,
            "failed_samples": progress.failed_samples,
        }
        if result is not None and result.load_balancing_loss is not None:
            metrics["load_balancing_loss"] = result.load_balancing_loss
            metrics["expert_imbalance"] = result.expert_imbalance
        return metrics

    def _largest(self, values: list[float]) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self._topology.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    def _mean(self, value: float) -> float:
        tensor = torch.tensor(value, dtype=torch.float64, device=self._topology.device)
        dist.all_reduce(tensor)
        return float(tensor) / self._topology.layout.world_size

    def _memory(self) -> float:
        """Peak GiB on the device, or this process's resident memory on a CPU."""
        if self._topology.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / _GIB
        return psutil.Process().memory_info().rss / _GIB
