"""Trunk and adapter as one module: from patches to language tokens."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_vlm.config.model_schema import AdapterConfig, VisionConfig
from megatron_vlm.models.adapter import Adapter
from megatron_vlm.models.vision.navit import NaViT, Recompute
from megatron_vlm.models.vision.sharing import SharedPictures


class VisionEncoder(nn.Module):
    """What every rank holds of the vision side."""

    def __init__(
        self,
        vision: VisionConfig,
        adapter: AdapterConfig,
        language_hidden_size: int,
        recompute: Recompute = "none",
    ) -> None:
        super().__init__()
        self.trunk = NaViT(vision, recompute)
        self.adapter = Adapter(adapter, vision, language_hidden_size)

    def forward(
        self, pixel_values: Tensor, grid_hw: Tensor, sharing: SharedPictures | None = None
    ) -> Tensor:
        """[patches, channels * patch_size**2] and int64 [pictures, 2] -> [tokens, hidden].

        With `sharing`, the patches and tokens of shared pictures are those of this rank.
        """
        return self.adapter(self.trunk(pixel_values, grid_hw, sharing))
