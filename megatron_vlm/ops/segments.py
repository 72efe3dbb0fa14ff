"""Packed segments as a few padded batches: which segments share a batch, and moving rows there.

A packed tensor holds segments (samples, pictures) one after another. Kernels like batches of
one length, so segments of similar length are put into one padded batch, a bucket. The plan
depends on the lengths alone and is kept, so that all layers of a model share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_BUCKET_OVERHEAD = 3e5
"""What one more bucket costs, in score elements x heads x channels (measured on one CPU core)."""


@dataclass(frozen=True, eq=False)
class BucketSide:
    """Where the rows of a packed tensor lie in the buckets, for the queries or for the keys."""

    lengths: tuple[int, ...]
    """Padded length of each bucket, in tokens."""
    gather: tuple[Tensor, ...]
    """Per bucket, int64 [segments * length]: the packed row of each padded row. A padding row
    repeats the last row of its own segment, so that no value of another segment enters."""
    padding: tuple[Tensor | None, ...]
    """Per bucket, int64: which of its rows are padding; None where there are none."""
    scatter: Tensor
    """int64 [tokens]: the row of each token in the concatenation of all buckets. Tokens that
    are in no bucket point at one more row, of zeros, after the last."""
    has_unplaced: bool
    """Whether some tokens are in no bucket."""
    in_order: bool
    """Whether the packed tensor already is the concatenation of the buckets."""


@dataclass(frozen=True, eq=False)
class BucketPlan:
    """Segments grouped into buckets; both sides list the same segments in the same order."""

    sizes: tuple[int, ...]
    """Segments of each bucket."""
    q: BucketSide
    """The queries' rows."""
    kv: BucketSide
    """The keys' and values' rows."""
    key_padding: tuple[Tensor | None, ...]
    """Per bucket, bool [segments, key length], true where a key is padding; None without any."""


def lengths_from_cu_seqlens(cu_seqlens: Tensor, tokens: int) -> tuple[int, ...]:
    """Lengths of the segments bounded by `cu_seqlens`, in tokens.

    Args:
        cu_seqlens: integers [segments + 1], from 0 up to `tokens`, never falling.
        tokens: rows of the packed tensor.

    Raises:
        ValueError: the bounds do not describe `tokens` rows.
    """
    bounds = cu_seqlens.tolist()
    lengths = tuple(end - start for start, end in zip(bounds, bounds[1:], strict=False))
    if not bounds or bounds[0] != 0 or bounds[-1] != tokens or min(lengths, default=0) < 0:
        raise ValueError(
            f"cu_seqlens {bounds} must rise from 0 to the number of tokens, {tokens}, "
            "one bound more than there are segments"
        )
    return lengths


@lru_cache(maxsize=32)
def plan_buckets(
    q_lengths: tuple[int, ...],
    kv_lengths: tuple[int, ...],
    width: int,
    device: torch.device,
) -> BucketPlan:
    """Group segments of similar length so that padding costs less than a further bucket.

    Args:
        q_lengths: tokens of each segment's queries.
        kv_lengths: tokens of each segment's keys; `q_lengths` itself for self-attention.
        width: heads x channels, the cost of one element of the score matrix.
        device: where the index tensors are made.

    A segment without queries or without keys is in no bucket.
    """
    order = sorted(
        (i for i, (q, kv) in enumerate(zip(q_lengths, kv_lengths, strict=True)) if q and kv),
        key=lambda i: (-kv_lengths[i], -q_lengths[i], i),
    )
    groups: list[list[int]] = []
    wasted = 0
    q_longest = 0
    for i in order:
        if groups:
            # The keys' longest comes first; a longer query lengthens every segment before it.
            longest = max(q_longest, q_lengths[i])
            kv_longest = kv_lengths[groups[-1][0]]
            growth = (longest - q_longest) * kv_longest * len(groups[-1])
            wasted += longest * kv_longest - q_lengths[i] * kv_lengths[i] + growth
        if not groups or wasted * width > _BUCKET_OVERHEAD:
            groups.append([])
            wasted, longest = 0, q_lengths[i]
        groups[-1].append(i)
        q_longest = longest
    for group in groups:
        group.sort()
    groups.sort()
    q = _bucket_side(q_lengths, groups, device)
    kv = q if kv_lengths == q_lengths else _bucket_side(kv_lengths, groups, device)
    return BucketPlan(
        sizes=tuple(len(group) for group in groups),
        q=q,
        kv=kv,
        key_padding=tuple(
            None
            if rows is None
            else torch.zeros(len(group) * length, dtype=torch.bool, device=device)
            .index_fill_(0, rows, True)
            .view(len(group), length)
            for group, length, rows in zip(groups, kv.lengths, kv.padding, strict=True)
        ),
    )


def _bucket_side(
    lengths: tuple[int, ...], groups: list[list[int]], device: torch.device
) -> BucketSide:
    starts = torch.tensor((0, *lengths)).cumsum(0)
    sizes = torch.tensor(lengths, dtype=torch.int64)
    total = int(starts[-1])
    longest = tuple(max(lengths[i] for i in group) for group in groups)
    padded_total = sum(len(group) * length for group, length in zip(groups, longest, strict=True))
    scatter = torch.full((total,), padded_total, dtype=torch.int64)
    gather, padding = [], []
    offset = 0
    for group, length in zip(groups, longest, strict=True):
        members = torch.tensor(group)
        within = torch.arange(length)
        real = (within < sizes[members, None]).flatten()
        rows = starts[members, None] + torch.minimum(within, sizes[members, None] - 1)
        rows = rows.flatten()
        scatter[rows[real]] = offset + real.nonzero().flatten()
        offset += rows.numel()
        gather.append(rows.to(device))
        padding.append(None if bool(real.all()) else (~real).nonzero().flatten().to(device))
    return BucketSide(
        lengths=longest,
        gather=tuple(gather),
        padding=tuple(padding),
        scatter=scatter.to(device),
        has_unplaced=bool((scatter == padded_total).any()),
        in_order=len(groups) == 1
        and padded_total == total
        and bool((scatter == torch.arange(total)).all()),
    )


def to_buckets(packed: Tensor, side: BucketSide) -> tuple[Tensor, ...]:
    """Copy a packed tensor [tokens, heads, channels] into its buckets, differentiably.

    Bucket i comes back heads first, [heads, segments * length, channels], as batched matrix
    products want it. A padding row repeats a row of its segment; gradients that reach it are
    dropped.
    """
    if side.in_order:
        return (packed.transpose(0, 1),)
    return _ToBuckets.apply(packed, side)


def from_buckets(buckets: Sequence[Tensor], side: BucketSide) -> Tensor:
    """Copy buckets [heads, segments * length, channels] back to [tokens, heads, channels].

    Differentiable. Tokens that are in no bucket are zero; padding rows are left out and get
    zero gradients.
    """
    if side.in_order:
        return buckets[0].transpose(0, 1)
    return _FromBuckets.apply(side, *buckets)


def _split(packed: Tensor, side: BucketSide) -> list[Tensor]:
    heads_first = packed.transpose(0, 1)
    return [heads_first.index_select(1, rows) for rows in side.gather]


def _join(buckets: Sequence[Tensor], side: BucketSide) -> Tensor:
    parts = [bucket.transpose(0, 1) for bucket in buckets]
    if side.has_unplaced:
        parts.append(parts[0].new_zeros(1, *parts[0].shape[1:]))
    return torch.cat(parts).index_select(0, side.scatter)


class _ToBuckets(torch.autograd.Function):
    """Each token lies in one place, so both directions are gathers: no accumulation."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, side: BucketSide) -> tuple[Tensor, ...]:
        ctx.side = side
        return tuple(_split(packed, side))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _join(grads, ctx.side), None


class _FromBuckets(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, side: BucketSide, *buckets: Tensor) -> Tensor:
        ctx.side = side
        return _join(buckets, side)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = _split(grad, ctx.side)
        for bucket, padding in zip(grads, ctx.side.padding, strict=True):
            if padding is not None:
                # Padding queries would otherwise send gradients to real keys.
                bucket.index_fill_(1, padding, 0)
        return None, *grads
