"""Packed segments as a few padded batches: which segments share a batch, and moving rows there.

A packed tensor holds segments (samples, pictures) one after another. A kernel call has a cost
of its own, so that short segments are gathered into padded batches, buckets, of similar length;
long ones stay where they are. The plan depends on the lengths alone and is kept, so that all
layers of a model share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_BUCKET_COST = 6e5
"""What one more bucket costs, in score elements x channels (measured on one CPU core)."""

_ALONE = 8192
"""Tokens x channels from which a segment is cheaper alone than copied (measured likewise)."""


@dataclass(frozen=True, eq=False)
class BucketSide:
    """Where the segments of a packed tensor lie in the buckets, for the queries or the keys."""

    starts: tuple[int, ...]
    """First packed row of each segment, then the number of rows."""
    lengths: tuple[int, ...]
    """Padded length of each bucket, in tokens."""
    gather: tuple[Tensor | None, ...]
    """Per bucket, int64 [segments * length]: the packed row of each padded row; None where its
    segments are neighbours of one length. A padding row repeats the last row of its own segment,
    so that no value of another segment enters."""
    padding: tuple[Tensor | None, ...]
    """Per bucket, int64: which of its rows are padding; None where there are none."""


@dataclass(frozen=True, eq=False)
class BucketPlan:
    """Segments grouped into buckets; both sides list the same segments in the same order."""

    groups: tuple[tuple[int, ...], ...]
    """The segments of each bucket."""
    places: tuple[tuple[int, int] | None, ...]
    """Each segment's bucket and its row there; None for a segment without queries or keys."""
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
    """Group segments so that copying and padding cost less than the kernel calls they save.

    Args:
        q_lengths: tokens of each segment's queries.
        kv_lengths: tokens of each segment's keys; equal to `q_lengths` for self-attention.
        width: heads x channels.
        device: where the index tensors are made.

    A segment without queries or without keys is in no bucket.
    """
    groups = tuple(_group(q_lengths, kv_lengths, width))
    places: list[tuple[int, int] | None] = [None] * len(q_lengths)
    for bucket, group in enumerate(groups):
        for row, segment in enumerate(group):
            places[segment] = (bucket, row)
    q = _bucket_side(q_lengths, groups, device)
    kv = q if kv_lengths == q_lengths else _bucket_side(kv_lengths, groups, device)
    key_padding: list[Tensor | None] = []
    for group, length, rows in zip(groups, kv.lengths, kv.padding, strict=True):
        if rows is None:
            key_padding.append(None)
            continue
        mask = torch.zeros(len(group) * length, dtype=torch.bool, device=device)
        key_padding.append(mask.index_fill_(0, rows, True).view(len(group), length))
    return BucketPlan(groups, tuple(places), q, kv, tuple(key_padding))


def _group(
    q_lengths: tuple[int, ...], kv_lengths: tuple[int, ...], width: int
) -> list[tuple[int, ...]]:
    """Long segments alone; short ones, longest first, until a bucket's padding outweighs it."""
    alone: list[tuple[int, ...]] = []
    groups: list[list[int]] = []
    waste = q_longest = kv_longest = 0
    order = sorted(range(len(q_lengths)), key=lambda i: (-kv_lengths[i], -q_lengths[i], i))
    for i in order:
        q, kv = q_lengths[i], kv_lengths[i]
        if not q or not kv:
            continue
        if max(q, kv) * width >= _ALONE:
            alone.append((i,))
            continue
        if groups:
            # A longer query lengthens every segment that is there already.
            growth = max(0, q - q_longest) * kv_longest * len(groups[-1])
            waste += max(q, q_longest) * kv_longest - q * kv + growth
        if not groups or waste * width > _BUCKET_COST:
            groups.append([])
            waste, q_longest, kv_longest = 0, q, kv
        groups[-1].append(i)
        q_longest = max(q, q_longest)
    return alone + [tuple(sorted(group)) for group in groups]


def _bucket_side(
    lengths: tuple[int, ...], groups: tuple[tuple[int, ...], ...], device: torch.device
) -> BucketSide:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    longest = tuple(max(lengths[i] for i in group) for group in groups)
    gather: list[Tensor | None] = []
    padding: list[Tensor | None] = []
    for group, length in zip(groups, longest, strict=True):
        neighbours = group[-1] - group[0] == len(group) - 1
        if neighbours and all(lengths[i] == length for i in group):
            gather.append(None)
            padding.append(None)
            continue
        first = torch.tensor([[starts[i]] for i in group], device="cpu")
        size = torch.tensor([[lengths[i]] for i in group], device="cpu")
        within = torch.arange(length, device="cpu")
        gather.append((first + torch.minimum(within, size - 1)).flatten().to(device))
        surplus = (within >= size).flatten().nonzero().flatten()
        padding.append(surplus.to(device) if surplus.numel() else None)
    return BucketSide(tuple(starts), longest, tuple(gather), tuple(padding))


def to_buckets(packed: Tensor, plan: BucketPlan, side: BucketSide) -> tuple[Tensor, ...]:
    """A packed tensor [tokens, ...] in buckets [segments, length, ...], differentiably.

    Neighbours of one length are a view, all else a copy. A padding row repeats a row of its
    segment, and gradients that reach it are dropped.
    """
    buckets: tuple[Tensor, ...] = _ToBuckets.apply(packed, plan, side)
    return buckets


def from_buckets(buckets: Sequence[Tensor], plan: BucketPlan, side: BucketSide) -> Tensor:
    """Buckets [segments, length, ...] back in packed order [tokens, ...], differentiably.

    Segments that are in no bucket are zero; padding rows are left out and get zero gradients.
    """
    packed: Tensor = _FromBuckets.apply(plan, side, *buckets)
    return packed


def _split(packed: Tensor, plan: BucketPlan, side: BucketSide) -> list[Tensor]:
    buckets = []
    for group, length, rows in zip(plan.groups, side.lengths, side.gather, strict=True):
        if rows is None:
            bucket = packed.narrow(0, side.starts[group[0]], len(group) * length)
        else:
            bucket = packed.index_select(0, rows)
        buckets.append(bucket.unflatten(0, (len(group), length)))
    return buckets


def _join(buckets: Sequence[Tensor], plan: BucketPlan, side: BucketSide) -> Tensor:
    like = buckets[0]
    parts = []
    for i, place in enumerate(plan.places):
        length = side.starts[i + 1] - side.starts[i]
        if place is None:
            parts.append(like.new_zeros(length, *like.shape[2:]))
            continue
        bucket, row = place
        if side.gather[bucket] is not None:
            parts.append(buckets[bucket][row, :length])
        elif row == 0:
            parts.append(buckets[bucket].flatten(0, 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _ToBuckets(torch.autograd.Function):
    """Each token lies in one place, so neither direction accumulates."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, plan: BucketPlan, side: BucketSide) -> tuple[Tensor, ...]:
        ctx.plan, ctx.side = plan, side
        return tuple(_split(packed, plan, side))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _join(grads, ctx.plan, ctx.side), None, None


class _FromBuckets(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: BucketPlan, side: BucketSide, *buckets: Tensor) -> Tensor:
        ctx.plan, ctx.side = plan, side
        return _join(buckets, plan, side)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = _split(grad, ctx.plan, ctx.side)
        for bucket, padding in zip(grads, ctx.side.padding, strict=True):
            if padding is not None:
                # Padding queries would otherwise send gradients to real keys.
                bucket.flatten(0, 1).index_fill_(0, padding, 0)
        return None, None, *grads
