"""The picture encoder of dots.vlm1 and dots.ocr: a NaViT, and a merger to the decoder's width.

Weights have the names that they were released under. Fields of the configuration allow for
Seed-ViT's choices too. Written by megatron-vlm; needs nothing but transformers and torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig


class VisionConfig(PreTrainedConfig):
    """The encoder. Defaults are dots.vlm1's."""

    model_type = "dots_vit"
    base_config_key = "vision_config"

    embed_dim: int = 1536
    """Width of the encoder."""
    hidden_size: int = 1536
    """Width of the decoder, which the features have."""
    intermediate_size: int = 4224
    num_hidden_layers: int = 42
    num_attention_heads: int = 12
    num_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 1
    rms_norm_eps: float = 1e-5
    use_bias: bool = False
    is_causal: bool = False
    post_norm: bool = True
    initializer_range: float = 0.02
    init_merger_std: float = 0.02
    rotary_base: float = 10000.0
    gated_linear_unit: bool = True
    """SwiGLU of three matrices; false: GELU between two."""
    qk_layernorm: bool = False
    """RMS norm of each head's query and key before the rotary embedding."""
    merge: str = "concatenate"
    """How the patches of a block become one: `concatenate` or `average`."""
    merger_hidden_size: int | None = None
    """Width between the merger's linear maps; null: that of a merged block."""
    merger_norm_eps: float = 1e-6


class PatchEmbed(nn.Module):
    """Whole patches through a convolution, and a norm."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patchifier = nn.Module()
        self.patchifier.proj = nn.Conv2d(
            config.num_channels, config.embed_dim, config.patch_size, config.patch_size
        )
        self.patchifier.norm = nn.RMSNorm(config.embed_dim, eps=config.rms_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[patches, channels * patch_size**2] -> [patches, embed_dim]."""
        # Patches come cut out and flattened, so the convolution is a product of matrices.
        proj = self.patchifier.proj
        return self.patchifier.norm(F.linear(pixel_values, proj.weight.flatten(1), proj.bias))


class Attention(nn.Module):
    """Attention within each picture, with 2-D rotary positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, self.heads = config.embed_dim, config.num_attention_heads
        self.is_causal = config.is_causal
        self.qkv = nn.Linear(width, 3 * width, bias=config.use_bias)
        self.proj = nn.Linear(width, width, bias=config.use_bias)
        self.qk_layernorm = config.qk_layernorm
        if self.qk_layernorm:
            self.q_norm = nn.RMSNorm(width // self.heads, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(width // self.heads, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], lengths: list[int]) -> Tensor:
        """[patches, embed_dim] -> the same; `lengths` are the pictures' numbers of patches."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)
        if self.qk_layernorm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        q, k, v = (part.transpose(0, 1)[None].split(lengths, dim=2) for part in (q, k, v))
        attended = [
            F.scaled_dot_product_attention(*picture, is_causal=self.is_causal)
            for picture in zip(q, k, v, strict=True)
        ]
        return self.proj(torch.cat(attended, dim=2)[0].transpose(0, 1).flatten(1))


class FeedForward(nn.Module):
    """SwiGLU, or GELU between two linear maps."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, inner, bias = config.embed_dim, config.intermediate_size, config.use_bias
        self.fc1 = nn.Linear(width, inner, bias=bias)
        self.fc2 = nn.Linear(inner, width, bias=bias)
        self.gated = config.gated_linear_unit
        if self.gated:
            self.fc3 = nn.Linear(width, inner, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[patches, embed_dim] -> the same."""
        return self.fc2(F.silu(self.fc1(x)) * self.fc3(x) if self.gated else F.gelu(self.fc1(x)))


class VisionBlock(nn.Module):
    """Attention and feed-forward, each behind a norm and added to its input."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(config.embed_dim, eps=config.rms_norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.RMSNorm(config.embed_dim, eps=config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], lengths: list[int]) -> Tensor:
        """[patches, embed_dim] -> the same."""
        x = x + self.attn(self.norm1(x), rotary, lengths)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """A block of patches becomes one feature of the decoder's width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        if config.merge not in ("concatenate", "average"):
            raise ValueError(f"merge {config.merge!r}: expected concatenate or average")
        self.average, self.block = config.merge == "average", config.spatial_merge_size**2
        merged = config.embed_dim * (1 if self.average else self.block)
        inner = config.merger_hidden_size or merged
        self.ln_q = nn.LayerNorm(config.embed_dim, eps=config.merger_norm_eps)
        self.mlp = nn.Sequential(
            nn.Linear(merged, inner), nn.GELU(), nn.Linear(inner, config.hidden_size)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[patches, embed_dim], blocks one after another -> [features, hidden_size]."""
        blocks = self.ln_q(x).unflatten(0, (-1, self.block))
        return self.mlp(blocks.mean(1) if self.average else blocks.flatten(1))


class VisionTower(nn.Module):
    """The whole encoder: packed pictures of any sizes, each seen on its own."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.num_hidden_layers))
        if config.post_norm:
            self.post_trunk_norm = nn.RMSNorm(config.embed_dim, eps=config.rms_norm_eps)
        self.merger = Merger(config)

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """Encode pictures.

        Args:
            pixel_values: [patches, channels * patch_size**2], blocks of patches one after another.
            grid_thw: int64 [pictures, 3], frames (1 for a picture), patches along height and width.

        Returns:
            [patches / spatial_merge_size**2, hidden_size].
        """
        config = self.config
        places = patch_places(grid_thw, config.spatial_merge_size)
        if len(places) != len(pixel_values):
            raise ValueError(
                f"pixel_values holds {len(pixel_values)} patches, but image_grid_thw "
                f"{grid_thw.tolist()} adds up to {len(places)}"
            )
        lengths = [h * w for t, h, w in grid_thw.tolist() for _ in range(t)]
        x = self.patch_embed(pixel_values.to(self.patch_embed.patchifier.proj.weight))
        precision = torch.promote_types(x.dtype, torch.float32)
        head_dim = config.embed_dim // config.num_attention_heads
        rotary = rotary_embedding(places.to(x.device), head_dim, config.rotary_base, precision)
        for block in self.blocks:
            x = block(x, rotary, lengths)
        return self.merger(self.post_trunk_norm(x) if config.post_norm else x)


def patch_places(grid_thw: Tensor, merge: int) -> Tensor:
    """(row, column) of each patch [patches, 2], in blocks of `merge` x `merge` patches."""
    places = []
    for frames, height, width in grid_thw.tolist():
        if height % merge or width % merge:
            raise ValueError(f"image_grid_thw {height}x{width}: expected multiples of {merge}")
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        raster = torch.stack([rows, columns], dim=-1)
        blocks = raster.view(height // merge, merge, width // merge, merge, 2).transpose(1, 2)
        places.append(blocks.reshape(-1, 2).repeat(frames, 1))
    return torch.cat(places)


def rotary_embedding(
    places: Tensor, head_dim: int, base: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [patches, 1, head_dim]: half of the channels for rows, half for columns."""
    half = head_dim // 2
    frequencies = base ** -(torch.arange(0, half, 2, dtype=dtype, device=places.device) / half)
    angles = (places.to(dtype)[:, :, None] * frequencies).flatten(1)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate [patches, heads, head_dim] in the precision of `cosine`."""
    wide = x.to(cosine.dtype)
    first, second = wide.chunk(2, dim=-1)
    return (wide * cosine + torch.cat([-second, first], dim=-1) * sine).to(x.dtype)
