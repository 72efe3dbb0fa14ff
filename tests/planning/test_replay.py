"""Replayed steps: known totals, and rules that every one of random steps keeps."""

from __future__ import annotations

import dataclasses
import time
from functools import cache
from typing import Any

import numpy as np
import pytest

from megatron_vlm.errors import PlanError
from megatron_vlm.planning.replay import replay
from megatron_vlm.planning.schedule import passes
from megatron_vlm.planning.step_work import StepWork
from megatron_vlm.planning.timeline import Event, Timeline
from megatron_vlm.topology.layout import Layout


def _layout(
    *,
    tp: int = 1,
    cp: int = 1,
    dp: int = 1,
    pp: int = 1,
    vpp: int | None = None,
    micro_batches: int = 4,
    ep: int = 1,
    stages: tuple[str, ...] | None = None,
) -> Layout:
    parts = ["t"] * (pp * (vpp or 1))
    parts[0] = "E" + parts[0]
    parts[-1] += "L"
    return Layout(
        world_size=tp * cp * dp * pp,
        tp=tp,
        cp=cp,
        dp=dp,
        pp=pp,
        vpp=vpp,
        ep=ep,
        etp=1,
        sequence_parallel=False,
        batch_p2p_comm=vpp is None,
        stages=stages or tuple(parts),
        num_micro_batches=micro_batches,
    )


def _work(
    layout: Layout,
    forward: float = 1.0,
    backward: float = 1.0,
    encode: float | None = None,
    encode_backward: float | None = None,
    **more: Any,
) -> StepWork:
    """Costs that are the same everywhere; of the encoder, those on the ranks that encode."""
    shape = (layout.dp, layout.num_micro_batches, len(layout.stages))
    windows = -(-layout.num_micro_batches // more.get("window_size", 1))
    encodes = np.ones((windows, layout.world_size))
    if more.get("placement") == "first_stage":
        encodes[:, layout.world_size // layout.pp :] = 0.0
    return StepWork(
        **{
            "forward_seconds": np.full(shape, forward),
            "backward_seconds": np.full(shape, backward),
            "send_seconds": np.zeros(len(layout.stages) - 1),
            "reduce_seconds": np.zeros(layout.world_size),
            "optimizer_seconds": np.zeros(layout.world_size),
            "encode_seconds": None if encode is None else encode * encodes,
            "encode_backward_seconds": (
                None if encode_backward is None else encode_backward * encodes
            ),
            **more,
        }
    )


def _random_case(seed: int) -> tuple[Layout, StepWork]:
    """A small layout with every cost drawn at random."""
    draw = np.random.default_rng(seed)
    pp, dp = int(draw.integers(1, 5)), int(draw.choice([1, 2, 4]))
    vpp = int(draw.integers(2, 4)) if pp > 1 and draw.random() < 0.5 else None
    micro_batches = int(draw.integers(1, 5)) * pp if vpp else int(draw.integers(1, 10))
    stages = None
    if pp > 1 and draw.random() < 0.3:
        # Tokens are embedded on the second pipeline rank.
        stages = ("", "Et", *["t"] * (pp * (vpp or 1) - 2))
    layout = _layout(
        tp=int(draw.integers(1, 3)),
        cp=int(draw.integers(1, 3)),
        dp=dp,
        pp=pp,
        vpp=vpp,
        micro_batches=micro_batches,
        stages=stages,
    )
    classic = draw.random() < 0.3
    size = 1 if classic else int(draw.integers(1, micro_batches + 1))
    shape, ranks = (dp, micro_batches, len(layout.stages)), layout.world_size
    windows = (-(-micro_batches // size), ranks)
    trained, moved = draw.random() < 0.8, not classic and draw.random() < 0.8
    encodes = np.ones(ranks)
    if classic:
        encodes = np.arange(ranks) // (ranks // pp) == layout.embedding_stage
    return layout, StepWork(
        forward_seconds=draw.random(shape),
        backward_seconds=2 * draw.random(shape),
        send_seconds=0.1 * draw.random(len(layout.stages) - 1),
        reduce_seconds=draw.random(ranks),
        optimizer_seconds=draw.random(ranks),
        encode_seconds=draw.random(windows) * encodes,
        encode_backward_seconds=2 * draw.random(windows) * encodes if trained else None,
        exchange_seconds=0.2 * draw.random(windows) if moved else None,
        exchange_back_seconds=0.2 * draw.random(windows) if moved and trained else None,
        placement="first_stage" if classic else "all_ranks",
        window_size=size,
        balance_group_size=ranks // dp * int(draw.choice([1, dp])),
        lockstep_replicas=int(draw.choice([1, dp])),
    )


def _earliest(layout: Layout, work: StepWork, events: list[Event]) -> dict[tuple[int, int], float]:
    """(rank, number of its event) -> when it could begin, by the rules and one rank at a time.

    Written from the description alone: everything is looked up among the events, rank by rank.
    """
    embed = next(i for i, stage in enumerate(layout.stages) if "E" in stage)
    embedding, replica = embed % layout.pp, layout.world_size // layout.dp
    group = (work.balance_group_size or layout.world_size) // replica
    coupled = work.lockstep_replicas or 1
    windowed = work.placement == "all_ranks" and work.encode_seconds is not None
    by_rank: list[list[Event]] = [[] for _ in range(layout.world_size)]
    found: dict[tuple, Event] = {}
    for event in events:
        by_rank[event.rank].append(event)
        key = (event.micro_batch, event.chunk) if event.chunk >= 0 else event.window
        found[event.kind, event.rank, key] = event

    def peers(rank: int, replicas: int, stages: Any = None) -> list[int]:
        place = layout.coordinates(rank)
        first = place.dp // replicas * replicas
        return [
            layout.rank(tp=tp, cp=cp, dp=dp, pp=pp)
            for tp in range(layout.tp)
            for cp in range(layout.cp)
            for dp in range(first, first + replicas)
            for pp in (stages if stages is not None else [place.pp])
        ]

    @cache
    def arrived(kind: str, first: int, window: int) -> float:
        """When a window has come from all that encode, or embed, for the group of `first`."""
        stages = range(layout.pp) if kind == "exchange" else [embedding]
        sources = peers(layout.rank(dp=first), group, stages)
        return max(found[kind, source, window].end for source in sources)

    @cache
    def released(kind: str, rank: int, key: tuple) -> float:
        return max(found[kind, peer, key].end for peer in peers(rank, coupled))

    def free(rank: int, number: int) -> float:
        if number == 0:
            return 0.0
        before = by_rank[rank][number - 1]
        if before.chunk < 0:
            return before.end
        return released(before.kind, rank, (before.micro_batch, before.chunk))

    begins = {}
    numbers = {(e.rank, e.kind, e.micro_batch, e.chunk, e.window): n
               for own in by_rank for n, e in enumerate(own)}  # fmt: skip
    for rank, own in enumerate(by_rank):
        place = layout.coordinates(rank)
        for number, event in enumerate(own):
            bounds = [free(rank, number)]
            if event.chunk >= 0:
                for peer in peers(rank, coupled):
                    dp = layout.coordinates(peer).dp
                    mine = (peer, *event[1:5])
                    bounds.append(free(peer, numbers[mine]))
                    stage = event.chunk * layout.pp + place.pp
                    other = stage - 1 if event.kind == "forward" else stage + 1
                    if 0 <= other < len(layout.stages):
                        source = layout.rank(dp=dp, pp=other % layout.pp)
                        key = (event.micro_batch, other // layout.pp)
                        hop = work.send_seconds[min(stage, other)]
                        bounds.append(released(event.kind, source, key) + hop)
                    if windowed and event.kind == "forward" and stage == embed:
                        window = event.micro_batch // work.window_size
                        bounds.append(arrived("exchange", dp // group * group, window))
            elif windowed and (
                event.kind == "encode_backward"
                or (event.kind == "exchange_back" and place.pp != embedding)
            ):
                first = place.dp // group * group
                bounds.append(arrived("exchange_back", first, event.window))
            elif event.kind == "reduce":
                shared = windowed and work.encode_backward_seconds is not None
                stages = range(layout.pp) if shared else None
                for peer in peers(rank, layout.dp, stages):
                    bounds.append(free(peer, len(by_rank[peer]) - 2))
            elif event.kind == "optimizer":
                bounds += [found["reduce", peer, -1].end for peer in range(layout.world_size)]
            begins[rank, number] = max(bounds)
    return begins


@pytest.mark.unit
@pytest.mark.parametrize("seed", range(40))
def test_every_task_begins_as_soon_as_it_may(seed: int) -> None:
    layout, work = _random_case(seed)
    timeline = replay(layout, work)
    events = timeline.events()
    begins = _earliest(layout, work, events)
    number = dict.fromkeys(range(layout.world_size), 0)
    for event in events:
        earliest = begins[event.rank, number[event.rank]]
        number[event.rank] += 1
        assert event.start == pytest.approx(earliest, abs=1e-12), event
    assert len(begins) == len(events)


@pytest.mark.unit
@pytest.mark.parametrize("seed", range(40))
def test_every_rank_does_its_work_and_no_more(seed: int) -> None:
    """Each cost is spent once by whom it is given for, nothing at the same time as another."""
    layout, work = _random_case(seed)
    timeline = replay(layout, work)
    events = timeline.events()
    assert min(event.start for event in events) == 0.0
    for before, after in zip(events[:-1], events[1:], strict=True):
        assert before.rank < after.rank or before.end <= after.start
    spent: dict[str, Any] = {"forward": work.forward_seconds, "backward": work.backward_seconds}
    for kind, seconds in spent.items():
        expected = [
            seconds[place.dp, :, place.pp :: layout.pp].sum()
            for place in map(layout.coordinates, range(layout.world_size))
        ]
        np.testing.assert_allclose(timeline.kind_seconds(kind), expected)  # type: ignore[arg-type]
    for kind in ("encode", "exchange", "exchange_back", "encode_backward", "reduce", "optimizer"):
        seconds = getattr(work, f"{kind}_seconds")
        total = 0.0 if seconds is None else np.atleast_2d(seconds).sum(axis=0)
        assert timeline.kind_seconds(kind) == pytest.approx(total), kind  # type: ignore[arg-type]
    busy, wait = timeline.busy_seconds, timeline.wait_seconds
    by_kind = sum(timeline.kind_seconds(kind) for kind in (*spent, "encode", "exchange",
        "exchange_back", "encode_backward", "reduce", "optimizer"))  # type: ignore[arg-type] # fmt: skip
    np.testing.assert_allclose(busy, by_kind)
    np.testing.assert_allclose(busy + wait, timeline.step_seconds)
    assert np.all(wait >= -1e-9) and np.all(timeline.bubble_seconds <= wait + 1e-9)
    assert np.all(timeline.bubble_seconds >= -1e-9)
    assert sum(timeline.shares().values()) == pytest.approx(1.0)
    for rank in range(layout.world_size):
        order = [
            (event.kind == "forward", event.chunk, event.micro_batch)
            for event in events
            if event.rank == rank and event.chunk >= 0
        ]
        assert order == list(passes(layout, layout.coordinates(rank).pp))


@pytest.mark.unit
@pytest.mark.parametrize("seed", range(25))
def test_a_dearer_part_never_shortens_the_step(seed: int) -> None:
    layout, work = _random_case(seed)
    base = replay(layout, work).step_seconds
    draw = np.random.default_rng(seed)
    for field in dataclasses.fields(work):
        seconds = getattr(work, field.name)
        if not field.name.endswith("_seconds") or seconds is None or not seconds.size:
            continue
        # Where the classic encodes nothing there is nothing to make dearer.
        chosen = draw.choice(np.flatnonzero(seconds) if seconds.any() else np.arange(1))
        dearer = seconds.copy()
        dearer.flat[chosen] += draw.random()
        longer = replay(layout, dataclasses.replace(work, **{field.name: dearer})).step_seconds
        assert longer >= base - 1e-12, field.name


@pytest.mark.unit
@pytest.mark.parametrize(("pp", "micro_batches"), [(2, 3), (4, 8), (8, 8), (3, 2), (1, 5)])
def test_bubble_of_1f1b(pp: int, micro_batches: int) -> None:
    layout = _layout(pp=pp, micro_batches=micro_batches)
    timeline = replay(layout, _work(layout, forward=1.0, backward=2.0))
    assert timeline.step_seconds == 3.0 * (micro_batches + pp - 1)
    np.testing.assert_allclose(timeline.bubble_seconds, 3.0 * (pp - 1))
    shares = timeline.shares()
    assert shares["wait"] == pytest.approx((pp - 1) / (micro_batches + pp - 1))
    assert shares["backward"] == pytest.approx(2 * shares["forward"])


@pytest.mark.unit
@pytest.mark.parametrize(("pp", "vpp", "groups"), [(2, 2, 2), (4, 2, 2), (4, 4, 1), (2, 3, 3)])
def test_interleaving_divides_the_bubble(pp: int, vpp: int, groups: int) -> None:
    """(pp - 1) / vpp passes of a whole rank: Narayanan et al. 2021, section 2.2.2."""
    layout = _layout(pp=pp, vpp=vpp, micro_batches=groups * pp)
    timeline = replay(layout, _work(layout, forward=1.0 / vpp, backward=2.0 / vpp))
    assert timeline.step_seconds == pytest.approx(3.0 * (groups * pp + (pp - 1) / vpp))
    np.testing.assert_allclose(timeline.bubble_seconds, 3.0 * (pp - 1) / vpp)


@pytest.mark.unit
def test_transfers_by_hand() -> None:
    """Two stages, two micro-batches, half a second between stages."""
    layout = _layout(pp=2, micro_batches=2)
    timeline = replay(layout, _work(layout, send_seconds=np.array([0.5])))
    times = [(e.rank, e.kind, e.micro_batch, e.start) for e in timeline.events() if e.chunk >= 0]
    assert times == [
        (0, "forward", 0, 0.0),
        (0, "forward", 1, 1.0),
        (0, "backward", 0, 4.0),
        (0, "backward", 1, 6.0),
        (1, "forward", 0, 1.5),
        (1, "backward", 0, 2.5),
        (1, "forward", 1, 3.5),
        (1, "backward", 1, 4.5),
    ]
    assert timeline.step_seconds == 7.0


@pytest.mark.unit
@pytest.mark.parametrize(("pp", "micro_batches"), [(2, 4), (4, 8)])
def test_an_encoder_on_the_first_stage_delays_all(pp: int, micro_batches: int) -> None:
    """Its passes take 1 + 3 and 1 + 6 seconds and all others wait for them."""
    layout = _layout(pp=pp, micro_batches=micro_batches)
    work = _work(layout, encode=3.0, encode_backward=6.0, placement="first_stage")
    timeline = replay(layout, work)
    # The first gradient is back, after 4 + 2 * (pp - 1) seconds, within the warm-up's 4 * pp.
    assert timeline.step_seconds == micro_batches * 11.0
    assert timeline.busy_seconds[0] == micro_batches * 11.0
    np.testing.assert_allclose(timeline.busy_seconds[1:], micro_batches * 2.0)
    np.testing.assert_allclose(timeline.bubble_seconds[1:], micro_batches * 9.0)
    # On all ranks, without a window, the same work takes what every rank has to do and the bubble.
    share = dataclasses.replace(
        work,
        placement="all_ranks",
        window_size=micro_batches,
        encode_seconds=np.full((1, pp), 3.0 * micro_batches / pp),
        encode_backward_seconds=np.full((1, pp), 6.0 * micro_batches / pp),
    )
    ours = replay(layout, share).step_seconds
    assert ours == pytest.approx(9.0 * micro_batches / pp + 2.0 * (micro_batches + pp - 1))


@pytest.mark.unit
@pytest.mark.parametrize("dp", [1, 4])
@pytest.mark.parametrize("pp", [1, 2, 4])
def test_balanced_encoding_on_all_ranks(pp: int, dp: int) -> None:
    """One window: encode, exchange, pipeline, exchange, backward, reduce, update; in a row."""
    layout = _layout(tp=2, dp=dp, pp=pp, micro_batches=6)
    ranks = layout.world_size
    work = _work(
        layout,
        forward=1.0,
        backward=2.0,
        encode=5.0,
        encode_backward=10.0,
        window_size=6,
        exchange_seconds=np.full((1, ranks), 0.25),
        exchange_back_seconds=np.full((1, ranks), 0.5),
        reduce_seconds=np.full(ranks, 0.75),
        optimizer_seconds=np.full(ranks, 0.125),
    )
    timeline = replay(layout, work)
    pipeline = 3.0 * (6 + pp - 1)
    # Other stages than the embedding one take gradients in after it has sent them.
    back = 0.5 if pp == 1 else 1.0
    assert timeline.step_seconds == 5.25 + pipeline + back + 10.0 + 0.75 + 0.125
    np.testing.assert_allclose(timeline.bubble_seconds, 3.0 * (pp - 1))


@pytest.mark.unit
def test_windows_by_hand() -> None:
    """Two stages, two windows of two micro-batches, a second for everything."""
    layout = _layout(pp=2, micro_batches=4)
    timeline = replay(layout, _work(layout, encode=1.0, encode_backward=1.0, window_size=2))
    assert timeline.step_seconds == 14.0
    events = [event for event in timeline.events() if event.end > event.start]
    first = [(e.kind, e.window + e.micro_batch + 1, e.start) for e in events if e.rank == 0]
    assert first == [
        ("encode", 0, 0.0),
        ("encode", 1, 1.0),
        ("forward", 0, 2.0),
        ("forward", 1, 3.0),
        ("backward", 0, 5.0),
        ("forward", 2, 6.0),
        ("backward", 1, 7.0),
        ("forward", 3, 8.0),
        ("backward", 2, 9.0),
        ("backward", 3, 11.0),
        ("encode_backward", 0, 12.0),
        ("encode_backward", 1, 13.0),
    ]
    # Its own passes end a second earlier, but the last gradients come with the other's last pass.
    second = {(e.kind, e.window): e.start for e in events if e.rank == 1}
    assert second["encode_backward", 0] == 12.0
    assert second["encode_backward", 1] == 13.0


@pytest.mark.unit
def test_features_leave_a_window_ahead() -> None:
    """All are encoded first; gradients come home after the last pass."""
    layout = _layout(pp=2, micro_batches=8)
    timeline = replay(layout, _work(layout, encode=1.0, encode_backward=1.0, window_size=2))
    for rank in range(2):
        order = [
            (event.kind, event.window if event.chunk < 0 else event.micro_batch)
            for event in timeline.events()
            if event.rank == rank and event.kind not in ("backward", "reduce", "optimizer")
        ]
        begins = [
            ("encode", 0),
            ("exchange", 0),
            ("encode", 1),
            ("encode", 2),
            ("encode", 3),
            ("exchange", 1),
            ("forward", 0),
            ("forward", 1),
            ("exchange", 2),
            ("forward", 2),
            ("forward", 3),
            ("exchange", 3),
        ]
        forwards = [("forward", number) for number in range(4, 8)]
        homewards = [("encode_backward", window) for window in range(4)]
        back = [("exchange_back", window) for window in range(4)]
        assert [entry for entry in order if entry not in back] == begins + forwards + homewards
        # The embedding stage sends each window's once it has them, the other takes them in at last.
        places = [order.index(entry) for entry in back]
        assert places == sorted(places)
        assert (places[0] > order.index(("forward", 7))) == (rank == 1)


@pytest.mark.unit
def test_a_frozen_encoder_has_no_way_back() -> None:
    layout = _layout(pp=2, micro_batches=4)
    timeline = replay(layout, _work(layout, encode=1.0, window_size=4))
    assert timeline.step_seconds == 1.0 + 2.0 * 5
    assert {event.kind for event in timeline.events()}.isdisjoint(
        {"exchange_back", "encode_backward"}
    )


@pytest.mark.unit
def test_one_slow_encoder_holds_up_its_balance_group_alone() -> None:
    layout = _layout(dp=4, pp=2, micro_batches=2)
    encode = np.ones((1, 8))
    encode[0, layout.rank(dp=3, pp=1)] = 9.0
    work = _work(layout, encode=1.0, window_size=2, encode_seconds=encode)

    def begins(work: StepWork) -> list[float]:
        events = replay(layout, work).events()
        return [e.start for e in events if e.kind == "forward" and e.rank < 4][::2]

    assert begins(work) == [9.0] * 4
    halves = dataclasses.replace(work, balance_group_size=4)
    assert begins(halves) == [1.0, 1.0, 9.0, 9.0]


@pytest.mark.unit
def test_the_slowest_tensor_rank_begins_a_pass() -> None:
    layout = _layout(tp=2, cp=2, micro_batches=1)
    encode = np.array([[1.0, 4.0, 2.0, 3.0]])
    timeline = replay(layout, _work(layout, encode=1.0, encode_seconds=encode))
    begins = [event.start for event in timeline.events() if event.kind == "forward"]
    assert begins == [4.0] * 4
    np.testing.assert_allclose(timeline.wait_seconds, [3.0, 0.0, 2.0, 1.0])


@pytest.mark.unit
def test_experts_over_replicas_couple_their_micro_batches() -> None:
    """Two replicas, slow in turn: alone each takes 1 + 3, together 3 + 3 a direction."""
    seconds = np.array([1.0, 3.0, 3.0, 1.0]).reshape(2, 2, 1)
    for ep, expected in ((1, 8.0), (2, 12.0)):
        layout = _layout(dp=2, micro_batches=2, ep=ep)
        work = _work(layout, forward_seconds=seconds, backward_seconds=seconds)
        timeline = replay(layout, work)
        assert timeline.step_seconds == expected
        np.testing.assert_allclose(timeline.busy_seconds, 8.0)
        free = replay(layout, dataclasses.replace(work, lockstep_replicas=1))
        assert free.step_seconds == 8.0


@pytest.mark.unit
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"send_seconds": np.zeros(3)}, r"send_seconds is of shape \(3,\); expected \(1,\)"),
        ({"encode_seconds": np.ones((4, 4))}, r"encode_seconds .* expected \(2, 4\) for 4 ranks"),
        ({"reduce_seconds": np.array([0, 0, -1.0, 0])}, r"reduce_seconds\[2\] is -1.0"),
        ({"optimizer_seconds": np.array([0, np.nan, 0, 0])}, r"optimizer_seconds\[1\] is nan"),
        ({"encode_seconds": None}, "encode_backward_seconds without encode_seconds"),
        ({"window_size": 0}, "window_size is 0; expected 1 or more"),
        ({"placement": "first_stage"}, "window_size is 2 with placement first_stage"),
        ({"balance_group_size": 3}, "balance_group_size is 3; expected a divisor of the 4"),
        ({"lockstep_replicas": 3}, "lockstep_replicas is 3; expected a divisor of the 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_costs_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    layout = _layout(dp=2, pp=2)
    work = _work(layout, encode=1.0, encode_backward=1.0, window_size=2)
    with pytest.raises(PlanError, match=message):
        replay(layout, dataclasses.replace(work, **change))


@pytest.mark.unit
def test_the_classic_refuses_what_it_has_not() -> None:
    layout = _layout(dp=2, pp=2)
    work = _work(layout, encode=1.0, placement="first_stage")
    with pytest.raises(PlanError, match="exchange_seconds with placement first_stage"):
        replay(layout, dataclasses.replace(work, exchange_seconds=np.zeros((4, 4))))
    with pytest.raises(PlanError, match="encode_seconds of rank 2 is not 0"):
        replay(layout, dataclasses.replace(work, encode_seconds=np.ones((4, 4))))
    with pytest.raises(PlanError, match="3 micro-batches on interleaved stages"):
        uneven = _layout(pp=2, vpp=2, micro_batches=3)
        replay(uneven, _work(uneven))


@pytest.mark.unit
@pytest.mark.parametrize("sizes", [{"tp": 4, "dp": 32}, {"dp": 128, "vpp": 2}], ids=["tp", "vpp"])
def test_a_thousand_ranks_take_seconds(sizes: dict[str, int]) -> None:
    layout = _layout(pp=8, micro_batches=64, **sizes)
    assert layout.world_size == 1024
    work = _work(layout, encode=1.0, encode_backward=2.0, window_size=16)
    began = time.process_time()
    timeline = replay(layout, work)
    assert time.process_time() - began < 5.0
    assert len(timeline.start) > 1024 * 128


@pytest.mark.unit
def test_measured_events_make_the_same_sums() -> None:
    layout, work = _random_case(3)
    timeline = replay(layout, work)
    draw = np.random.default_rng(0)
    events = timeline.events()
    shuffled = [events[i] for i in draw.permutation(len(events))]
    moved = [event._replace(start=event.start + 7, end=event.end + 7) for event in shuffled]
    again = Timeline.from_events(moved)
    assert again.step_seconds == pytest.approx(timeline.step_seconds)
    np.testing.assert_allclose(again.busy_seconds, timeline.busy_seconds)
    np.testing.assert_allclose(again.bubble_seconds, timeline.bubble_seconds, atol=1e-12)
    assert again.shares() == pytest.approx(timeline.shares())


@pytest.mark.unit
def test_what_overlaps_is_busy_once() -> None:
    timeline = Timeline.from_events(
        [
            Event(1, "exchange", -1, -1, 0, 3.0, 5.0),
            Event(1, "forward", 0, 0, -1, 2.0, 8.0),
            Event(1, "backward", 0, 0, -1, 9.0, 10.0),
            Event(0, "encode", -1, -1, 0, 0.0, 1.0),
        ]
    )
    assert timeline.step_seconds == 10.0
    assert timeline.busy_seconds.tolist() == [1.0, 7.0]
    assert timeline.wait_seconds.tolist() == [9.0, 3.0]
    assert timeline.bubble_seconds.tolist() == [8.0, 1.0]


@pytest.mark.unit
def test_events_that_are_none() -> None:
    with pytest.raises(PlanError, match="no events"):
        Timeline.from_events([])
    with pytest.raises(PlanError, match="rank 3, reduce: starts at 2.0 s and ends at 1.0 s"):
        Timeline.from_events([Event(3, "reduce", -1, -1, -1, 2.0, 1.0)])
