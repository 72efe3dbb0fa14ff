"""NaViT: packed pictures of any size through one bidirectional transformer.

dots.vlm1's trunk (configuration published with dots.ocr): a 14x14 patch embedding and RMS norm,
pre-norm blocks with 2-D rotary attention isolated per picture and SwiGLU, no biases, a final norm.
By configuration a plain MLP in the place of SwiGLU (Seed-ViT), and normalised queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_vlm.config.model_schema import VisionConfig
from megatron_vlm.ops.attention import packed_attention
from megatron_vlm.ops.rotary import apply_rotary, vision_position_ids, vision_rotary

Recompute = Literal["none", "selective", "full"]


class PatchEmbed(nn.Module):
    """A convolution over whole patches, as a linear map, and a norm."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        channels = config.in_channels * config.patch_size**2
        self.proj = nn.Linear(channels, config.hidden_size)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[patches, channels * patch_size**2] -> [patches, hidden]."""
        return self.norm(self.proj(pixel_values))


class Block(nn.Module):
    """Attention and a feed-forward, each behind a norm and added to its input."""

    def __init__(self, config: VisionConfig, recompute: Recompute) -> None:
        super().__init__()
        hidden, inner, epsilon = (
            config.hidden_size,
            config.ffn_hidden_size,
            config.layernorm_epsilon,
        )
        self.heads = config.num_attention_heads
        self.recompute_parts = recompute == "selective"
        self.norm1 = nn.RMSNorm(hidden, eps=epsilon)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.q_norm = self.k_norm = None
        if config.qk_layernorm:
            self.q_norm = nn.RMSNorm(hidden // self.heads, eps=epsilon)
            self.k_norm = nn.RMSNorm(hidden // self.heads, eps=epsilon)
        self.proj = nn.Linear(hidden, hidden, bias=False)
        self.norm2 = nn.RMSNorm(hidden, eps=epsilon)
        self.fc1 = nn.Linear(hidden, inner, bias=False)
        self.fc3 = nn.Linear(hidden, inner, bias=False) if config.gated_linear_unit else None
        self.fc2 = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor, rotary: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        """[patches, hidden] -> the same shape."""
        qkv = self.qkv(self.norm1(x))
        attended = self._run(self._attend, qkv, rotary, cu_seqlens, longest)
        x = x + self.proj(attended)
        y = self.norm2(x)
        if self.fc3 is None:
            return x + self.fc2(F.gelu(self.fc1(y)))
        return x + self.fc2(self._run(_swiglu, self.fc1(y), self.fc3(y)))

    def _attend(self, qkv: Tensor, rotary: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        return packed_attention(q, k, v, cu_seqlens, causal=False, max_seqlen=longest).flatten(1)

    def _run(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        if self.recompute_parts and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
        return function(*args)


class NaViT(nn.Module):
    """The trunk. Its weights are filled by name later (models/initialize.py)."""

    def __init__(self, config: VisionConfig, recompute: Recompute = "none") -> None:
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(Block(config, recompute) for _ in range(config.num_layers))
        self.post_trunk_norm = nn.RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, pixel_values: Tensor, grid_hw: Tensor) -> Tensor:
        """Encode packed pictures, each on its own.

        Args:
            pixel_values: [patches, channels * patch_size**2], in merge-block order.
            grid_hw: int64 [pictures, 2], patches along height and width.

        Returns:
            [patches, hidden].

        Raises:
            ValueError: the grids do not add up to `patches`, or a side is no multiple of
                `spatial_merge_size`.
        """
        config = self.config
        places = vision_position_ids(grid_hw, config.spatial_merge_size)
        if places.size(0) != pixel_values.size(0):
            raise ValueError(
                f"pixel_values holds {pixel_values.size(0)} patches, but grid_hw "
                f"{grid_hw.tolist()} adds up to {places.size(0)}"
            )
        x = self.patch_embed(pixel_values)
        work = torch.promote_types(x.dtype, torch.float32)
        head_dim = config.hidden_size // config.num_attention_heads
        rotary = vision_rotary(places, head_dim, config.rotary_base, work)
        lengths = grid_hw.prod(dim=1)
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        longest = int(lengths.max()) if lengths.numel() else 0
        for block in self.blocks:
            if self.recompute == "full" and torch.is_grad_enabled():
                x = checkpoint(
                    block,
                    x,
                    rotary,
                    cu_seqlens,
                    longest,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                x = block(x, rotary, cu_seqlens, longest)
        return self.post_trunk_norm(x)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up
