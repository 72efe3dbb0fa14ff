"""What a layer of each tower costs on this machine, for `vision_balance.py`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class LayerCosts:
    """Seconds of one layer: of the decoder by token, of the encoder by patch and by pair."""

    forward_token: float
    backward_token: float
    encode_patch: float
    encode_pair: float
    both_patch: float
    """Forward and backward pass."""
    both_pair: float


def measured_costs(config: Any, tokens: int, side: int, rounds: int) -> LayerCosts:
    """Seconds of a second layer, which the first one's ends do not come into.

    Depths and shapes alternate, medians are over the rounds after a first.

    Args:
        config: the run; its widths are kept, its depth is not.
        tokens: of a row of text.
        side: patches along each side of the large picture; the small ones have a quarter of that,
            and there are 16 of them.
        rounds: timed rounds.
    """
    from megatron_vlm.platform import detect_world, start_distributed, stop
    from megatron_vlm.topology.layout import resolve_layout
    from megatron_vlm.topology.mesh import build_topology, destroy_topology

    depths = {layers: of_depth(config, layers) for layers in (1, 2)}
    layouts = {layers: resolve_layout(shallow, 1) for layers, shallow in depths.items()}
    topology = build_topology(layouts[1], start_distributed(detect_world()))
    passes: dict[tuple[int, str], Callable[[], dict[str, float]]] = {}
    for layers, shallow in depths.items():
        # The groups of one process are the same.
        made = _passes(shallow, replace(topology, layout=layouts[layers]), side)
        passes |= {(layers, name): run for name, run in made.items()}
    found: dict[tuple[int, str], list[float]] = {}
    for turn in range(rounds + 1):
        for (layers, _), run in passes.items():
            for name, seconds in run().items():
                found.setdefault((layers, name), []).extend([seconds] * (turn > 0))
    destroy_topology()
    stop()

    def layer(name: str) -> float:
        return statistics.median(found[2, name]) - statistics.median(found[1, name])

    patches = side * side
    costs = {
        "forward_token": layer("forward") / tokens,
        "backward_token": layer("backward") / tokens,
    }
    for name in ("encode", "both"):
        small, large = layer(f"{name}_small"), layer(f"{name}_large")
        # As many patches in both; each attends to all, or to a sixteenth.
        pair = max(large - small, 0.0) / (patches**2 * 15 / 16)
        costs |= {f"{name}_pair": pair, f"{name}_patch": small / patches - pair * patches / 16}
    return LayerCosts(**costs)


def of_depth(config: Any, layers: int) -> Any:
    """The configuration with so few layers, those of experts, of which no more than are chosen."""
    model = config.model
    language = model.language.model_copy(
        update={
            "num_layers": layers,
            "first_k_dense_replace": 0,
            "num_moe_experts": model.language.moe_router_topk + 2,
            "vocab_size": 1024,
            "mtp_num_layers": None,
        }
    )
    vision = model.vision.model_copy(update={"num_layers": layers})
    shape = model.model_copy(update={"language": language, "vision": vision})
    return config.model_copy(update={"model": shape})


def _passes(config: Any, topology: Any, side: int) -> dict[str, Callable[[], dict[str, float]]]:
    """Passes of both towers, each of which tells its seconds by name."""
    import torch

    from megatron_vlm.engine.objective import build_objective
    from megatron_vlm.engine.step import TrainStep
    from megatron_vlm.engine.trainable import make_trainable
    from megatron_vlm.models.vlm import build_model
    from tests.dots1_map import text_step

    model = build_model(config, topology)
    trainable = make_trainable(model, config)
    objective = build_objective("next_token", topology, config.model)
    step = TrainStep(config, topology, model, objective, chunks=list(trainable.chunks))
    step.encoder = None
    length = config.training.seq_length
    row = torch.randint(0, 1024, (length,)).tolist()
    data = text_step([[row]], length, 1)

    def decode() -> dict[str, float]:
        step.train(data)
        return {name: step.clock.seconds(name) for name in ("forward", "backward")}

    quarter = side // 4
    shapes = {"small": [(quarter, quarter)] * 16, "large": [(side, side)]}

    def encode() -> dict[str, float]:
        found = {}
        for shape, grids in shapes.items():
            for name, trained in (("encode", False), ("both", True)):
                found[f"{name}_{shape}"] = _encoding(model.encoder, grids, trained)
        return found

    return {"decode": decode, "encode": encode}


def _encoding(encoder: Any, grids: list[tuple[int, int]], trained: bool) -> float:
    import torch

    sides = torch.tensor(grids)
    vision = encoder.trunk.config
    width = vision.in_channels * vision.patch_size**2
    pixels = torch.zeros(int(sides.prod(dim=1).sum()), width)
    began = time.perf_counter()
    with torch.set_grad_enabled(trained):
        out = encoder(pixels, sides)
        if trained:
            torch.autograd.grad(out.sum(), list(encoder.parameters()), allow_unused=True)
    return time.perf_counter() - began
