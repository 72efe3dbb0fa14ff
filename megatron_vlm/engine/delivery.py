"""Carries features to the micro-batches, window by window, and their gradients home.

    before the pipeline   windows 0 and 1 leave
    forward of window w   w + 1 leaves from everywhere; w is waited for where it is embedded
    backward of window w  its gradients leave as soon as the last of them is there
    after the pipeline    what has not come home is waited for

Messages go point to point, all of a window in one batch, and each rank posts them when it comes to
the forward of the window before. A collective would not do: inside a pipeline it waits for ranks
that wait for each other. This cannot lock, since everything is encoded before the pipeline begins:
who waits for a window waits for no more than that each other rank begins the forward of an earlier
micro-batch, which those already passed on suffice for. Gradients are waited for after the pipeline.

Each direction has a group of its own, in which every rank posts windows in their order: NCCL runs
what is asked of a group in turn, and two directions in one could wait in a circle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron_vlm.engine.clock import StepClock
from megatron_vlm.engine.exchange import ExchangePlan, WindowPlan
from megatron_vlm.engine.microbatch import MicroBatch
from megatron_vlm.topology.layout import Layout


class Journey:
    """A window's messages in one direction, under way."""

    def __init__(self, works: list[Any], held: list[torch.Tensor]) -> None:
        """`works` are waited for one by one; `held` is what must not be freed before."""
        self._works, self._held = works, held

    def wait(self) -> None:
        """Until all have arrived, those sent and those received."""
        while self._works:
            self._works.pop().wait()
        self._held.clear()

    def settle(self) -> None:
        """Let go of what was sent where all have arrived, without waiting. Gloo never says so."""
        if all(work.is_completed() for work in self._works):
            self.wait()


Post = Callable[[int, Mapping[int, torch.Tensor], Mapping[int, torch.Tensor]], Journey]
"""Post a window's messages: its number, what to fill by source, and what to send by destination, no
rank to itself."""


def post_in(group: dist.ProcessGroup) -> Post:
    """Messages between the ranks of a group that holds the whole world."""

    def post(
        window: int, receives: Mapping[int, torch.Tensor], sends: Mapping[int, torch.Tensor]
    ) -> Journey:
        operations = [
            dist.P2POp(operation, tensor, group=group, tag=window, group_peer=peer)
            for operation, tensors in ((dist.irecv, receives), (dist.isend, sends))
            for peer, tensor in tensors.items()
        ]
        works = dist.batch_isend_irecv(operations) if operations else []
        return Journey(works, list(sends.values()))

    return post


@dataclass
class _Window:
    """One window's state in one pass over the micro-batches."""

    plan: WindowPlan
    features: torch.Tensor | None = None
    """`[received, hidden]`, whole once `out` is."""
    out: Journey | None = None
    gradients: list[torch.Tensor | None] = field(default_factory=list)
    """Of each micro-batch's features, as far as its backward has been."""
    missing: int = 0
    """How many of them are still to come."""
    home: dict[int, torch.Tensor] = field(default_factory=dict)
    """Gradients of what this rank sent, by destination, whole once `back` is."""
    back: Journey | None = None


class FeatureDelivery:
    """One step's features on their way to the micro-batches, and back."""

    def __init__(
        self,
        plan: ExchangePlan,
        layout: Layout,
        rank: int,
        encoded: torch.Tensor,
        post_features: Post,
        post_gradients: Post | None,
        clock: StepClock,
    ) -> None:
        """Nothing is sent yet.

        Args:
            plan: this rank's lists.
            layout: the ranks.
            rank: this one, in the world.
            encoded: `[encoded_tokens, hidden]`, without a graph; filled in before it is sent.
            post_features: sends features.
            post_gradients: sends gradients, apart from the features; null where nobody wants any.
            clock: is told what keeps this rank from work.
        """
        self._plan, self._rank, self._encoded = plan, rank, encoded
        self._post_features, self._post_gradients = post_features, post_gradients
        self._clock = clock
        self._windows = [_Window(window) for window in plan.windows]
        # Without sequence parallelism every tensor rank embeds the same features and gets the
        # same gradient: one of them answers.
        targets = {rank, *(target for window in plan.windows for target in window.sends)}
        self._answering = {
            target
            for target in targets
            if layout.sequence_parallel or layout.coordinates(target).tp == 0
        }
        self._left = self._returned = 0

    @property
    def windows(self) -> list[WindowPlan]:
        """What is sent together."""
        return self._plan.windows

    def leave(self, windows: int) -> None:
        """Post the features of as many windows as this, in all; those of the first two may leave
        before the pipeline runs, once this rank has encoded its part of them."""
        while self._left < min(windows, len(self._windows)):
            with self._clock.span("exchange", self._left):
                self._leave(self._windows[self._left])
            self._left += 1

    def micro_batches(self, batches: list[MicroBatch], backward: bool) -> Iterator[MicroBatch]:
        """The micro-batches in turn, each with its features: what the first chunk of the decoder
        reads. `finish` ends the pass.

        Args:
            batches: of this rank's replica.
            backward: whether a backward follows; features are then leaves that take gradients.
        """
        self._returned = 0
        single = len(self._windows) == 1
        for place, window in enumerate(self._windows):
            self.leave(place + 2)
            assert window.features is not None and window.out is not None
            if window.plan.receives:
                with self._clock.span("exchange", place):
                    window.out.wait()
            self._settle(place)
            leaves = [
                self._leaf(window, place, number, backward)
                for number in range(len(window.plan.feature_rows))
            ]
            if not single:
                window.features = None
            if backward:
                self._send_home(place)
            for number, leaf in enumerate(leaves):
                batch = batches[window.plan.first + number]
                batch.features = leaf
                batch.feature_rows = self._tensor(window.plan.feature_rows[number])
                yield batch
                # From here on its graph holds it, where there is one.
                leaves[number] = None
                batch.features = None

    def finish(self) -> None:
        """End a pass over the micro-batches; another one sends anew what it did not keep."""
        for window in self._windows:
            if window.out is not None:
                window.out.wait()
        if len(self._windows) > 1:
            self._left = 0

    def gradients(self) -> torch.Tensor:
        """What came home of the last pass: `[encoded_tokens, hidden]`."""
        self._send_home(len(self._windows), all_there=True)
        total = torch.zeros_like(self._encoded)
        for place, window in enumerate(self._windows):
            assert window.back is not None
            with self._clock.span("exchange_back", place):
                window.back.wait()
            for target, index in window.plan.sends.items():
                if target in window.home:
                    total.index_add_(0, self._tensor(index), window.home[target])
            window.home, window.back = {}, None
        return total

    def _leave(self, window: _Window) -> None:
        window.features = self._encoded.new_empty(window.plan.received, self._encoded.size(1))
        counts = list(window.plan.receives.values())
        arriving = dict(zip(window.plan.receives, window.features.split(counts), strict=True))
        leaving = {
            target: self._encoded.index_select(0, self._tensor(index))
            for target, index in window.plan.sends.items()
        }
        if self._rank in leaving:
            arriving.pop(self._rank).copy_(leaving.pop(self._rank))
        window.out = self._post_features(self._left, arriving, leaving)

    def _settle(self, windows: int) -> None:
        for window in self._windows[:windows]:
            for journey in (window.out, window.back):
                if journey is not None:
                    journey.settle()

    def _leaf(
        self, window: _Window, place: int, number: int, backward: bool
    ) -> torch.Tensor | None:
        if number == 0:
            window.gradients = [None] * len(window.plan.feature_rows)
            window.missing = 0
        index = window.plan.feature_index[number]
        if not len(index):
            return None
        assert window.features is not None
        leaf = window.features.index_select(0, self._tensor(index))
        if not backward or self._post_gradients is None:
            return leaf.requires_grad_(backward)
        window.missing += 1

        def arrived(leaf: torch.Tensor) -> None:
            window.gradients[number], leaf.grad = leaf.grad, None
            window.missing -= 1
            self._send_home(place + 1)

        leaf.requires_grad_().register_post_accumulate_grad_hook(arrived)
        return leaf

    def _send_home(self, windows: int, all_there: bool = False) -> None:
        """Post the gradients of the first windows, in turn, up to one that still lacks some."""
        while self._post_gradients is not None and self._returned < windows:
            window = self._windows[self._returned]
            if window.missing and not all_there:
                return
            self._post_home(self._returned, window, self._post_gradients)
            self._returned += 1

    def _post_home(self, place: int, window: _Window, post: Post) -> None:
        like = self._encoded
        answers: dict[int, torch.Tensor] = {}
        if self._rank in self._answering and window.plan.receives:
            answer = like.new_zeros(window.plan.received, like.size(1))
            for index, gradient in zip(window.plan.feature_index, window.gradients, strict=True):
                if gradient is not None:
                    answer[self._tensor(index)] = gradient
            pieces = answer.split(list(window.plan.receives.values()))
            answers = dict(zip(window.plan.receives, pieces, strict=True))
        window.gradients = []
        window.home = {
            target: like.new_empty(len(index), like.size(1))
            for target, index in window.plan.sends.items()
            if target in self._answering
        }
        arriving = dict(window.home)
        if self._rank in answers:
            arriving.pop(self._rank).copy_(answers.pop(self._rank))
        window.back = post(place, arriving, answers)

    def _tensor(self, index: object) -> torch.Tensor:
        return torch.as_tensor(index, device=self._encoded.device)
