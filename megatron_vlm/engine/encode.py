"""What one rank encodes of a step, in chunks: features leave early, and activations stay bounded.

A chunk's activations are kept for the backward pass, or its forward is run again there, as the
memory for them allows. Ranks that share pictures go through these in one order and keep the same,
which the plan decides for all of them alike.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import get_attr_wrapped_model
from numpy.typing import NDArray

from megatron_vlm.data.picture_table import Shares
from megatron_vlm.data.plan import StepPlan
from megatron_vlm.engine.segments import LocalSegments
from megatron_vlm.models.vision.encoder import VisionEncoder


@dataclass(frozen=True, eq=False)
class Chunk:
    """Segments that go through the encoder together."""

    segments: list[int]
    """Numbers among this rank's shares; none: a blank picture is encoded."""
    features: np.ndarray
    """Their features' numbers among this rank's."""
    kept: bool
    """Whether its activations stay until the backward pass."""
    early: bool
    """Whether the first window waits for it."""


@dataclass(frozen=True, eq=False)
class Budget:
    """Memory for activations, in patches of whole pictures."""

    patches: int
    """Whose activations a rank may hold at a time: at least twice the largest picture's."""
    weights: NDArray[np.float64]
    """[shares] patches of whole pictures that take as much as each."""


def plan_chunks(plan: StepPlan, rank: int, first_window: int, budget: Budget | None) -> list[Chunk]:
    """How `rank` encodes its shares: what several ranks share, then by micro-batch.

    Args:
        plan: the step.
        rank: in the world.
        first_window: micro-batches of the window whose features leave first.
        budget: memory for activations; null: any amount.

    Returns:
        One or more chunks, those of the first window first.
    """
    shares, pictures = plan.shares, plan.pictures
    mine = np.flatnonzero(shares.rank == rank)
    numbers, sizes = shares.picture[mine], shares.patches[mine]
    tokens = sizes // (pictures.patches[numbers] // pictures.tokens[numbers])
    starts = np.cumsum(tokens) - tokens
    micro_batch = pictures.micro_batch[numbers]
    shared = np.bincount(shares.picture, minlength=len(pictures))[numbers] > 1
    order = np.argsort(micro_batch, kind="stable")
    in_window = order[(~shared & (micro_batch < first_window))[order]].tolist()
    later = order[(~shared & (micro_batch >= first_window))[order]].tolist()

    def chunk(segments: list[int], kept: bool, early: bool) -> Chunk:
        features = [np.arange(starts[s], starts[s] + tokens[s]) for s in segments]
        joined = np.concatenate(features) if features else np.zeros(0, np.int64)
        return Chunk(segments, joined, kept, early)

    common = np.flatnonzero(shared).tolist()
    if budget is None:
        groups = ((common + in_window, True), (later, False))
        chunks = [chunk(segments, True, early) for segments, early in groups if segments]
        return chunks or [chunk([], kept=True, early=True)]
    weights = budget.weights[mine]
    half = budget.patches / 2
    keeps = _kept_pictures(shares, budget.weights, half)
    is_kept = np.isin(numbers, sorted(keeps))
    chunks = [chunk([s], bool(is_kept[s]), early=True) for s in common]
    held = float(weights[shared & is_kept].sum())
    # Where not all fits, there must be room for the one that is run again.
    fits = weights.sum() <= budget.patches and bool(is_kept[shared].all())
    limit = budget.patches if fits else half
    for segments, early in ((in_window, True), (later, False)):
        for group in _cut(segments, weights, half):
            size = float(weights[group].sum())
            chunks.append(chunk(group, held + size <= limit, early))
            held += size if held + size <= limit else 0
    return chunks or [chunk([], kept=True, early=True)]


def _kept_pictures(shares: Shares, weights: NDArray[np.float64], patches: float) -> set[int]:
    """The shared pictures that are kept: in turn, while none of their ranks holds more."""
    counts = np.bincount(shares.picture)
    held = np.zeros(int(shares.rank.max(initial=0)) + 1)
    kept = set()
    for picture in np.flatnonzero(counts > 1).tolist():
        where = slice(*np.searchsorted(shares.picture, [picture, picture + 1]).tolist())
        after = held[shares.rank[where]] + weights[where]
        if (after <= patches).all():
            held[shares.rank[where]] = after
            kept.add(picture)
    return kept


def _cut(segments: list[int], weights: NDArray[np.float64], patches: float) -> list[list[int]]:
    """Runs of segments of at most so many patches each, or of one segment."""
    groups: list[list[int]] = []
    filled = 0.0
    for segment in segments:
        size = float(weights[segment])
        if not groups or filled + size > patches:
            groups.append([])
            filled = 0.0
        groups[-1].append(segment)
        filled += size
    return groups


class EncoderRun:
    """One step's pass of one rank through the encoder, and the way back."""

    def __init__(
        self, encoder: torch.nn.Module, segments: LocalSegments, chunks: list[Chunk], hidden: int
    ) -> None:
        """Nothing is encoded yet.

        Args:
            encoder: the module to call: the data-parallel wrapper when training.
            segments: what this rank encodes.
            chunks: how.
            hidden: channels of a feature.
        """
        self._encoder, self._segments, self.chunks = encoder, segments, chunks
        inner: VisionEncoder = get_attr_wrapped_model(encoder, "trunk", return_model_obj=True)
        self._vision = inner.trunk.config
        like = next(inner.parameters())
        count = sum(len(chunk.features) for chunk in chunks)
        self.features = torch.empty(count, hidden, dtype=like.dtype, device=like.device)
        """`[tokens, hidden]` in the order of the plan's shares, without a graph."""
        self._outputs: list[torch.Tensor | None] = []

    def forward(self, grad: bool, first_window: Callable[[], None]) -> None:
        """Fill `features`.

        Args:
            grad: whether `backward` will follow.
            first_window: called once those of the first window are there.
        """
        told = False
        for chunk in self.chunks:
            if not chunk.early and not told:
                first_window()
                told = True
            with torch.set_grad_enabled(grad and chunk.kept):
                output = self._encode(chunk)
            self.features[self._rows(chunk)] = output.detach()[: len(chunk.features)]
            self._outputs.append(output if grad and chunk.kept else None)
        if not told:
            first_window()

    def backward(self, gradient: torch.Tensor, reduce_early: bool) -> None:
        """The parameters' gradients, whose reduction is still to be finished.

        Args:
            gradient: of `features`.
            reduce_early: whether reductions begin within the backward; all ranks have one chunk
                then. Else shared pictures' messages would come before them here, between them
                there.
        """
        assert isinstance(self._encoder, DistributedDataParallel)
        for k, chunk in enumerate(self.chunks):
            output = self._outputs[k]
            if output is None:
                with torch.enable_grad():
                    output = self._encode(chunk)
            whole = output.new_zeros(output.shape)
            whole[: len(chunk.features)] = gradient[self._rows(chunk)]
            with nullcontext() if reduce_early else self._encoder.no_sync():
                output.backward(whole)
            self._outputs[k] = None

    def _rows(self, chunk: Chunk) -> torch.Tensor:
        return torch.from_numpy(chunk.features).to(self.features.device)

    def _encode(self, chunk: Chunk) -> torch.Tensor:
        """Features `[tokens, hidden]`; a rank without pictures encodes one blank unit.

        Its gradient is zero, but it keeps the encoder's gradient and parameter collectives matched.
        """
        if chunk.segments:
            output: torch.Tensor = self._encoder(*self._segments.batch(chunk.segments))
            return output
        merge = self._vision.spatial_merge_size
        channels = self._vision.in_channels * self._vision.patch_size**2
        pixels = self.features.new_zeros(merge * merge, channels)
        grid_hw = torch.full((1, 2), merge, dtype=torch.int64, device=pixels.device)
        return self._encoder(pixels, grid_hw, None)
