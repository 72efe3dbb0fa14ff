"""Bytes that every rank will hold in a planned step, and the refusal of one that cannot fit.

The same sums as `memory`, for the pictures that a step really has: known to all ranks before
anything of it is computed, so that none runs out of memory while the others wait for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.config.schema import RunConfig
from megatron_vlm.errors import PlanError
from megatron_vlm.planning.activations import Device, encoder_bytes
from megatron_vlm.planning.memory import (
    Assumptions,
    feature_bytes,
    feature_tokens,
    slices,
    standing_memory,
)
from megatron_vlm.planning.shapes import element_bytes
from megatron_vlm.planning.vision_limits import encoder_patches, least_patches, patch_bytes
from megatron_vlm.topology.layout import Layout

if TYPE_CHECKING:
    from megatron_vlm.data.plan import StepPlan

_GIB = 2**30


@dataclass(frozen=True, eq=False)
class StepMemory:
    """Bytes by kind, each float64 [ranks]."""

    state: NDArray[np.float64]
    """Weights, gradients, optimizer."""
    decoder: NDArray[np.float64]
    """The decoder's activations and logits."""
    encoder: NDArray[np.float64]
    """The encoder's activations, and pixels of which none are kept."""
    features: NDArray[np.float64]
    """Encoded pictures, and where tokens are embedded those received with their gradients."""

    @property
    def total(self) -> NDArray[np.float64]:
        """[ranks] all of them."""
        return self.state + self.decoder + self.encoder + self.features


class StepMemoryModel:
    """What the steps of a run take; what does not change from step to step is worked out once."""

    def __init__(self, config: RunConfig, layout: Layout, device: Device) -> None:
        """For steps of `config` on `layout`, computed on `device`."""
        self.config, self.layout, self.device = config, layout, device
        stages = [
            standing_memory(config, layout, pp, Assumptions(device=device))
            for pp in range(layout.pp)
        ]
        self._stage = np.array([layout.coordinates(r).pp for r in range(layout.world_size)])
        self._replica = np.array([layout.coordinates(r).dp for r in range(layout.world_size)])
        decoder = np.array([float(stage.decoder + stage.logits) for stage in stages])
        total = np.array([float(stage.total) for stage in stages])
        self._state, self._decoder = (total - decoder)[self._stage], decoder[self._stage]
        self._limit = encoder_patches(config, device)

    def of(self, plan: StepPlan) -> StepMemory:
        """What each rank holds at the fullest moment of a step."""
        if self.config.model.vision is None:
            nothing = np.zeros_like(self._state)
            return StepMemory(self._state, self._decoder, nothing, nothing)
        return StepMemory(self._state, self._decoder, self._encoder(plan), self._features(plan))

    def _encoder(self, plan: StepPlan) -> NDArray[np.float64]:
        shares = plan.shares
        own = shares.patches.astype(np.float64)
        elsewhere = plan.pictures.patches[shares.picture] - own
        kept = np.zeros(len(own))
        again = np.zeros(len(own))
        for shared in (False, True):
            # Both are linear in the two numbers of patches; gathering changes what is kept.
            one, more = (self._saved(float(count)) for count in ((1, 2) if shared else (0, 0)))
            mine = (elsewhere > 0) == shared
            for found, k in ((kept, 0), (again, 1)):
                gathered = more[k] - one[k]
                found[mine] = (own * (one[k] - gathered) + elsewhere * gathered)[mine]
        kept_bytes, again_bytes = self._by_rank(plan, kept), self._by_rank(plan, again)
        whole = kept_bytes + np.maximum(again_bytes - self._decoder, 0)
        if self._limit is None:
            return whole
        weights = self._by_rank(plan, share_patches(self.config, self.device, plan))
        fits = weights <= self._limit
        waiting = np.maximum(self._by_rank(plan, own) - self._limit, 0) * self._pixel_bytes
        budget = self._limit * sum(self._saved(0.0))
        return np.where(fits, whole, budget + waiting)

    def _saved(self, elsewhere: float) -> tuple[float, float]:
        """Bytes of one patch: kept, and while it is computed again."""
        config = self.config
        saved = encoder_bytes(
            config.model, 1, self._element, config.recompute, self.device,
            config.training.freeze, elsewhere,
        )  # fmt: skip
        return saved.kept, saved.recomputed

    def _features(self, plan: StepPlan) -> NDArray[np.float64]:
        pictures, layout = plan.pictures, self.layout
        assert self.config.model.vision is not None
        unit = self.config.model.vision.spatial_merge_size**2
        own = self._by_rank(plan, plan.shares.patches / unit)
        embedded = np.zeros((layout.dp, layout.num_micro_batches))
        np.add.at(embedded, (pictures.replica, pictures.micro_batch), pictures.tokens)
        embedded /= slices(layout)
        most, total = (of(axis=1)[self._replica] for of in (embedded.max, embedded.sum))
        held = [feature_tokens(self.config, layout, pp) for pp in range(layout.pp)]
        tokens = [held[pp](*part) for pp, *part in zip(self._stage, own, most, total, strict=True)]
        return np.array(tokens) * feature_bytes(self.config)

    def _by_rank(self, plan: StepPlan, values: NDArray[np.float64]) -> NDArray[np.float64]:
        summed = np.bincount(plan.shares.rank, values, self.layout.world_size)
        return summed.astype(np.float64)

    @property
    def _pixel_bytes(self) -> int:
        """Of a patch, as the encoder takes it."""
        vision = self.config.model.vision
        return 0 if vision is None else vision.in_channels * vision.patch_size**2 * self._element

    @property
    def _element(self) -> int:
        return element_bytes(self.config.training.precision)

    def refuse_beyond(self, memory: float, plan: StepPlan, iteration: int) -> None:
        """Refuse a step of which a rank needs more than `memory` bytes.

        Without `vision_parallel.device_memory_gib` the decoder's activations are not counted:
        kernels that keep less of them than assumed must not cost a run that would fit.

        Raises:
            PlanError: the step, the rank, what it encodes, its bytes by kind, and what to do.
        """
        needed = self.of(plan)
        kinds = {
            "to encode {patches:,} patches of {pictures} pictures (the largest has {largest:,})": (
                needed.encoder
            ),
            "of features": needed.features,
            "of weights, gradients and optimizer": needed.state,
        }
        if self.config.vision_parallel.device_memory_gib is not None:
            kinds["of the decoder's activations"] = needed.decoder
        total = np.sum(list(kinds.values()), axis=0)
        rank = int(total.argmax())
        if total[rank] <= memory:
            return
        mine = np.flatnonzero(plan.shares.rank == rank)
        whole = plan.pictures.patches[plan.shares.picture[mine]]
        held = ", ".join(f"{values[rank] / _GIB:.3g} {kind}" for kind, values in kinds.items())
        told = held.format(
            patches=int(plan.shares.patches[mine].sum()),
            pictures=len(mine),
            largest=int(whole.max(initial=0)),
        )
        # With a budget for activations all pixels may have to wait beside them.
        pixels = self._by_rank(plan, plan.shares.patches.astype(np.float64)) * self._pixel_bytes
        room = memory - float((total - needed.encoder + pixels).max())
        raise PlanError(
            f"step {iteration} does not fit: rank {rank} would hold {total[rank] / _GIB:.3g} GiB "
            f"of the {memory / _GIB:.3g} of its device: {told}; {self._advice(room)}"
        )

    def _advice(self, room: float) -> str:
        config = self.config
        given, recompute = config.vision_parallel.activation_memory_gib, config.recompute.vision
        least = least_patches(config) * sum(self._saved(0.0))
        memory = math.floor(room / _GIB * 100) / 100
        if memory * _GIB >= least and (given is None or memory < given):
            return f"set vision_parallel.activation_memory_gib={memory:g}"
        words = ["use more ranks", "lower model.vision.max_pixels or training.global_batch_size"]
        if recompute != "full":
            words.insert(0, "set recompute.vision=full")
        return ", or ".join(words)


def device_memory(config: RunConfig, total: int | None) -> float | None:
    """Bytes that a step may take; null: no limit.

    Args:
        config: the run.
        total: bytes of the GPU; null on a CPU.
    """
    given = config.vision_parallel.device_memory_gib
    return given * _GIB if given is not None else total


def share_patches(config: RunConfig, device: Device, plan: StepPlan) -> NDArray[np.float64]:
    """[shares] patches of whole pictures whose activations take as much memory.

    Not a share's own where several ranks share the picture: each has all keys and values.
    """
    own = plan.shares.patches.astype(np.float64)
    elsewhere = plan.pictures.patches[plan.shares.picture] - own
    patch = patch_bytes(config, device)
    if not patch:
        return own
    shared, more = (patch_bytes(config, device, elsewhere=count) for count in (1.0, 2.0))
    found = own * (2 * shared - more) + elsewhere * (more - shared)
    return np.where(elsewhere > 0, found / patch, own)
