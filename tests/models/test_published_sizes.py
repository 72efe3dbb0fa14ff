"""The published models have the published number of parameters.

They are built in full, as the trainer builds them, on the meta device: shapes without memory.
"""

from __future__ import annotations

import resource
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from megatron_vlm.config import RunConfig, load_recipe
from megatron_vlm.planning.shapes import active_parameters, model_parameters, trunk_parameters
from megatron_vlm.platform import World, start_distributed, stop
from megatron_vlm.topology.layout import resolve_layout
from tests.ranks import run_ranks
from tests.training_case import RECIPE

pytestmark = pytest.mark.distributed

# dots.llm1's report: 142B in all, 14B active; to the last parameter from its published config.
DOTS_LLM1 = 142_774_373_888
DOTS_LLM1_ACTIVE = 14_016_581_120
# dots.vlm1's blog: an encoder of 1.2B; the trunk from dots.ocr's published config.
TRUNK = 1_214_894_592

_GIB = 1 << 30


def _config(model: str) -> RunConfig:
    return load_recipe(str(RECIPE), [f"model={model}", "training.precision=bf16"])


class _OnMeta(TorchFunctionMode):
    """Every new tensor on the meta device, wherever it was meant to go.

    torch's own `with torch.device("meta")` does not see factories that the platform has wrapped.
    """

    FACTORIES = ("empty", "zeros", "ones", "full", "arange")

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") in self.FACTORIES:
            kwargs["device"] = torch.device("meta")
        return func(*args, **kwargs)


def _build(world: World, config: RunConfig) -> dict[str, Any]:
    from megatron_vlm.models.vlm import build_model
    from megatron_vlm.topology.mesh import build_topology

    meta = torch.device("meta")
    topology = build_topology(resolve_layout(config, 1), start_distributed(world))
    # Where the engine would put its weights.
    torch.cuda.current_device = lambda: meta  # type: ignore[assignment,return-value]
    with _OnMeta():
        model = build_model(config, replace(topology, device=meta))
    layers = model.chunks[0].decoder.layers
    counts = {
        "decoder": sum(p.numel() for p in model.chunks[0].parameters()),
        "experts": sum(p.numel() for layer in layers[1:] for p in layer.mlp.experts.parameters()),
        "devices": {p.device.type for p in model.chunks[0].parameters()},
    }
    if model.encoder is not None:
        counts["trunk"] = sum(p.numel() for p in model.encoder.trunk.parameters())
        counts["adapter"] = sum(p.numel() for p in model.encoder.adapter.parameters())
    stop()
    counts["gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB
    return counts


def test_dots_llm1() -> None:
    config = _config("dots-llm1")
    found = run_ranks(1, _build, config, timeout=60)[0]
    planned = model_parameters(config.model)
    assert found["devices"] == {"meta"} and found["gib"] < 2
    assert found["decoder"] == planned.total == DOTS_LLM1
    assert found["experts"] == planned.experts
    # A token takes 6 of the 128 experts of each layer and everything else.
    active = found["decoder"] - found["experts"] + found["experts"] * 6 // 128
    assert active == active_parameters(config.model.language) == DOTS_LLM1_ACTIVE


def test_dots_vlm() -> None:
    config = _config("dots-vlm-142b")
    found = run_ranks(1, _build, config, timeout=60)[0]
    planned = model_parameters(config.model)
    assert found["gib"] < 2
    assert config.model.vision is not None
    assert found["trunk"] == planned.trunk == trunk_parameters(config.model.vision) == TRUNK
    assert found["adapter"] == planned.adapter
    assert found["decoder"] == DOTS_LLM1
