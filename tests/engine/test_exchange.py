"""Picture features reach each rank that embeds their tokens, once, and gradients come home once.

The exchange's own code runs, every rank of a layout in a thread of its own; only the messages
are queues in memory. What each rank must hold is built independently, segment by segment.
"""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from collections.abc import Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vlm.data.plan import StepPlan
from megatron_vlm.engine.clock import StepClock
from megatron_vlm.engine.delivery import FeatureDelivery, Journey, Post
from megatron_vlm.engine.exchange import cut_windows, plan_exchange
from megatron_vlm.topology.layout import Layout
from tests.engine.plans import bare_layout, random_plan

pytestmark = pytest.mark.unit

HIDDEN = 3
Feature = tuple[int, int]
"""(picture in the plan, token of it)"""


class Fabric:
    """Messages between threads: what is posted by one and not yet taken by the other."""

    def __init__(self) -> None:
        self._boxes: dict[tuple[str, int, int, int], queue.Queue[torch.Tensor]] = defaultdict(
            queue.Queue
        )
        self._lock = threading.Lock()

    def post(self, way: str, rank: int) -> Post:
        """How `rank` posts in one direction."""

        def post(
            window: int, receives: Mapping[int, torch.Tensor], sends: Mapping[int, torch.Tensor]
        ) -> Journey:
            assert rank not in receives and rank not in sends
            for target, tensor in sends.items():
                self._box(way, window, rank, target).put(tensor.clone())
            works = [
                _Arrival(self._box(way, window, source, rank), room)
                for source, room in receives.items()
            ]
            return Journey(works, list(sends.values()))

        return post

    def left(self) -> int:
        """Messages that nobody has taken."""
        return sum(box.qsize() for box in self._boxes.values())

    def _box(self, *key: Any) -> queue.Queue[torch.Tensor]:
        with self._lock:
            return self._boxes[key]


class _Arrival:
    def __init__(self, box: queue.Queue[torch.Tensor], room: torch.Tensor) -> None:
        self._box, self._room = box, room

    def is_completed(self) -> bool:
        return not self._box.empty()

    def wait(self) -> None:
        arrived = self._box.get(timeout=60)
        # Real messages corrupt memory where sizes disagree.
        assert arrived.shape == self._room.shape
        self._room.copy_(arrived)


def _expected(plan: StepPlan, layout: Layout) -> dict[tuple[int, int], dict[int, Feature]]:
    """(rank, micro-batch) -> row of the decoder's input -> which feature stands there."""
    at: dict[tuple[int, int], dict[int, Feature]] = defaultdict(dict)
    for number, picture in enumerate(plan.pictures):
        for token in range(picture.tokens):
            at[picture.replica, picture.micro_batch][picture.start + token] = (number, token)
    found: dict[tuple[int, int], dict[int, Feature]] = {}
    for rank in range(layout.world_size):
        place = layout.coordinates(rank)
        for micro, batch in enumerate(plan.micro_batches[place.dp]):
            mine: list[int] = []
            for start, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
                if layout.cp == 1:
                    mine += range(start, end)
                    continue
                parts = np.array_split(np.arange(start, end), 2 * layout.cp)
                mine += [*parts[place.cp], *parts[2 * layout.cp - 1 - place.cp]]
            if layout.sequence_parallel:
                mine = np.array_split(np.asarray(mine), layout.tp)[place.tp].tolist()
            embeds = place.pp == 0
            found[rank, micro] = {
                row: at[place.dp, micro][token]
                for row, token in enumerate(mine)
                if embeds and token in at[place.dp, micro]
            }
    return found


def _value(feature: Feature) -> torch.Tensor:
    """A distinct row for each feature."""
    picture, token = feature
    return torch.tensor([1.0 + picture, 1.0 + token, 1000.0 * picture + token])


def _run(
    plan: StepPlan,
    layout: Layout,
    windows: list[int] | None = None,
    unused: Set[int] = frozenset(),
    behind: int = 0,
) -> tuple[dict[tuple[int, int], dict[int, torch.Tensor]], dict[Feature, torch.Tensor]]:
    """What every rank received, and the gradients that came home.

    Args:
        plan: the step.
        layout: its ranks.
        windows: micro-batches of each; null: all in one.
        unused: micro-batches whose leaves get no gradient at all.
        behind: forwards that come before the first backward, as in a pipeline.
    """
    fabric = Fabric()
    received: dict[tuple[int, int], dict[int, torch.Tensor]] = {}
    home: dict[Feature, torch.Tensor] = {}

    def one(rank: int) -> None:
        lists = plan_exchange(plan, layout, rank, windows)
        columns = plan.shares.picture, plan.shares.first, plan.shares.patches
        mine = [
            (number, token)
            for number, first, patches in zip(
                *(column[plan.shares.rank == rank].tolist() for column in columns), strict=True
            )
            for token in range(first // 4, (first + patches) // 4)
        ]
        assert lists.encoded_tokens == len(mine)
        encoded = torch.stack([_value(f) for f in mine]) if mine else torch.zeros(0, HIDDEN)
        delivery = FeatureDelivery(
            lists,
            layout,
            rank,
            encoded,
            fabric.post("out", rank),
            fabric.post("back", rank),
            StepClock(torch.device("cpu")),
        )
        tp = layout.coordinates(rank).tp
        # A first pass without gradients, as a reference's is, leaves nothing behind.
        for training in (False, True):
            batches = [SimpleNamespace() for _ in plan.micro_batches[0]]
            backwards: list[torch.Tensor | None] = []
            for micro, batch in enumerate(delivery.micro_batches(batches, backward=training)):
                leaf, where = batch.features, batch.feature_rows
                values = leaf.detach() if leaf is not None else torch.zeros(0, HIDDEN)
                assert len(set(where.tolist())) == len(where) == len(values)
                received[rank, micro] = dict(zip(where.tolist(), values, strict=True))
                assert leaf is None or leaf.requires_grad == training
                # Without sequence parallelism tensor ranks hold one gradient, in copies;
                # a second copy coming home would double it.
                weight = 1.0 if not layout.sequence_parallel else 1.0 + tp
                used = training and leaf is not None and micro not in unused
                backwards.append(leaf.sin().sum() * weight if used else None)
                if len(backwards) > behind:
                    _backward(backwards.pop(0))
            for loss in backwards:
                _backward(loss)
            if training:
                for feature, gradient in zip(mine, delivery.gradients(), strict=True):
                    home[feature] = gradient
            delivery.finish()

    with ThreadPoolExecutor(layout.world_size) as pool:
        for future in [pool.submit(one, rank) for rank in range(layout.world_size)]:
            future.result()
    assert fabric.left() == 0
    return received, home


def _backward(loss: torch.Tensor | None) -> None:
    if loss is not None:
        loss.backward()


LAYOUTS = [
    bare_layout(tp, cp, dp, pp, sp)
    for tp, cp, dp, pp, sp in (
        (1, 1, 1, 1, False),
        (1, 1, 4, 1, False),
        (2, 1, 1, 1, False),
        (2, 1, 2, 1, True),
        (4, 1, 1, 2, True),
        (1, 2, 1, 1, False),
        (1, 4, 2, 1, False),
        (1, 3, 1, 2, False),
        (1, 1, 2, 4, False),
        (2, 2, 1, 1, False),
        (2, 2, 2, 1, True),
        (2, 2, 2, 2, True),
        (4, 2, 1, 1, True),
        (2, 3, 1, 2, True),
    )
]


def _plan(
    rng: np.random.Generator, layout: Layout, micro_batches: int, rows: int, density: float
) -> StepPlan:
    multiple = 4 * layout.cp
    return random_plan(rng, layout, micro_batches, rows, 6 * multiple, multiple, density)


def _name(layout: Layout) -> str:
    return f"tp{layout.tp}cp{layout.cp}dp{layout.dp}pp{layout.pp}sp{int(layout.sequence_parallel)}"


@pytest.mark.parametrize("layout", LAYOUTS, ids=_name)
def test_every_token_arrives_once_and_its_gradient_comes_home_once(
    layout: Layout,
) -> None:
    for seed, density in enumerate((0.5, 1.0, 0.1, 0.5)):
        rng = np.random.default_rng([seed, layout.world_size, layout.cp])
        plan = _plan(rng, layout, 1 + seed, 1 + seed % 2, density)
        expected = _expected(plan, layout)
        windows = [None, [1, 1], [2, 1], [1] * 4][seed]
        received, home = _run(plan, layout, windows, behind=seed)
        assert received.keys() == expected.keys()
        for place, features in expected.items():
            assert received[place].keys() == features.keys(), place
            for row, feature in features.items():
                assert torch.equal(received[place][row], _value(feature)), (place, row)
        # Each token is embedded by one context rank and, with sequence parallelism, by one tensor
        # rank: its gradient is that one's.
        owner = {
            feature: layout.coordinates(rank).tp
            for (rank, _), features in expected.items()
            for feature in features.values()
        }
        tokens = sum(picture.tokens for picture in plan.pictures)
        assert len(home) == len(owner) == tokens
        for feature, gradient in home.items():
            weight = 1.0 + owner[feature] if layout.sequence_parallel else 1.0
            assert torch.allclose(gradient, weight * _value(feature).cos(), atol=1e-6), feature


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[11]], ids=_name)
def test_a_step_without_pictures(layout: Layout) -> None:
    rng = np.random.default_rng(5)
    plan = _plan(rng, layout, 3, 1, 0.0)
    assert len(plan.pictures) == 0
    received, home = _run(plan, layout)
    assert home == {} and all(rows == {} for rows in received.values())


def test_unused_features_have_zero_gradients() -> None:
    """A micro-batch whose loss ignores its pictures leaves leaves without gradients."""
    layout = LAYOUTS[11]
    plan = _plan(np.random.default_rng(6), layout, 3, 1, 0.7)
    _, home = _run(plan, layout, unused={1})
    seen = set()
    for (number, _), gradient in home.items():
        unused = plan.pictures[number].micro_batch == 1
        seen.add(unused)
        assert bool((gradient == 0).all()) == unused
    assert seen == {True, False}


def test_windows_are_cut_by_both_bounds() -> None:
    layout = bare_layout(cp=2)
    plan = _plan(np.random.default_rng(7), layout, 6, 2, 0.6)
    tokens = [0] * 6
    for picture in plan.pictures:
        tokens[picture.micro_batch] += picture.tokens
    assert cut_windows(plan, layout, None, None) == [6]
    assert cut_windows(plan, layout, 1, None) == [1] * 6
    assert cut_windows(plan, layout, 4, None) == [4, 2]
    for bound in (0, max(tokens), sum(tokens[:3]), sum(tokens)):
        windows = cut_windows(plan, layout, 4, bound)
        assert sum(windows) == 6 and max(windows) <= 4
        # A rank of two receives no more than its half of the micro-batch.
        needed = [min(size, plan.micro_batches[0][0].num_tokens // 2) for size in tokens]
        first = 0
        for size in windows:
            filled = sum(needed[first : first + size])
            assert size == 1 or filled <= bound
            rest = needed[first + size : first + size + 1]
            assert not rest or size == 4 or filled + rest[0] > bound
            first += size
