"""The MLP between the towers: a block of patches becomes one language token."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_vlm.config.model_schema import AdapterConfig, VisionConfig


class Adapter(nn.Module):
    """Norm each patch, merge the patches of a block, linear, GELU, linear.

    They are merged side by side (dots.vlm1's merger) or as their mean (Seed1.5-VL).
    """

    def __init__(
        self, config: AdapterConfig, vision: VisionConfig, language_hidden_size: int
    ) -> None:
        super().__init__()
        self.average = config.merge == "average"
        self.block = vision.spatial_merge_size**2
        merged, inner = config.widths(vision)
        self.norm = nn.LayerNorm(vision.hidden_size, eps=config.layernorm_epsilon)
        self.fc1 = nn.Linear(merged, inner)
        self.fc2 = nn.Linear(inner, language_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[patches, vision hidden], blocks consecutive -> [tokens, language hidden]."""
        blocks = self.norm(x).unflatten(0, (-1, self.block))
        merged = blocks.mean(1) if self.average else blocks.flatten(1)
        return self.fc2(F.gelu(self.fc1(merged)))
