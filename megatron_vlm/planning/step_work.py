"""What one training step costs, part by part: the input of `replay`.

Seconds are as measured or modelled for the rank that spends them; nothing here knows where they
come from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.errors import PlanError
from megatron_vlm.topology.layout import Layout

Seconds = NDArray[np.floating]

Placement = Literal["all_ranks", "first_stage"]


@dataclass(frozen=True)
class StepWork:
    """Seconds of every part of a step, and how the encoder's part is placed among them.

    A window is `window_size` micro-batches, the last one perhaps fewer; with `first_stage` it is
    one micro-batch. Virtual stages are counted as in `Layout.stages`.
    """

    forward_seconds: Seconds
    """[replicas, micro-batches, virtual stages] of the decoder."""
    backward_seconds: Seconds
    """The same of its backward pass."""
    send_seconds: Seconds
    """[virtual stages - 1] from a stage to the next, activations or, back, their gradients."""
    reduce_seconds: Seconds
    """[ranks] to reduce gradients, once all that hold the same weights have theirs."""
    optimizer_seconds: Seconds
    """[ranks] to update, once every rank has reduced: the gradients' norm is of all of them."""
    encode_seconds: Seconds | None = None
    """[windows, ranks] to encode a rank's share of a window's pictures; None: no encoder."""
    encode_backward_seconds: Seconds | None = None
    """[windows, ranks] of the backward pass; None: nothing of it is trained."""
    exchange_seconds: Seconds | None = None
    """[windows, ranks] that a rank is kept from work by the features' way; None: nothing."""
    exchange_back_seconds: Seconds | None = None
    """[windows, ranks] the same of their gradients' way; None: nothing."""
    placement: Placement = "all_ranks"
    """Every rank encodes a share, or the embedding stage encodes its own replica's pictures as a
    part of its passes (the classic)."""
    window_size: int = 1
    """Micro-batches whose features travel together."""
    balance_group_size: int | None = None
    """Ranks that encode each other's pictures: whole neighbouring replicas; None: all ranks."""
    lockstep_replicas: int | None = None
    """Neighbouring replicas whose experts are shared, so that a pass of a micro-batch begins and
    ends together in all of them; None: as the layout's experts are spread."""

    def num_windows(self, layout: Layout) -> int:
        """Windows of a step; 0 without an encoder."""
        return (
            0 if self.encode_seconds is None else -(-layout.num_micro_batches // self.window_size)
        )

    def group_replicas(self, layout: Layout) -> int:
        """Replicas that encode each other's pictures."""
        size = layout.world_size if self.balance_group_size is None else self.balance_group_size
        return size * layout.dp // layout.world_size

    def coupled_replicas(self, layout: Layout) -> int:
        """Replicas that pass in lockstep."""
        if self.lockstep_replicas is not None:
            return self.lockstep_replicas
        # Expert groups are neighbours within a stage, and may begin amid a replica.
        return math.lcm(layout.ep * layout.etp, layout.tp * layout.cp) // (layout.tp * layout.cp)

    def check(self, layout: Layout) -> None:
        """Refuse what does not fit `layout`.

        Raises:
            PlanError: the field, its value, and what was expected.
        """
        self._check_sizes(layout)
        ranks, windows = layout.world_size, self.num_windows(layout)
        passes = (layout.dp, layout.num_micro_batches, len(layout.stages))
        shapes = {
            "forward_seconds": passes,
            "backward_seconds": passes,
            "send_seconds": (len(layout.stages) - 1,),
            "reduce_seconds": (ranks,),
            "optimizer_seconds": (ranks,),
        }
        for field in fields(self):
            value = getattr(self, field.name)
            if not field.name.endswith("_seconds") or value is None:
                continue
            if self.encode_seconds is None and field.name not in shapes:
                raise PlanError(f"{field.name} without encode_seconds; leave out both or neither")
            expected = shapes.get(field.name, (windows, ranks))
            if np.shape(value) != expected:
                raise PlanError(
                    f"{field.name} is of shape {np.shape(value)}; expected {expected} for "
                    f"{ranks} ranks, {layout.num_micro_batches} micro-batches in {windows} windows "
                    f"and {len(layout.stages)} virtual stages"
                )
            bad = np.argwhere(~(np.isfinite(value) & (np.asarray(value) >= 0)))
            if len(bad):
                place = tuple(bad[0].tolist())
                raise PlanError(
                    f"{field.name}{list(place)} is {float(value[place])}; expected finite seconds, "
                    "0 or more"
                )

    def _check_sizes(self, layout: Layout) -> None:
        if layout.vpp is not None and layout.num_micro_batches % layout.pp:
            raise PlanError(
                f"{layout.num_micro_batches} micro-batches on interleaved stages; expected a "
                f"multiple of the pipeline size {layout.pp}"
            )
        if self.window_size < 1:
            raise PlanError(f"window_size is {self.window_size}; expected 1 or more")
        if self.placement == "first_stage":
            self._check_first_stage(layout)
        replica, group = layout.world_size // layout.dp, self.balance_group_size
        if group is not None and (group < 1 or group % replica or layout.world_size % group):
            raise PlanError(
                f"balance_group_size is {group}; expected a divisor of the {layout.world_size} "
                f"ranks and a multiple of the {replica} of a data-parallel replica, or None"
            )
        coupled = self.coupled_replicas(layout)
        if coupled < 1 or layout.dp % coupled:
            raise PlanError(
                f"lockstep_replicas is {coupled}; expected a divisor of the {layout.dp} replicas"
            )

    def _check_first_stage(self, layout: Layout) -> None:
        if self.window_size != 1:
            raise PlanError(
                f"window_size is {self.window_size} with placement first_stage, which encodes "
                "micro-batch by micro-batch; set it to 1"
            )
        if self.exchange_seconds is not None or self.exchange_back_seconds is not None:
            raise PlanError(
                "exchange_seconds with placement first_stage, where features stay on their rank; "
                "leave both directions out"
            )
        for name in ("encode_seconds", "encode_backward_seconds"):
            value = getattr(self, name)
            if value is None or np.shape(value) != (layout.num_micro_batches, layout.world_size):
                continue
            stages = np.arange(layout.world_size) // (layout.world_size // layout.pp)
            elsewhere = stages != layout.embedding_stage
            if np.any(value[:, elsewhere]):
                rank = int(np.flatnonzero(elsewhere & np.any(value, axis=0))[0])
                raise PlanError(
                    f"{name} of rank {rank} is not 0, but with placement first_stage only pipeline "
                    f"rank {layout.embedding_stage} encodes"
                )
