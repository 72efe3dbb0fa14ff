"""Optimizer state as tensors shaped and named like the parameters, whatever the optimizer.

The engine's own formats depend on how many optimizers are chained (one without experts spread
over ranks, two with), and its re-shardable one saves wrong state when a padded parameter shifts
offsets across several buckets. Here each parameter's state is put together from the ranges that
data-parallel ranks own, a portion at a time, and saved under the parameter's name with the
parameter's sharding. So any layout, and the plain or the distributed optimizer, can read it.
The price: while saving, the rank that writes a parameter holds its whole state in host memory (8
bytes a parameter, 12 where weights are computed in half precision); while loading, every rank that
holds the parameter does.

Names: `optimizer.exp_avg.NAME`, `optimizer.exp_avg_sq.NAME`, and `optimizer.fp32_param.NAME`
where weights are computed in half precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

from megatron_vlm.engine.trainable import Trainable

_MOMENTS = ("exp_avg", "exp_avg_sq")
_PORTION = 1 << 26
"""Elements gathered at a time on the device (256 MiB in float32), or one larger parameter."""


def optimizer_tensors(trainable: Trainable, model_state: dict[str, Any], empty: bool) -> dict:
    """Sharded optimizer state of every trained parameter.

    Args:
        trainable: the model being trained.
        model_state: its sharded state, whose entries hold the parameters themselves.
        empty: only make tensors to load into; no values, no communication.

    Returns:
        Sharded tensors (or factories) by name.
    """
    names = {id(entry.data): name for name, entry in model_state.items()}
    written = {id(e.data) for e in model_state.values() if is_main_replica(e.replica_id)}
    result = {}
    for optimizer in trainable.optimizer.chained_optimizers:
        if optimizer.is_stub_optimizer:
            continue
        for parameter, kind, value in _whole_states(optimizer, empty, written):
            name = names[id(parameter)]
            result[f"optimizer.{kind}.{name}"] = make_sharded_optimizer_tensor(
                model_state[name], value, f"optimizer.{kind}"
            )
    return result


def load_optimizer_tensors(
    trainable: Trainable,
    parameters: dict[str, torch.Tensor],
    loaded: dict[str, torch.Tensor],
    step: int,
) -> None:
    """Put loaded tensors into the optimizer, each rank keeping the ranges it owns.

    Args:
        trainable: the model being trained.
        parameters: its parameters by name.
        loaded: this rank's tensors by the names of `optimizer_tensors`.
        step: optimizer steps taken so far (Adam's bias correction).
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    for optimizer in trainable.optimizer.chained_optimizers:
        if optimizer.is_stub_optimizer:
            continue
        _prepare(optimizer, step)
        for parameter, span, tensors in _owned_states(optimizer):
            name = names[id(parameter)]
            for kind, target in tensors.items():
                value = loaded[f"optimizer.{kind}.{name}"]
                target.copy_(value.flatten()[span].view(target.shape))


def load_main_parameters(trainable: Trainable) -> None:
    """Take the optimizer's float32 weights from the model: when only weights were loaded."""
    for optimizer in trainable.optimizer.chained_optimizers:
        if not optimizer.is_stub_optimizer:
            optimizer.reload_model_params()


def _whole_states(
    optimizer: Any, empty: bool, written: set[int]
) -> Iterator[tuple[torch.Tensor, str, torch.Tensor]]:
    """(parameter, kind, whole local tensor) of every parameter and kind of state.

    Of parameters that another rank writes (whose `id` is not in `written`) only the shape.
    """
    half = optimizer.config.bf16
    kinds = (*_MOMENTS, "fp32_param") if half else _MOMENTS
    if not isinstance(optimizer, DistributedOptimizer):
        for parameter, _, tensors in _owned_states(optimizer, missing_ok=True):
            for kind in kinds:
                value = tensors.get(kind)
                # A parameter that was never stepped has no moments yet: they are zero.
                yield parameter, kind, _zeros(parameter, half) if value is None else value.detach()
        return
    owned = {id(p): (span, tensors) for p, span, tensors in _owned_states(optimizer, True)}
    for buffer in optimizer.buffers:
        for parameters in _portions(list(buffer.param_index_map)):
            for kind in kinds:
                if empty:
                    wholes = [_zeros(parameter, half, "cpu") for parameter in parameters]
                else:
                    group = optimizer.data_parallel_group
                    wholes = _gather(parameters, kind, owned, half, group, written)
                yield from zip(parameters, repeat(kind), wholes)


def _gather(
    parameters: list[torch.Tensor],
    kind: str,
    owned: dict[int, tuple[slice, dict[str, torch.Tensor]]],
    half: bool,
    group: Any,
    written: set[int],
) -> list[torch.Tensor]:
    """One kind of whole state of some parameters, in host memory; collective over `group`."""
    sizes = [parameter.numel() for parameter in parameters]
    dtype = torch.float32 if half else parameters[0].dtype
    flat = torch.zeros(sum(sizes), dtype=dtype, device=parameters[0].device)
    pieces = flat.split(sizes)
    for parameter, piece in zip(parameters, pieces, strict=True):
        span, tensors = owned.get(id(parameter), (slice(0), {}))
        if kind in tensors:
            piece[span] = tensors[kind].detach().flatten()
    # Each element is owned by one rank and zero elsewhere.
    dist.all_reduce(flat, group=group)
    # Each on its own: the engine would copy a view of something larger once more.
    return [
        piece.to("cpu" if id(p) in written else "meta", copy=True).view(p.shape)
        for piece, p in zip(pieces, parameters, strict=True)
    ]


def _portions(parameters: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Parts of a list that hold about `_PORTION` elements each."""
    part: list[torch.Tensor] = []
    elements = 0
    for parameter in parameters:
        part.append(parameter)
        elements += parameter.numel()
        if elements >= _PORTION:
            yield part
            part, elements = [], 0
    if part:
        yield part


def _zeros(
    parameter: torch.Tensor, half: bool, device: torch.device | str | None = None
) -> torch.Tensor:
    dtype = torch.float32 if half else parameter.dtype
    return torch.zeros(parameter.shape, dtype=dtype, device=device or parameter.device)


def _owned_states(
    optimizer: Any, missing_ok: bool = False
) -> Iterator[tuple[torch.Tensor, slice, dict[str, torch.Tensor]]]:
    """(model parameter, range of its elements, state by kind) of what this rank holds."""
    half = optimizer.config.bf16
    inner = optimizer.optimizer
    if isinstance(optimizer, DistributedOptimizer):
        for parameter in optimizer.model_param_gbuf_map:
            owned = optimizer._get_model_param_range_map(parameter)["param"]
            group, order = optimizer.model_param_group_index_map[parameter]
            main = inner.param_groups[group]["params"][order]
            yield (
                parameter,
                slice(owned.start, owned.end),
                _tensors(inner.state.get(main, {}), main if half else None),
            )
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
        pairs = [
            pair
            for models, mains in (
                *zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True),
                *zip(optimizer.fp32_from_fp32_groups, optimizer.fp32_from_fp32_groups, strict=True),
            )
            for pair in zip(models, mains, strict=True)
        ]
        for parameter, main in pairs:
            yield parameter, slice(None), _tensors(inner.state.get(main, {}), main)
    elif isinstance(optimizer, FP32Optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                yield parameter, slice(None), _tensors(inner.state.get(parameter, {}), None)
    else:
        raise TypeError(f"cannot save the state of {type(optimizer).__name__}")


def _tensors(state: dict[str, Any], main: torch.Tensor | None) -> dict[str, torch.Tensor]:
    tensors = {kind: state[kind] for kind in _MOMENTS if kind in state}
    if main is not None:
        tensors["fp32_param"] = main.data
    return tensors


def _prepare(optimizer: Any, step: int) -> None:
    """Make the state that a first optimizer step would have made, with its count."""
    inner = optimizer.optimizer
    optimizer.init_state_fn(inner, optimizer.config)
    torch_adam = isinstance(inner, torch.optim.AdamW)
    for group in inner.param_groups:
        if not torch_adam:
            group["step"] = step
        for parameter in group["params"]:
            if torch_adam:
                # torch's fused step wants its count beside the weights, the plain one on the host.
                device = parameter.device if group["fused"] else None
                inner.state[parameter]["step"] = torch.tensor(float(step), device=device)
