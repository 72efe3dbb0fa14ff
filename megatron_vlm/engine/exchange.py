"""Where picture features go: from the rank that encoded a picture to those that embed its tokens.

Everything is derived from the plan, on every rank alike: for each rank the list of feature rows it
sends to each other one, in the order of the plan, and of those it receives. Under context and
sequence parallelism a rank receives just the tokens of its own slice. The way back is the same
lists the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from megatron_vlm.engine.zigzag import local_tokens
from megatron_vlm.topology.layout import Layout

if TYPE_CHECKING:
    from megatron_vlm.data.plan import StepPlan


@dataclass(frozen=True)
class ExchangePlan:
    """One rank's lists. Features are rows of `[tokens, hidden]` tensors."""

    encoded_tokens: int
    """Features of what this rank encodes."""
    send_index: np.ndarray
    """Features to send, by destination rank, then in plan order: numbers in this rank's output."""
    send_counts: list[int]
    """How many go to each rank."""
    receive_counts: list[int]
    """How many come from each rank."""
    feature_rows: list[np.ndarray]
    """Per micro-batch: rows of the decoder's input that receive a feature."""
    feature_index: list[np.ndarray]
    """Per micro-batch: which received features those are."""


def plan_exchange(plan: StepPlan, layout: Layout, rank: int) -> ExchangePlan:
    """Lists of `rank` for what it and others encode of a step's pictures."""
    slices = _Slices(plan, layout)
    pictures, shares = plan.pictures, plan.shares
    # Features of each share, as tokens of its micro-batch.
    ratio = pictures.patches[shares.picture] // pictures.tokens[shares.picture]
    begins = pictures.start[shares.picture] + shares.first // ratio
    counts = shares.patches // ratio
    replicas, micro_batches = pictures.replica[shares.picture], pictures.micro_batch[shares.picture]

    def spans(mine: np.ndarray) -> Iterator[tuple[int, int, int, np.ndarray]]:
        columns = (column[mine].tolist() for column in (replicas, micro_batches, begins, counts))
        for place, replica, number, start, count in zip(mine.tolist(), *columns, strict=True):
            yield place, replica, number, np.arange(start, start + count)

    sends: list[list[np.ndarray]] = [[] for _ in range(layout.world_size)]
    encoded = 0
    for _, replica, number, span in spans(np.flatnonzero(shares.rank == rank)):
        for (tp, cp), (chosen, _) in slices.split(replica, number, span):
            target = layout.rank(tp=tp, cp=cp, dp=replica, pp=layout.embedding_stage)
            sends[target].append(chosen + encoded)
        encoded += len(span)
    place = layout.coordinates(rank)
    count = len(plan.micro_batches[0])
    received: list[list[tuple[int, np.ndarray]]] = [[] for _ in range(layout.world_size)]
    if place.pp == layout.embedding_stage:
        for share, replica, number, span in spans(np.flatnonzero(replicas == place.dp)):
            parts = dict(slices.split(replica, number, span))
            if (place.tp, place.cp) in parts:
                _, rows = parts[place.tp, place.cp]
                received[int(shares.rank[share])].append((number, rows))
    rows_of: list[list[np.ndarray]] = [[] for _ in range(count)]
    index_of: list[list[np.ndarray]] = [[] for _ in range(count)]
    position = 0
    for parts_of_source in received:
        for micro_batch, rows in parts_of_source:
            rows_of[micro_batch].append(rows)
            index_of[micro_batch].append(np.arange(position, position + len(rows)))
            position += len(rows)
    flat = [_joined(parts) for parts in sends]
    return ExchangePlan(
        encoded_tokens=encoded,
        send_index=_joined(flat),
        send_counts=[len(part) for part in flat],
        receive_counts=[sum(len(rows) for _, rows in parts) for parts in received],
        feature_rows=[_joined(parts) for parts in rows_of],
        feature_index=[_joined(parts) for parts in index_of],
    )


class _Slices:
    """Which (tensor, context) rank embeds each token of a micro-batch, and in which row."""

    def __init__(self, plan: StepPlan, layout: Layout) -> None:
        self._plan, self._layout = plan, layout
        self._maps: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def split(
        self, replica: int, micro_batch: int, span: np.ndarray
    ) -> list[tuple[tuple[int, int], tuple[np.ndarray, np.ndarray]]]:
        """For each (tp, cp) rank that embeds tokens of `span`: (which of the span, their rows)."""
        layout = self._layout
        owner, row = self._map(replica, micro_batch)
        found = []
        for cp in range(layout.cp):
            chosen = np.flatnonzero(owner[span] == cp) if layout.cp > 1 else np.arange(len(span))
            rows = row[span[chosen]]
            for tp in range(layout.tp):
                if layout.sequence_parallel:
                    part = self._plan.micro_batches[0][0].num_tokens // layout.cp // layout.tp
                    here = rows // part == tp
                    selected = chosen[here], rows[here] - tp * part
                else:
                    selected = chosen, rows
                if len(selected[0]):
                    found.append(((tp, cp), selected))
        return found

    def _map(self, replica: int, micro_batch: int) -> tuple[np.ndarray, np.ndarray]:
        key = (replica, micro_batch)
        if key not in self._maps:
            cu_seqlens = self._plan.micro_batches[replica][micro_batch].cu_seqlens
            total = int(cu_seqlens[-1])
            owner, row = np.empty(total, dtype=np.int64), np.empty(total, dtype=np.int64)
            for cp in range(self._layout.cp):
                mine = local_tokens(cu_seqlens, self._layout.cp, cp)
                owner[mine], row[mine] = cp, np.arange(len(mine))
            self._maps[key] = owner, row
        return self._maps[key]


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


class FeatureExchange:
    """Carries out one step's exchange and its way back."""

    def __init__(
        self,
        plan: ExchangePlan,
        layout: Layout,
        rank: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._plan, self._hidden, self._dtype, self._device = plan, hidden_size, dtype, device
        self._send_index = torch.from_numpy(plan.send_index).to(device)
        # Without sequence parallelism every tensor rank embeds the same features and gets the
        # same gradient: one of them answers.
        self._answers = layout.sequence_parallel or layout.coordinates(rank).tp == 0
        self._leaves: list[torch.Tensor | None] = []

    def forward(self, encoded: torch.Tensor) -> list[torch.Tensor | None]:
        """Send features out; returns each micro-batch's as a new leaf that requires a gradient.

        Args:
            encoded: `[encoded_tokens, hidden]`, detached.
        """
        plan = self._plan
        outgoing = encoded.index_select(0, self._send_index)
        received = encoded.new_empty(sum(plan.receive_counts), self._hidden)
        _all_to_all(received, outgoing, plan.receive_counts, plan.send_counts)
        self._leaves = [
            received.index_select(0, torch.from_numpy(index).to(self._device)).requires_grad_()
            if len(index)
            else None
            for index in plan.feature_index
        ]
        return self._leaves

    def backward(self) -> torch.Tensor:
        """Bring the leaves' gradients home: `[encoded_tokens, hidden]`."""
        plan = self._plan
        template = torch.empty(0, self._hidden, dtype=self._dtype, device=self._device)
        answer = template.new_zeros(sum(plan.receive_counts), self._hidden)
        if self._answers:
            for leaf, index in zip(self._leaves, plan.feature_index, strict=True):
                if leaf is not None and leaf.grad is not None:
                    answer[torch.from_numpy(index).to(self._device)] = leaf.grad
        returned = template.new_empty(sum(plan.send_counts), self._hidden)
        _all_to_all(returned, answer, plan.send_counts, plan.receive_counts)
        gradient = template.new_zeros(plan.encoded_tokens, self._hidden)
        self._leaves = []
        return gradient.index_add_(0, self._send_index, returned)


def _all_to_all(
    output: torch.Tensor, input: torch.Tensor, output_counts: list[int], input_counts: list[int]
) -> None:
    if dist.get_world_size() == 1:
        output.copy_(input)
    else:
        dist.all_to_all_single(output, input.contiguous(), output_counts, input_counts)
