"""Our weights under the names of dots.vlm1 and dots.ocr, from the modules' shapes alone."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_vlm.config import LanguageConfig
from tests.dots1_map import to_dots1

_PREFIXES = {
    "trunk.patch_embed.": "patch_embed.patchifier.",
    "trunk.blocks.": "blocks.",
    "trunk.post_trunk_norm.": "post_trunk_norm.",
    "adapter.norm.": "merger.ln_q.",
    "adapter.fc1.": "merger.mlp.0.",
    "adapter.fc2.": "merger.mlp.2.",
}
_IN_BLOCK = {
    **{name: f"attn.{name}" for name in ("qkv", "proj", "q_norm", "k_norm")},
    **{name: f"mlp.{name}" for name in ("fc1", "fc2", "fc3")},
    **{name: name for name in ("norm1", "norm2")},
}


def released_encoder(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of `VisionEncoder.state_dict()`, as in `vision_tower.`."""
    theirs = {}
    for name, tensor in ours.items():
        (prefix,) = (prefix for prefix in _PREFIXES if name.startswith(prefix))
        rest = name.removeprefix(prefix)
        if prefix == "trunk.blocks.":
            number, module, kind = rest.split(".")
            rest = f"{number}.{_IN_BLOCK[module]}.{kind}"
        if rest == "proj.weight" and prefix == "trunk.patch_embed.":
            tensor = tensor.unflatten(1, (3, 14, 14))
        theirs[_PREFIXES[prefix] + rest] = tensor.clone()
    return theirs


def released_weights(
    encoder: dict[str, Tensor], decoder: dict[str, Tensor], language: LanguageConfig
) -> dict[str, Tensor]:
    """A dots.llm1 model with an encoder as its files hold it: experts one by one."""
    files = {f"vision_tower.{name}": t for name, t in released_encoder(encoder).items()}
    for name, tensor in to_dots1(decoder, language).items():
        stem, _, part = name.rpartition(".")
        if stem.endswith(".experts"):
            for number, expert in enumerate(tensor):
                if part == "down_proj":
                    files[f"{stem}.{number}.down_proj.weight"] = expert.clone()
                else:
                    gate, up = expert.chunk(2)
                    files[f"{stem}.{number}.gate_proj.weight"] = gate.clone()
                    files[f"{stem}.{number}.up_proj.weight"] = up.clone()
        else:
            files[name] = tensor.clone().contiguous()
    return files


def perturb(module: torch.nn.Module, seed: int) -> None:
    """Add noise to every parameter, norms and biases included."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.2 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            parameter.add_((noise * scale).to(parameter))
