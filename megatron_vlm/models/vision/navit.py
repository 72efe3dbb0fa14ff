"""NaViT: packed pictures of any size through one bidirectional transformer.

dots.vlm1's trunk (configuration published with dots.ocr): a 14x14 patch embedding and RMS norm,
pre-norm blocks with 2-D rotary attention isolated per picture and SwiGLU, no biases, a final norm.
By configuration a plain MLP in the place of SwiGLU (Seed-ViT), and normalised queries and keys.
A picture may lie on several ranks (`sharing.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_vlm.config.model_schema import VisionConfig
from megatron_vlm.models.vision.sharing import KeyValueExchange, SharedPictures
from megatron_vlm.ops.attention import packed_attention
from megatron_vlm.ops.rotary import apply_rotary, vision_position_ids, vision_rotary

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, eq=False)
class Segments:
    """What lies where in a packed row: pictures, or parts of them."""

    cu_seqlens: Tensor
    """int32 [segments + 1], bounds in patches."""
    longest: int
    """Patches of the longest one."""
    exchange: KeyValueExchange | None = None
    """Brings the keys and values of parts together; None where all pictures are whole."""


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

    def forward(self, x: Tensor, rotary: Tensor, segments: Segments) -> Tensor:
        """[patches, hidden] -> the same shape."""
        qkv = self.qkv(self.norm1(x))
        attended = self._run(self._attend, qkv, rotary, segments)
        x = x + self.proj(attended)
        y = self.norm2(x)
        if self.fc3 is None:
            return x + self.fc2(F.gelu(self.fc1(y)))
        return x + self.fc2(self._run(_swiglu, self.fc1(y), self.fc3(y)))

    def _attend(self, qkv: Tensor, rotary: Tensor, segments: Segments) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        cu_seqlens_kv = longest_kv = None
        if (exchange := segments.exchange) is not None:
            k, v = exchange.gather(k, v)
            cu_seqlens_kv, longest_kv = exchange.cu_seqlens, exchange.longest
        attended = packed_attention(
            q,
            k,
            v,
            segments.cu_seqlens,
            causal=False,
            max_seqlen=segments.longest,
            cu_seqlens_kv=cu_seqlens_kv,
            max_seqlen_kv=longest_kv,
        )
        return attended.flatten(1)

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

    def forward(
        self, pixel_values: Tensor, grid_hw: Tensor, sharing: SharedPictures | None = None
    ) -> Tensor:
        """Encode packed pictures, each on its own.

        Args:
            pixel_values: [patches, channels * patch_size**2], in merge-block order; of a picture
                that ranks share, the patches of this one alone.
            grid_hw: int64 [pictures, 2], patches along height and width of whole pictures.
            sharing: which pictures this rank holds a part of, if any. All ranks that share some
                must call this at the same place among the operations of the group.

        Returns:
            [patches, hidden].

        Raises:
            ValueError: the grids and the parts do not add up to `patches`, a side is no multiple
                of `spatial_merge_size`, or a part does not fit its picture or this rank.
            RuntimeError: ranks that share a picture disagree about it.
        """
        config, merge = self.config, self.config.spatial_merge_size
        places = vision_position_ids(grid_hw, merge)
        exchange = None
        lengths = grid_hw.prod(dim=1)
        if sharing is not None and sharing.parts:
            exchange = KeyValueExchange(sharing, grid_hw, merge**2)
            places = exchange.take(places)
            lengths = torch.tensor(exchange.plan.lengths, device=grid_hw.device)
        if places.size(0) != pixel_values.size(0):
            raise ValueError(
                f"pixel_values holds {pixel_values.size(0)} patches, but grid_hw "
                f"{grid_hw.tolist()} adds up to {places.size(0)}"
                + (" on this rank, which holds parts of pictures" if exchange else "")
            )
        if exchange is not None:
            self._agree(exchange, pixel_values)
        x = self.patch_embed(pixel_values)
        work = torch.promote_types(x.dtype, torch.float32)
        head_dim = config.hidden_size // config.num_attention_heads
        rotary = vision_rotary(places, head_dim, config.rotary_base, work)
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        longest = int(lengths.max()) if lengths.numel() else 0
        segments = Segments(cu_seqlens, longest, exchange)
        for block in self.blocks:
            if self.recompute == "full" and torch.is_grad_enabled():
                x = checkpoint(
                    block, x, rotary, segments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = block(x, rotary, segments)
        return self.post_trunk_norm(x)

    def _agree(self, exchange: KeyValueExchange, pixel_values: Tensor) -> None:
        """That this and the ranks that share its pictures will send what the others await."""
        trained = [parameter.requires_grad for parameter in self.parameters()]
        trained.append(pixel_values.requires_grad)
        exchange.agree(
            torch.is_grad_enabled() and any(trained),
            (self.config.num_layers, self.recompute, trained, str(pixel_values.dtype)),
            pixel_values.device,
        )


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up
