"""Data-parallel wrappers and one optimizer over both towers.

The decoder's gradients are reduced over the language mesh's replicas, the encoder's over every
rank; one chained optimizer steps both after clipping by one global norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    ChainedOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.transformer import TransformerConfig

from megatron_vlm.config.schema import RunConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.language.engine_config import parameter_dtype
from megatron_vlm.models.vlm import VisionLanguageModel, has_gradients


@dataclass
class Trainable:
    """A model wrapped for training, and what steps it."""

    model: VisionLanguageModel
    chunks: list[DistributedDataParallel]
    encoder: DistributedDataParallel | None
    optimizer: ChainedOptimizer
    steps: int = 0
    """Optimizer steps taken, skipped ones not counted: Adam's own count."""

    def gather_parameters(self) -> None:
        """Bring every weight up to date on every rank.

        With overlapped gathers the engine does so only in the next forward pass: needed before
        weights are read in any other way.
        """
        for module in (*self.chunks, self.encoder):
            if module is not None and module.ddp_config.overlap_param_gather:
                module.start_param_sync(force_sync=True)

    @torch.no_grad()
    def step(self, learning_rate: float, clip_grad: float) -> float:
        """Clip and step; returns the global gradient norm before clipping.

        A norm that is not finite leaves weights and state untouched.
        """
        optimizer = self.optimizer
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_mult", 1.0)
        not_finite = optimizer.prepare_grads()
        norm = self._gradient_norm()
        if not_finite or not math.isfinite(norm):
            return math.nan
        if 0 < clip_grad < norm:
            self._scale_gradients(clip_grad / norm)
        optimizer.step_with_ready_grads()
        self.steps += 1
        return norm

    def _gradient_norm(self) -> float:
        """Norm over both towers, each parameter counted once; the engine's is float32 always."""
        total = 0.0
        for part in self.optimizer.chained_optimizers:
            gradients = part.get_main_grads_for_grad_norm()
            device = self.model.topology.device
            squares = torch.zeros((), dtype=torch.float64, device=device)
            if gradients:
                squares = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
            dist.all_reduce(squares, group=part.get_grad_stats_parallel_group())
            total += float(squares)
        return math.sqrt(total) if math.isfinite(total) else math.nan

    def _scale_gradients(self, factor: float) -> None:
        # The engine's own clipping refuses float64.
        for part in self.optimizer.chained_optimizers:
            parameters = [] if part.is_stub_optimizer else part.get_parameters()
            gradients = [p.grad for p in parameters if p.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, factor)


def make_trainable(model: VisionLanguageModel, config: RunConfig) -> Trainable:
    """Wrap `model` and build its optimizer.

    Raises:
        ConfigError: nothing is left to train.
    """
    ddp, settings = _ddp_config(config), _optimizer_config(config)
    chunks = [
        DistributedDataParallel(
            model.engine, ddp, chunk, disable_bucketing=number > 0 and not ddp.overlap_grad_reduce
        )
        for number, chunk in enumerate(model.chunks)
    ]
    parts = []
    if any(has_gradients(chunk) for chunk in model.chunks):
        parts += _parts(get_megatron_optimizer(settings, chunks, use_gloo_process_groups=False))
    encoder = None
    if model.encoder is not None and has_gradients(model.encoder):
        groups = model.topology.vision
        encoder = DistributedDataParallel(
            _encoder_engine(model), ddp, model.encoder, pg_collection=groups
        )
        parts += _parts(
            get_megatron_optimizer(
                settings,
                [encoder],
                config_overrides={
                    **get_standard_config_overrides(settings),
                    **_encoder_rates(config),
                },
                use_gloo_process_groups=False,
                pg_collection=groups,
            )
        )
    if not parts:
        raise ConfigError(
            f"training.freeze {list(config.training.freeze)} leaves nothing to train; expected at "
            "least one part unfrozen"
        )
    _connect_schedule(model, chunks, config)
    optimizer = ChainedOptimizer(parts)
    for group in optimizer.param_groups:
        # The engine marks norms and biases, but leaves it to its own scheduler to act on that.
        group["weight_decay"] = config.optimizer.weight_decay * group.get("wd_mult", 1.0)
        if "fused" in group:
            # torch's AdamW, which the engine takes without Transformer Engine or Apex: one pass
            # over the weights instead of a dozen.
            group["fused"] = True
    return Trainable(model, chunks, encoder, optimizer)


def _parts(optimizer: ChainedOptimizer) -> list:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _ddp_config(config: RunConfig) -> DistributedDataParallelConfig:
    settings = config.optimizer
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.training.precision not in ("fp64", "fp32"),
        use_distributed_optimizer=settings.use_distributed_optimizer,
        overlap_grad_reduce=settings.overlap_grad_reduce,
        overlap_param_gather=settings.overlap_param_gather,
        bucket_size=settings.bucket_size,
    )


def _optimizer_config(config: RunConfig) -> OptimizerConfig:
    settings, dtype = config.optimizer, parameter_dtype(config.training.precision)
    return OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=settings.use_distributed_optimizer,
        overlap_param_gather=settings.overlap_param_gather,
    )


def _encoder_rates(config: RunConfig) -> dict[ParamKey, Any]:
    """How much faster or slower than the rest the encoder's trunk learns, by depth.

    The patch embedding counts as one layer below the blocks, the last norm as one above (BEiT).
    """
    vision, settings = config.model.vision, config.optimizer
    if vision is None:
        return {}
    base = 1.0 if settings.vision_lr is None else settings.vision_lr / settings.lr
    above = vision.num_layers + 1
    names = ["*trunk.patch_embed.*", *(f"*trunk.blocks.{i}.*" for i in range(vision.num_layers)),
             "*trunk.post_trunk_norm.*"]  # fmt: skip
    rates = [base * settings.vision_layer_decay ** (above - depth) for depth in range(above + 1)]
    return {
        ParamKey(name=name): {"lr_mult": rate}
        for name, rate in zip(names, rates, strict=True)
        if rate != 1.0
    }


def _encoder_engine(model: VisionLanguageModel) -> TransformerConfig:
    # The wrapper reads from it only that gradients are plain sums.
    dtype = model.engine.params_dtype
    return TransformerConfig(
        num_layers=1,
        hidden_size=model.engine.hidden_size,
        num_attention_heads=1,
        calculate_per_token_loss=True,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
    )


def _connect_schedule(
    model: VisionLanguageModel, chunks: list[DistributedDataParallel], config: RunConfig
) -> None:
    engine, settings, several = model.engine, config.optimizer, len(chunks) > 1
    if settings.overlap_grad_reduce:
        hooks = [chunk.no_sync for chunk in chunks]
        engine.no_sync_func = hooks if several else hooks[0]
    if settings.overlap_param_gather:
        gathers = [chunk.start_param_sync for chunk in chunks]
        engine.param_sync_func = gathers if several else gathers[0]
