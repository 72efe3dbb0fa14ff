"""The MLP between the towers: a block of patches becomes one language token."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_vlm.config.schema import AdapterConfig, VisionConfig


class Adapter(nn.Module):
    """Norm each patch, join the patches of a block, linear, GELU, linear (dots.vlm1's merger)."""

    def __init__(
        self, config: AdapterConfig, vision: VisionConfig, language_hidden_size: int
    ) -> None:
        super().__init__()
        self.joined = vision.hidden_size * vision.spatial_merge_size**2
        self.norm = nn.LayerNorm(vision.hidden_size, eps=config.layernorm_epsilon)
        self.fc1 = nn.Linear(self.joined, self.joined)
        self.fc2 = nn.Linear(self.joined, language_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[patches, vision hidden], blocks consecutive -> [tokens, language hidden]."""
        return self.fc2(F.gelu(self.fc1(self.norm(x).view(-1, self.joined))))
