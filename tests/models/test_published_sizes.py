"""The published models have the published number of parameters.

They are built in full, as the trainer builds them, on the meta device: shapes without memory.
"""

from __future__ import annotations

import resource
from dataclasses import replace
from typing import Any, NamedTuple

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


class Published(NamedTuple):
    """Parameters to the last one, from the published configuration."""

    decoder: int
    """Without multi-token prediction."""
    active: int
    """Of the decoder for one token, both embeddings included."""
    trunk: int = 0
    """Of the encoder, without what joins it to the decoder."""


# dots.llm1's report: 142B in all, 14B active.
DOTS_LLM1 = (142_774_373_888, 14_016_581_120)
# DeepSeek-V3's report: 671B in all, 37B active; its published weights hold 671,026,419,200, with
# the 256 biases of each of 58 routers, which are no parameters here.
DEEPSEEK_V3 = (671_026_419_200 - 58 * 256, 37_552_282_624)
# dots.vlm1's blog: an encoder of 1.2B.
NAVIT = 1_214_894_592
PUBLISHED = {
    "dots-llm1": Published(*DOTS_LLM1),
    "deepseek-v3": Published(*DEEPSEEK_V3),
    "dots-vlm-142b": Published(*DOTS_LLM1, NAVIT),
    "dots-vlm1": Published(*DEEPSEEK_V3, NAVIT),
    # Qwen2's 1.5B shape, untied.
    "dots-ocr": Published(1_777_088_000, 1_777_088_000, NAVIT),
    # Seed1.5-VL's report: an encoder of 532M; of the decoder only "20B active" is known.
    "seed-vlm": Published(197_609_411_584, 19_246_633_984, 531_667_200),
}

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
    counts = {
        "decoder": sum(p.numel() for p in model.chunks[0].parameters()),
        "experts": sum(
            p.numel() for name, p in model.chunks[0].named_parameters() if ".mlp.experts." in name
        ),
        "ahead": sum(
            p.numel()
            for name, p in model.chunks[0].named_parameters()
            if name.startswith("multi_token.")
        ),
        "trunk": 0,
        "adapter": 0,
        "devices": {p.device.type for p in model.chunks[0].parameters()},
    }
    if model.encoder is not None:
        counts["trunk"] = sum(p.numel() for p in model.encoder.trunk.parameters())
        counts["adapter"] = sum(p.numel() for p in model.encoder.adapter.parameters())
    stop()
    counts["gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB
    return counts


@pytest.mark.parametrize("model", PUBLISHED)
def test_size(model: str) -> None:
    published = PUBLISHED[model]
    config = _config(model)
    found = run_ranks(1, _build, config, timeout=120)[0]
    planned = model_parameters(config.model)
    assert found["devices"] == {"meta"} and found["gib"] < 2
    assert found["decoder"] - found["ahead"] == published.decoder
    assert found["decoder"] == planned.decoder + planned.experts
    assert found["experts"] == planned.experts
    # A token takes so many of the experts of each layer, and everything else.
    main = model_parameters(config.model, prediction=False)
    language = config.model.language
    experts = main.experts * language.moe_router_topk // (language.num_moe_experts or 1)
    assert main.decoder + experts == active_parameters(language) == published.active
    assert found["trunk"] == planned.trunk == published.trunk
    assert found["adapter"] == planned.adapter
    if config.model.vision is not None:
        assert planned.trunk == trunk_parameters(config.model.vision)


@pytest.mark.parametrize("model", PUBLISHED)
def test_twin_has_every_trait(model: str) -> None:
    """Whatever a published model switches on or off, its twin does too, in 30M parameters."""
    whole, twin = _config(model).model, _config(f"{model}-twin").model
    assert model_parameters(twin).total < 30e6
    assert (whole.vision is None) == (twin.vision is None)
    for big, small in ((whole.language, twin.language), (whole.vision, twin.vision)):
        if big is None or small is None:
            continue
        for name in type(big).model_fields:
            mine, theirs = getattr(small, name), getattr(big, name)
            if theirs is None or isinstance(theirs, (bool, str)):
                assert mine == theirs, name
            else:
                assert mine is not None, name
    assert whole.adapter.merge == twin.adapter.merge
    grouped = whole.language.query_groups < whole.language.num_attention_heads
    assert grouped == (twin.language.query_groups < twin.language.num_attention_heads)
    assert twin.language.moe_router_topk < (twin.language.num_moe_experts or 99)
