"""One micro-batch as this rank's part of the language model sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_vlm.data.collate import Structure, TextBatch, structure
from megatron_vlm.data.plan import MicroBatchPlan
from megatron_vlm.data.positions import multimodal_positions
from megatron_vlm.engine.zigzag import gathered_order, local_tokens
from megatron_vlm.models.language.packing import ContextParallelRows, PackedRows
from megatron_vlm.topology.mesh import Topology


@dataclass
class Ahead:
    """What predicting one more token is to find: `[1, tokens / cp]`."""

    labels: torch.Tensor
    """The token after the next."""
    loss_mask: torch.Tensor
    """1 where it is a target and the next token is none of a picture's."""


@dataclass
class MicroBatch:
    """Tensors over this context-parallel rank's tokens, `[1, tokens / cp]` unless said otherwise.

    `tokens`, `labels`, `loss_mask` are None on ranks that neither embed nor compute the loss;
    `ahead` also where nothing is predicted further ahead.
    `features` are the picture features this rank embeds, a leaf of the graph, at `feature_rows`
    of the decoder's input. `extras` is the objective's own: what its earlier forwards found.
    """

    plan: MicroBatchPlan
    rows: PackedRows
    segment_ids: torch.Tensor
    ahead: Ahead | None = None
    tokens: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    loss_mask: torch.Tensor | None = None
    features: torch.Tensor | None = None
    feature_rows: torch.Tensor | None = None
    extras: dict[str, Any] | None = None

    @property
    def num_segments(self) -> int:
        """Segments of the micro-batch, filler included."""
        return len(self.plan.segment_lengths)


def build_micro_batch(
    plan: MicroBatchPlan,
    text: TextBatch | None,
    topology: Topology,
    balance_weight: float,
    predict_ahead: bool = False,
    multimodal: bool = False,
) -> MicroBatch:
    """Cut a planned micro-batch to this rank's context-parallel part and move it to its device.

    Args:
        plan: the whole micro-batch of this rank's replica.
        text: its tokens, where this rank needs them.
        topology: this rank's place.
        balance_weight: weight of one row's balance loss in this step.
        predict_ahead: whether the token after the next is predicted too.
        multimodal: whether pictures' tokens have positions in three dimensions.
    """
    layout, device = topology.layout, topology.device
    cu_seqlens = plan.cu_seqlens
    mine = local_tokens(cu_seqlens, layout.cp, topology.coordinates.cp)
    known = structure(plan)
    segment_ids, row_ids, row_tokens = _token_maps(plan, known)
    bounds = torch.from_numpy(cu_seqlens.astype(np.int32)).to(device)
    rows = PackedRows(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=plan.max_seqlen,
        max_seqlen_kv=plan.max_seqlen,
        row_ids=torch.from_numpy(row_ids[mine]).to(device),
        row_tokens=torch.from_numpy(row_tokens).to(device),
        position_ids=known.position_ids[mine].to(device),
        balance_weight=balance_weight,
    )
    if multimodal:
        places = multimodal_positions(cu_seqlens, plan.picture_spans, plan.picture_columns)
        rows.rotary_positions = torch.from_numpy(places).to(device)
        rows.rotary_ids = torch.from_numpy(mine).to(device)
    if layout.cp > 1:
        order = gathered_order(cu_seqlens, layout.cp)
        rows.context = ContextParallelRows(
            cu_seqlens=bounds // layout.cp,
            key_order=torch.from_numpy(order).to(device),
            key_positions=known.position_ids.to(device),
        )
    batch = MicroBatch(plan, rows, torch.from_numpy(segment_ids[mine]).to(device))
    if text is not None:
        index = torch.from_numpy(mine)
        batch.tokens = text.tokens[index].unsqueeze(0).to(device)
        batch.labels = text.labels[index].unsqueeze(0).to(device)
        batch.loss_mask = text.loss_mask[index].unsqueeze(0).to(device)
        if predict_ahead:
            next_tokens, labels, loss_mask = (
                tensor[index].unsqueeze(0).to(device) for tensor in _shifted(plan, text)
            )
            rows.next_tokens, batch.ahead = next_tokens, Ahead(labels, loss_mask)
    return batch


def _shifted(
    plan: MicroBatchPlan, text: TextBatch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Next tokens, the labels and the loss mask of predicting one more: each `[tokens]`.

    Nothing of the next segment is seen: its last token keeps itself as the next, without a loss.
    """
    last = torch.from_numpy(plan.cu_seqlens[1:].astype(np.int64)) - 1
    following = torch.arange(1, plan.num_tokens + 1)
    following[last] = last
    loss_mask = text.loss_mask[following]
    loss_mask[last] = 0
    for start, count in plan.picture_spans.tolist():
        loss_mask[max(start - 1, 0) : start + count - 1] = 0
    return text.tokens[following], text.labels[following], loss_mask


def _token_maps(
    plan: MicroBatchPlan, known: Structure
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per token: its segment; its row or -1 for padding; and per row: its real tokens."""
    row_ids = known.row_ids.masked_fill(known.padding_mask, -1).numpy()
    row_tokens = np.bincount(row_ids[row_ids >= 0], minlength=len(plan.rows)).astype(np.int64)
    lengths = np.diff(plan.cu_seqlens)
    segment_ids = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
    return segment_ids, row_ids, row_tokens
