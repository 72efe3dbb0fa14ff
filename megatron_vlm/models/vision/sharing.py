"""One picture over several ranks: each encodes a run of its patches, keys and values travel.

Attention is the one operation of the encoder that sees more than a patch or a merge block. So a
rank that holds a part of a picture keeps its queries, and in every block brings together the keys
and values of the whole picture, each part from the rank that holds it; on the way back it sends
the gradients of the others' keys and values home, where they are added up.

Only the ranks that share a picture talk to each other, point to point, all messages of a block in
one batch. A block brings each of them `2 x patches x hidden x element` bytes, patches being those
of the picture that the others hold, and twice that where the block's attention is computed again
in the backward pass; its gradients cost as much again. A picture of 57,600 patches over two ranks
in dots.vlm1's encoder (hidden size 1536, bfloat16): 177 MB a block and direction, against 11.9
TFLOPs of forward work. What is gathered is kept for the backward pass with recompute "none" alone;
"selective" and "full" gather again, so that a rank never holds more than one block's.

No rank waits for a message that none sends, since all that decides on messages is the same on
those that share a picture: the blocks and their order, whether gradients flow (`requires_grad` of
the parameters and of the pixels, grad mode), and what is recomputed. They compare it, and the
parts themselves, in one small message before the first block. NCCL runs what is asked of a group
in turn: ranks that share pictures must ask in the same order for these messages and for any
collective of the group. Reductions of gradients during the backward pass do, being started by the
same blocks on every rank.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """A local segment that is part of a picture: a run of its patches in merge-block order.

    Raises:
        ValueError: the fields do not fit each other.
    """

    segment: int
    """Number of the local segment (row of `grid_hw`)."""
    picture: int
    """A number of the picture, different from others': in its order messages are matched."""
    ranks: tuple[int, ...]
    """The ranks of the group that share it, in the order of its patches."""
    patches: tuple[int, ...]
    """How many patches each of them holds."""
    place: int
    """Which of `ranks` this one is."""

    def __post_init__(self) -> None:
        if len(self.ranks) != len(self.patches) or len(self.ranks) < 2:
            raise ValueError(
                f"{self}: expected patches for each of the ranks, and at least two of them; a "
                "picture of one rank is no part"
            )
        if len(set(self.ranks)) != len(self.ranks):
            raise ValueError(f"{self}: expected each rank once; join its patches")
        if not 0 <= self.place < len(self.ranks):
            raise ValueError(f"{self}: place must be from 0 to {len(self.ranks) - 1}")


@dataclass(frozen=True, eq=False)
class SharedPictures:
    """The parts that this rank holds, and the group whose ranks they name."""

    parts: tuple[Part, ...]
    """In any order; none on a rank that has whole pictures only."""
    group: dist.ProcessGroup
    """The vision mesh's data-parallel group. NCCL wants that all its ranks have run a collective
    in it before, since a batch of messages among some of them cannot be its first operation."""


@dataclass(frozen=True)
class Slice:
    """What another rank holds of a picture."""

    peer: int
    """Rank of the group."""
    start: int
    """First row among the keys."""
    patches: int
    tag: int
    """Tells apart the pictures that two ranks share."""


@dataclass(frozen=True)
class Held:
    """What this rank holds of a picture, and what the others do."""

    start: int
    """First row of its own patches among the keys."""
    local: int
    """The same row among the local patches."""
    patches: int
    place: int
    """How many of `others` come before it in the picture."""
    others: tuple[Slice, ...]
    """In the order of the picture's patches."""


@dataclass(frozen=True)
class SharingPlan:
    """Where everything lies. Keys are those of all local segments, pictures that are shared whole.

    Local patches, as queries have them, are the runs of keys one after another.
    """

    lengths: tuple[int, ...]
    """Local patches of each segment."""
    key_lengths: tuple[int, ...]
    """Patches of each segment's picture."""
    runs: tuple[tuple[int, int], ...]
    """(first key, patches) of the runs of local patches."""
    held: tuple[Held, ...]
    """The parts, by picture: the order of messages, the same on both ends."""


def plan_sharing(
    parts: Sequence[Part], picture_lengths: Sequence[int], unit: int, rank: int
) -> SharingPlan:
    """Lay out the keys of a rank's segments.

    Args:
        parts: those of the segments that are no whole pictures.
        picture_lengths: patches of each segment's picture.
        unit: patches of a merge block.
        rank: this one, in the group.

    Raises:
        ValueError: a part does not fit its segment's picture or this rank.
    """
    by_segment: dict[int, Part] = {}
    for part in parts:
        _check(part, picture_lengths, unit, rank)
        if part.segment in by_segment:
            raise ValueError(f"{part}: segment {part.segment} is also {by_segment[part.segment]}")
        by_segment[part.segment] = part
    if len({part.picture for part in parts}) < len(parts):
        numbers = [part.picture for part in parts]
        raise ValueError(f"parts of pictures {numbers}: a rank holds at most one part of each")
    lengths, starts, start = [], [], 0
    runs: list[tuple[int, int]] = []
    for segment, total in enumerate(picture_lengths):
        before, own = 0, total
        if segment in by_segment:
            part = by_segment[segment]
            before, own = sum(part.patches[: part.place]), part.patches[part.place]
        lengths.append(own)
        starts.append(start)
        if runs and sum(runs[-1]) == start + before:
            runs[-1] = (runs[-1][0], runs[-1][1] + own)
        else:
            runs.append((start + before, own))
        start += total
    held, tags = [], Counter[int]()
    for part in sorted(parts, key=lambda part: part.picture):
        others, first = [], starts[part.segment]
        for peer, patches in zip(part.ranks, part.patches, strict=True):
            if peer == rank:
                own = first
            else:
                others.append(Slice(peer, first, patches, tags[peer]))
                tags[peer] += 1
            first += patches
        local = sum(lengths[: part.segment])
        held.append(Held(own, local, lengths[part.segment], part.place, tuple(others)))
    return SharingPlan(tuple(lengths), tuple(picture_lengths), tuple(runs), tuple(held))


def _check(part: Part, picture_lengths: Sequence[int], unit: int, rank: int) -> None:
    if not 0 <= part.segment < len(picture_lengths):
        raise ValueError(f"{part}: there are {len(picture_lengths)} local segments")
    if part.ranks[part.place] != rank:
        raise ValueError(f"{part}: place {part.place} is that of another rank; this one is {rank}")
    if any(count <= 0 or count % unit for count in part.patches):
        raise ValueError(f"{part}: expected positive multiples of {unit} patches (a merge block)")
    if sum(part.patches) != picture_lengths[part.segment]:
        raise ValueError(
            f"{part}: its patches add up to {sum(part.patches)}, but the picture has "
            f"{picture_lengths[part.segment]}"
        )


class KeyValueExchange:
    """Gathers keys and values of shared pictures in each block of one forward pass."""

    def __init__(self, sharing: SharedPictures, grid_hw: Tensor, unit: int) -> None:
        """Plan for the local segments.

        Args:
            sharing: with at least one part.
            grid_hw: int64 [segments, 2], each segment's whole picture.
            unit: patches of a merge block.

        Raises:
            ValueError: the parts do not fit the segments, this rank or the group.
        """
        self._group = sharing.group
        self._rank, size = dist.get_rank(sharing.group), dist.get_world_size(sharing.group)
        for part in sharing.parts:
            if min(part.ranks) < 0 or max(part.ranks) >= size:
                raise ValueError(f"{part}: the group has ranks 0 to {size - 1}")
        self._parts, self._grids = sharing.parts, [tuple(grid) for grid in grid_hw.tolist()]
        lengths = [height * width for height, width in self._grids]
        self.plan = plan_sharing(sharing.parts, lengths, unit, self._rank)
        bounds = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)
        self.cu_seqlens = bounds.to(grid_hw.device)
        """int32 [segments + 1], the bounds of each segment's keys."""
        self.longest = max(lengths)
        """Keys of the longest segment."""

    def take(self, rows: Tensor) -> Tensor:
        """The local patches' rows out of `[keys, ...]`."""
        return torch.cat([rows.narrow(0, start, count) for start, count in self.plan.runs])

    def agree(self, gradients: bool, about: object, device: torch.device) -> None:
        """Compare with every rank that shares a picture with this one.

        Args:
            gradients: whether the trunk's output requires them.
            about: what else decides on messages; compared by its text.
            device: where messages are made.

        Raises:
            RuntimeError: one of them would send or await other messages.
        """
        shared: dict[int, list[Part]] = {}
        for part in sorted(self._parts, key=lambda part: part.picture):
            for peer in part.ranks:
                if peer != self._rank:
                    shared.setdefault(peer, []).append(part)
        mine = {}
        for peer, parts in shared.items():
            known = [(p.picture, p.ranks, p.patches, self._grids[p.segment]) for p in parts]
            digest = hashlib.blake2b(repr((known, gradients, about)).encode(), digest_size=7)
            patches = sum(sum(part.patches) for part in parts)
            summary = [int.from_bytes(digest.digest(), "big"), len(parts), patches, gradients]
            mine[peer] = torch.tensor(summary, dtype=torch.int64, device=device)
        theirs = {peer: torch.empty_like(summary) for peer, summary in mine.items()}
        self._transfer(
            [(peer, summary, 0) for peer, summary in mine.items()],
            [(peer, summary, 0) for peer, summary in theirs.items()],
        )
        for peer in shared:
            here, there = mine[peer].tolist(), theirs[peer].tolist()
            if here != there:
                raise RuntimeError(
                    f"ranks {self._rank} and {peer} disagree about the pictures they share: "
                    f"{_told(here)} on rank {self._rank}, {_told(there)} on rank {peer}; plan, "
                    "parameters, recompute and grad mode must be alike on all ranks that share"
                )

    def gather(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of whole pictures, differentiably.

        Args:
            k: [patches, heads, head_dim], those of the local patches.
            v: the same.

        Returns:
            Two of [keys, heads, head_dim], bounded by `cu_seqlens`.
        """
        both: Tensor = _Gather.apply(k, v, self)
        gathered_k, gathered_v = both.unbind(1)
        return gathered_k, gathered_v

    def bring(self, k: Tensor, v: Tensor) -> Tensor:
        """Keys and values of whole pictures side by side, [keys, 2, heads, head_dim]."""
        # So a part is one run of memory: it is sent and received where it lies.
        both = k.new_empty(sum(self.plan.key_lengths), 2, *k.shape[1:])
        sizes = [count for _, count in self.plan.runs]
        pieces = zip(self.plan.runs, k.split(sizes), v.split(sizes), strict=True)
        for (start, count), keys, values in pieces:
            rows = both.narrow(0, start, count)
            rows[:, 0], rows[:, 1] = keys, values
        sends, receives = [], []
        for part in self.plan.held:
            own = both.narrow(0, part.start, part.patches)
            for other in part.others:
                sends.append((other.peer, own, other.tag))
                rows = both.narrow(0, other.start, other.patches)
                receives.append((other.peer, rows, other.tag))
        self._transfer(sends, receives)
        return both

    def bring_home(self, gradient: Tensor) -> Tensor:
        """Gradients of `bring`'s result to those of the local keys and values, summed over ranks.

        Each sum is in the order of the picture's patches, so that it is the same every time, and
        at least in float32: rounded once however many ranks share the picture. Messages are in
        the type of the gradients, which attention has rounded to it already.

        Args:
            gradient: [keys, 2, heads, head_dim].

        Returns:
            [patches, 2, heads, head_dim].
        """
        gradient = gradient.contiguous()
        sends, receives = [], []
        arrivals: list[list[Tensor]] = []
        for part in self.plan.held:
            arrivals.append([])
            for other in part.others:
                rows = gradient.narrow(0, other.start, other.patches)
                sends.append((other.peer, rows, other.tag))
                arrival = gradient.new_empty(part.patches, *gradient.shape[1:])
                receives.append((other.peer, arrival, other.tag))
                arrivals[-1].append(arrival)
        self._transfer(sends, receives)
        local = self.take(gradient)
        wide = torch.promote_types(gradient.dtype, torch.float32)
        for part, terms in zip(self.plan.held, arrivals, strict=True):
            own = local.narrow(0, part.local, part.patches)
            terms.insert(part.place, own)
            total = terms[0].to(wide, copy=True)
            for term in terms[1:]:
                total += term
            own.copy_(total)
        return local

    def _transfer(
        self, sends: list[tuple[int, Tensor, int]], receives: list[tuple[int, Tensor, int]]
    ) -> None:
        """Exchange (rank of the group, tensor, tag), all in one batch."""
        operations = [
            dist.P2POp(function, tensor, group=self._group, tag=tag, group_peer=peer)
            for function, messages in ((dist.irecv, receives), (dist.isend, sends))
            for peer, tensor, tag in messages
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, exchange: KeyValueExchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.bring(k, v)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        k, v = ctx.exchange.bring_home(gradient).unbind(1)
        return k, v, None


def _told(summary: list[int]) -> str:
    _, pictures, patches, gradients = summary
    flow = "with" if gradients else "without"
    return f"{pictures} of {patches} patches {flow} gradients"
