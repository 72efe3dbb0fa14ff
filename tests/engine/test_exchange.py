"""Picture features reach each rank that embeds their tokens, once, and gradients come home once.

The exchange's own code runs, every rank of a layout in a thread of its own; only the all-to-all
is a table in memory. What each rank must hold is built independently, segment by segment.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from megatron_vlm.data.plan import StepPlan
from megatron_vlm.engine import exchange as exchange_module
from megatron_vlm.engine.exchange import FeatureExchange, plan_exchange
from megatron_vlm.topology.layout import Layout
from tests.engine.plans import bare_layout, random_plan

pytestmark = pytest.mark.unit

HIDDEN = 3
Feature = tuple[int, int]
"""(picture in the plan, token of it)"""


class Fabric:
    """An all-to-all between threads."""

    def __init__(self, size: int) -> None:
        self.size, self._rank = size, threading.local()
        self._barrier = threading.Barrier(size, timeout=60)
        self._chunks: dict[tuple[int, int], torch.Tensor] = {}

    def enter(self, rank: int) -> None:
        self._rank.value = rank

    def all_to_all(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_counts: list[int],
        input_counts: list[int],
    ) -> None:
        me = self._rank.value
        for target, chunk in enumerate(input.split(input_counts)):
            self._chunks[me, target] = chunk.clone()
        self._barrier.wait()
        arrived = [self._chunks[source, me] for source in range(self.size)]
        # Real collectives hang or corrupt memory where counts disagree.
        assert [len(chunk) for chunk in arrived] == output_counts
        output.copy_(torch.cat(arrived))
        self._barrier.wait()

    def abort(self) -> None:
        self._barrier.abort()


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
    monkeypatch: pytest.MonkeyPatch, plan: StepPlan, layout: Layout, unused: set[int] = frozenset()
) -> tuple[dict[tuple[int, int], dict[int, torch.Tensor]], dict[Feature, torch.Tensor]]:
    """What every rank received, and the gradients that came home.

    Args:
        plan: the step.
        layout: its ranks.
        unused: micro-batches whose leaves get no gradient at all.
    """
    fabric = Fabric(layout.world_size)
    monkeypatch.setattr(exchange_module, "_all_to_all", fabric.all_to_all)
    # Every pass of every rank: a gradient that depends on who sends it, and for which row.
    received: dict[tuple[int, int], dict[int, torch.Tensor]] = {}
    home: dict[Feature, torch.Tensor] = {}

    def one(rank: int) -> None:
        fabric.enter(rank)
        try:
            lists = plan_exchange(plan, layout, rank)
            columns = plan.shares.picture, plan.shares.first, plan.shares.patches
            mine = [
                (number, token)
                for number, first, patches in zip(
                    *(column[plan.shares.rank == rank].tolist() for column in columns), strict=True
                )
                for token in range(first // 4, (first + patches) // 4)
            ]
            assert lists.encoded_tokens == len(mine)
            rows = [_value(feature) for feature in mine]
            encoded = torch.stack(rows) if rows else torch.zeros(0, HIDDEN)
            exchange = FeatureExchange(
                lists, layout, rank, HIDDEN, torch.float32, torch.device("cpu")
            )
            leaves = exchange.forward(encoded)
            tp = layout.coordinates(rank).tp
            for micro, (leaf, where) in enumerate(zip(leaves, lists.feature_rows, strict=True)):
                values = leaf.detach() if leaf is not None else torch.zeros(0, HIDDEN)
                assert len(set(where.tolist())) == len(where) == len(values)
                received[rank, micro] = dict(zip(where.tolist(), values, strict=True))
                if leaf is not None and micro not in unused:
                    # Without sequence parallelism tensor ranks hold one gradient, in copies;
                    # a second copy coming home would double it.
                    weight = 1.0 if not layout.sequence_parallel else 1.0 + tp
                    (leaf.sin().sum() * weight).backward()
            for feature, gradient in zip(mine, exchange.backward(), strict=True):
                home[feature] = gradient
        except BaseException:
            fabric.abort()
            raise

    with ThreadPoolExecutor(layout.world_size) as pool:
        futures = [pool.submit(one, rank) for rank in range(layout.world_size)]
        errors = [future.exception() for future in futures]
    real = [error for error in errors if error is not None]
    real = [e for e in real if not isinstance(e, threading.BrokenBarrierError)] or real
    if real:
        raise real[0]
    return received, home


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
    monkeypatch: pytest.MonkeyPatch, layout: Layout
) -> None:
    for seed, density in enumerate((0.5, 1.0, 0.1, 0.5)):
        rng = np.random.default_rng([seed, layout.world_size, layout.cp])
        plan = _plan(rng, layout, 1 + seed, 1 + seed % 2, density)
        expected = _expected(plan, layout)
        received, home = _run(monkeypatch, plan, layout)
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
def test_a_step_without_pictures(monkeypatch: pytest.MonkeyPatch, layout: Layout) -> None:
    rng = np.random.default_rng(5)
    plan = _plan(rng, layout, 3, 1, 0.0)
    assert len(plan.pictures) == 0
    received, home = _run(monkeypatch, plan, layout)
    assert home == {} and all(rows == {} for rows in received.values())


def test_unused_features_have_zero_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """A micro-batch whose loss ignores its pictures leaves leaves without gradients."""
    layout = LAYOUTS[11]
    plan = _plan(np.random.default_rng(6), layout, 3, 1, 0.7)
    _, home = _run(monkeypatch, plan, layout, unused={1})
    seen = set()
    for (number, _), gradient in home.items():
        unused = plan.pictures[number].micro_batch == 1
        seen.add(unused)
        assert bool((gradient == 0).all()) == unused
    assert seen == {True, False}
