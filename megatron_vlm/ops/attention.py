"""Attention over packed segments: no token sees another segment.

On CUDA in half precision torch's variable-length attention does it. Everywhere else the
segments become a few padded batches (`segments.py`) for `scaled_dot_product_attention`, whose
fused kernels never hold the score matrix.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vlm.ops.segments import (
    BucketPlan,
    from_buckets,
    lengths_from_cu_seqlens,
    plan_buckets,
    to_buckets,
)

_VARLEN_MAX_CHANNELS = 256
"""Widest head that flash attention accepts."""


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    max_seqlen: int | None = None,
    cu_seqlens_kv: Tensor | None = None,
    max_seqlen_kv: int | None = None,
) -> Tensor:
    """Softmax attention within each segment of a packed row.

    Args:
        q: [tokens, heads, head_dim], any floating type.
        k: [kv_tokens, kv_heads, head_dim]; `kv_heads` divides `heads`, and query head h reads
            key head h * kv_heads // heads.
        v: [kv_tokens, kv_heads, value_dim].
        cu_seqlens: integers [segments + 1], the bounds of the segments in tokens, from 0 to
            `tokens`, on CPU or on q's device. Empty segments are allowed.
        causal: whether a token sees only itself and those before it.
        scale: factor on the scores; None means head_dim ** -0.5.
        max_seqlen: length of the longest segment in tokens; saves a device synchronisation
            on CUDA, unused elsewhere.
        cu_seqlens_kv: the bounds of the segments' keys, where they are others than the queries':
            each query sees all keys of its segment. None means those of the queries.
        max_seqlen_kv: keys of the longest segment, like `max_seqlen`; None without
            `cu_seqlens_kv`.

    Returns:
        [tokens, heads, value_dim] in q's type. On CPU half precision is computed in float32.

    Raises:
        ValueError: shapes or bounds do not fit each other, or keys have bounds of their own under
            a causal mask.
    """
    _check_shapes(q, k, v)
    if cu_seqlens_kv is None:
        if k.shape[0] != q.shape[0]:
            raise ValueError(
                f"k has {k.shape[0]} tokens and q has {q.shape[0]}; they must be equal"
            )
        cu_seqlens_kv, max_seqlen_kv = cu_seqlens, max_seqlen
    elif causal:
        raise ValueError(
            "cu_seqlens_kv with a causal mask: which key is before which query is not told; use "
            "packed_attention_with_mask_lengths"
        )
    elif len(cu_seqlens_kv) != len(cu_seqlens):
        raise ValueError(
            f"cu_seqlens bounds {len(cu_seqlens) - 1} segments and cu_seqlens_kv "
            f"{len(cu_seqlens_kv) - 1}; they must be the same segments"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if _varlen_fits(q, v):
        bounds = (cu_seqlens, cu_seqlens_kv)
        return _varlen(q, k, v, bounds, causal, scale, (max_seqlen, max_seqlen_kv))
    lengths = lengths_from_cu_seqlens(cu_seqlens, q.shape[0])
    kv_lengths = lengths
    if cu_seqlens_kv is not cu_seqlens:
        kv_lengths = lengths_from_cu_seqlens(cu_seqlens_kv, k.shape[0])
    plan = plan_buckets(lengths, kv_lengths, q.shape[1] * q.shape[2], q.device)

    def kernel(bucket: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Padding sits at the end of a segment: under a causal mask no real query sees it.
        padding = None if causal else plan.key_padding[bucket]
        visible = None if padding is None else ~padding[:, None, None, :]
        return _attend(q, k, v, scale, visible, causal)

    return _attend_buckets(q, k, v, plan, kernel)


def packed_attention_with_mask_lengths(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    q_positions: Tensor,
    kv_positions: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Causal attention within each segment where queries and keys are different subsets.

    For context parallelism: a rank holds part of each segment's queries, in any order, and all
    of its keys, in any order. A query sees the keys of its segment whose position is not above
    its own; one that sees no key gives zero. The mask is explicit, so that memory grows with
    queries x keys of the longest segment.

    Args:
        q: [q_tokens, heads, head_dim].
        k: [kv_tokens, kv_heads, head_dim].
        v: [kv_tokens, kv_heads, value_dim].
        cu_seqlens_q: integers [segments + 1], bounds of each segment's queries.
        cu_seqlens_kv: integers [segments + 1], bounds of each segment's keys.
        q_positions: int64 [q_tokens], each query's place within its segment.
        kv_positions: int64 [kv_tokens], each key's place within its segment.
        scale: factor on the scores; None means head_dim ** -0.5.

    Returns:
        [q_tokens, heads, value_dim] in q's type. On CPU half precision is computed in float32.

    Raises:
        ValueError: shapes or bounds do not fit each other.
    """
    _check_shapes(q, k, v)
    if q_positions.shape != q.shape[:1] or kv_positions.shape != k.shape[:1]:
        raise ValueError(
            f"q_positions {list(q_positions.shape)} and kv_positions {list(kv_positions.shape)} "
            f"must give one place for each of {q.shape[0]} queries and {k.shape[0]} keys"
        )
    q_lengths = lengths_from_cu_seqlens(cu_seqlens_q, q.shape[0])
    kv_lengths = lengths_from_cu_seqlens(cu_seqlens_kv, k.shape[0])
    if len(q_lengths) != len(kv_lengths):
        raise ValueError(
            f"cu_seqlens_q bounds {len(q_lengths)} segments and cu_seqlens_kv "
            f"{len(kv_lengths)}; they must be the same segments"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    plan = plan_buckets(q_lengths, kv_lengths, q.shape[1] * q.shape[2], q.device)
    q_places = to_buckets(q_positions.to(q.device), plan, plan.q)
    kv_places = to_buckets(kv_positions.to(q.device), plan, plan.kv)

    def kernel(bucket: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_place = q_places[bucket][:, :, None]
        kv_place = kv_places[bucket][:, None, :]
        padding = plan.key_padding[bucket]
        if padding is not None:
            never = torch.iinfo(kv_place.dtype).max
            kv_place = kv_place.masked_fill(padding[:, None, :], never)
        # A row without any key would be 0/0: let it see all keys, then give it zero.
        blind = q_place < kv_place.amin(-1, keepdim=True)
        visible = (kv_place <= q_place) | blind
        out = _attend(q, k, v, scale, visible[:, None], False)
        return out.masked_fill(blind[..., None], 0)

    return _attend_buckets(q, k, v, plan, kernel)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    if (
        q.dim() != 3
        or k.dim() != 3
        or v.dim() != 3
        or k.shape[:2] != v.shape[:2]
        or q.shape[2] != k.shape[2]
        or q.shape[1] % k.shape[1]
    ):
        raise ValueError(
            "packed attention expects q [tokens, heads, head_dim], k [tokens, kv_heads, head_dim] "
            "and v [tokens, kv_heads, value_dim] with kv_heads dividing heads; got "
            f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )


def _attend_buckets(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BucketPlan,
    kernel: Callable[[int, Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Run `kernel(bucket, q, k, v)` on [segments, length, heads, channels] for every bucket."""
    dtype = q.dtype
    if not plan.groups:
        # Nothing to attend to, but gradients of zero must still reach every weight behind.
        nothing = (q.sum() + k.sum() + v.sum()) * 0
        return q.new_zeros(q.shape[0], q.shape[1], v.shape[2]) + nothing
    if q.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
        # The fused CPU kernel's half-precision backward is up to 20 times slower than float32.
        q, k, v = q.float(), k.float(), v.float()
    buckets = zip(
        to_buckets(q, plan, plan.q),
        to_buckets(k, plan, plan.kv),
        to_buckets(v, plan, plan.kv),
        strict=True,
    )
    outputs = [kernel(bucket, *rows) for bucket, rows in enumerate(buckets)]
    return from_buckets(outputs, plan, plan.q).to(dtype)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor | None, causal: bool
) -> Tensor:
    """Attention on a padded batch.

    q is [batch, q_length, heads, head_dim], k and v [batch, kv_length, kv_heads, ...], `visible`
    bool [batch, 1, 1 or q_length, kv_length] or None for all.
    Returns [batch, q_length, heads, value_dim].
    """
    # The fused kernels need one head size; channels of zeros change no score.
    value_dim = v.shape[-1]
    widest = max(q.shape[-1], value_dim)
    q, k, v = (_widen(x, widest).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=visible,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.transpose(1, 2)[..., :value_dim]


def _widen(x: Tensor, channels: int) -> Tensor:
    return F.pad(x, (0, channels - x.shape[-1])) if x.shape[-1] < channels else x


@lru_cache(maxsize=1)
def _varlen_options() -> frozenset[str]:
    """What torch's variable-length attention can be told; nothing where torch has none."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return frozenset()
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _varlen_fits(q: Tensor, v: Tensor) -> bool:
    return (
        q.is_cuda
        and q.shape[0] > 0
        and q.dtype in (torch.bfloat16, torch.float16)
        and max(q.shape[-1], v.shape[-1]) <= _VARLEN_MAX_CHANNELS
        # Older ones know no window and no scale.
        and {"window_size", "scale"} <= _varlen_options()
    )


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: tuple[Tensor, Tensor],
    causal: bool,
    scale: float,
    max_seqlens: tuple[int | None, int | None],
) -> Tensor:
    """torch's variable-length flash attention, which wants one head size, a multiple of 8.

    Bounds and longest segments are those of the queries and of the keys; the same object where
    they do not differ.
    """
    from torch.nn.attention.varlen import varlen_attn

    q_longest, kv_longest = max_seqlens
    if q_longest is None:
        q_longest = max(lengths_from_cu_seqlens(cu_seqlens[0], q.shape[0]))
    q_bounds = kv_bounds = cu_seqlens[0].to(device=q.device, dtype=torch.int32)
    if cu_seqlens[1] is cu_seqlens[0]:
        kv_longest = q_longest
    else:
        kv_bounds = cu_seqlens[1].to(device=q.device, dtype=torch.int32)
        if kv_longest is None:
            kv_longest = max(lengths_from_cu_seqlens(cu_seqlens[1], k.shape[0]))
    value_dim = v.shape[-1]
    widest = -(-max(q.shape[-1], value_dim) // 8) * 8
    q, k, v = (_widen(x, widest) for x in (q, k, v))
    options: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in _varlen_options():
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    out = varlen_attn(
        q,
        k,
        v,
        q_bounds,
        kv_bounds,
        q_longest,
        kv_longest,
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
        **options,
    )
    assert isinstance(out, Tensor)
    return out[..., :value_dim]
