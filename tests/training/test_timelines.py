"""A recorded step tells what each rank did: every pass once, in the schedule's order, and apart."""

from __future__ import annotations

import json
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from megatron_vlm.cli.main import main
from megatron_vlm.planning.recorded import read_timeline, recorded
from megatron_vlm.planning.schedule import passes
from megatron_vlm.planning.timeline import Event
from megatron_vlm.platform import World, start_distributed
from megatron_vlm.topology.layout import Layout, resolve_layout
from tests.nano_data import build_nano_data
from tests.parallel.layouts import LAYOUTS
from tests.ranks import run_ranks
from tests.topology.words import resolved
from tests.training_case import recipe, train_case


@pytest.fixture(scope="module")
def nano_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_nano_data(tmp_path_factory.mktemp("nano"))


def record(data: Path, folder: Path, name: str) -> tuple[Layout, dict[int, list[Event]]]:
    """Events of each recorded step of a run in a layout."""
    world_size, overrides, *_ = LAYOUTS[name]
    config = recipe(
        data,
        folder,
        *overrides,
        "training.train_iters=4",
        "training.timeline_interval=2",
        "training.global_batch_size=8",
        "vision_parallel.exchange_window=2",
    )
    train_case(config, world_size)
    layout = resolve_layout(config, world_size)
    return layout, {n: read_timeline(path)[0] for n, path in recorded(folder).items()}


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["pp3_uneven", "pp2_vpp2_ep2_overlap", "pp2_vpp2"])
def test_every_pass_is_recorded(name: str, nano_data: Path, tmp_path: Path) -> None:
    layout, steps = record(nano_data, tmp_path / "run", name)
    assert list(steps) == [2, 4]
    combined = name.endswith("overlap")
    for events in steps.values():
        assert {event.rank for event in events} == set(range(layout.world_size))
        started: dict[tuple[str, int, int], float] = {}
        ended: dict[tuple[str, int, int], float] = {}
        for rank in range(layout.world_size):
            place = layout.coordinates(rank)
            mine = sorted((e for e in events if e.rank == rank), key=lambda e: e.start)
            found = [
                (e.kind == "forward", e.chunk, e.micro_batch) for e in mine if e.micro_batch >= 0
            ]
            # What interrupts a pass cuts it in two.
            order = list(dict.fromkeys(found))
            expected = [tuple(entry) for entry in passes(layout, place.pp)]
            if combined:
                # A forward runs beside the backward that the schedule has after it.
                assert set(order) == set(expected)
            else:
                assert order == expected
                for before, after in pairwise(mine):
                    assert before.end <= after.start + 1e-9, (before, after)
            kinds = Counter(e.kind for e in mine)
            assert kinds["encode"] and kinds["encode_backward"] and kinds["optimizer"] == 1
            assert kinds["reduce"] == 2
            windows = layout.num_micro_batches // 2
            sent = {e.window for e in mine if e.kind == "exchange"}
            assert sent == set(range(windows))
            assert {e.window for e in mine if e.kind == "exchange_back"} == sent
            first = min(e.start for e in mine if e.micro_batch >= 0)
            assert all(e.end <= first for e in mine if e.kind == "encode")
            for e in mine:
                if e.micro_batch >= 0 and place.dp == 0:
                    key = e.kind, e.chunk * layout.pp + place.pp, e.micro_batch
                    started[key] = min(started.get(key, e.start), e.start)
                    ended[key] = max(ended.get(key, e.end), e.end)
        # On one clock: no pass is over before the one that it needs has begun.
        stages = len(layout.stages)
        for (kind, stage, number), end in ended.items():
            before = stage - 1 if kind == "forward" else stage + 1
            if 0 <= before < stages:
                assert end > started[kind, before, number]


def _ahead(world: World) -> float:
    """Ranks in pairs on machines whose clocks are 1,000 seconds apart."""
    from megatron_vlm.topology.mesh import build_topology
    from megatron_vlm.training import timelines

    machine = world.rank // 2
    topology = build_topology(resolved("", world.world_size), start_distributed(world))
    true_time = time.perf_counter
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timelines, "_machine", lambda: machine)
        patch.setattr(time, "perf_counter", lambda: true_time() + 1000.0 * machine)
        return timelines.align_clocks(topology)


@pytest.mark.distributed
def test_clocks_of_two_machines() -> None:
    ahead = run_ranks(4, _ahead)
    assert ahead[:2] == [0.0, 0.0]
    # Both ranks of the other machine by the same: they read one clock.
    assert ahead[2] == ahead[3] == pytest.approx(1000.0, abs=0.5)


@pytest.mark.distributed
def test_drawn_by_the_command(
    nano_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    _, steps = record(nano_data, run, "pp2")
    capsys.readouterr()
    assert main(["timeline", str(run)]) == 0
    told = capsys.readouterr().out
    assert "on 2 ranks" in told and "encode backward" in told
    with Image.open(run / "timelines/iter_0000004.png") as picture:
        assert picture.width > 1000
    trace = json.loads((run / "timelines/iter_0000004.json").read_text())
    drawn = [entry for entry in trace["traceEvents"] if entry["ph"] == "X"]
    assert len(drawn) == sum(event.end > event.start for event in steps[4])
    assert main(["timeline", str(run), "--iteration", "2"]) == 0
    capsys.readouterr()
    for metrics in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        parts = [metrics[f"{name}_time_s"] for name in ("encode", "exchange", "bubble")]
        assert all(0 < part < metrics["step_time_s"] for part in parts)
    assert main(["timeline", str(run), "--iteration", "3"]) == 2
    assert "the recorded steps are 2, 4" in capsys.readouterr().err
    damaged = run / "timelines/iter_0000004.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert main(["timeline", str(run)]) == 2
    assert "not a timeline" in capsys.readouterr().err


@pytest.mark.unit
def test_nothing_to_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["timeline", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["timeline", str(tmp_path)]) == 2
    assert "training.timeline_interval" in capsys.readouterr().err
