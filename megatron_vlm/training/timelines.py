"""Recording a step: what each rank did, from when to when, brought together and written."""

from __future__ import annotations

import os
import platform
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.numpy import save

from megatron_vlm.checkpoint.folder import write_atomically
from megatron_vlm.engine.clock import Piece, StepClock
from megatron_vlm.planning.recorded import FOLDER, timeline_path
from megatron_vlm.planning.schedule import passes
from megatron_vlm.planning.timeline import KINDS, Event
from megatron_vlm.topology.layout import Layout
from megatron_vlm.topology.mesh import Topology

_BARRIERS = 9
"""After which all ranks read their clocks."""

_INTEGERS = ("rank", "kind", "micro_batch", "chunk", "window")


def align_clocks(topology: Topology) -> float:
    """Bring all ranks to one moment, and compare their clocks there.

    Ranks of one machine read the same clock. Of two machines' clocks the difference is the median
    over their ranks and a few barriers, since a process may be late to notice that one is over.

    Returns:
        Seconds that this rank's `time.perf_counter` is ahead of rank 0's.
    """
    moments = []
    for _ in range(_BARRIERS):
        dist.barrier()
        if topology.device.type == "cuda":
            torch.cuda.synchronize()
        moments.append(time.perf_counter())
    mine = torch.tensor([_machine(), *moments], dtype=torch.float64, device=topology.device)
    everyone = [torch.empty_like(mine) for _ in range(topology.layout.world_size)]
    dist.all_gather(everyone, mine)
    table = torch.stack(everyone).cpu()
    if table[topology.rank, 0] == table[0, 0]:
        return 0.0
    neighbours = table[table[:, 0] == table[topology.rank, 0], 1:]
    return float((neighbours - table[0, 1:]).median())


def _machine() -> int:
    """The same for processes that read the same clock; fits a double."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        named = boot + os.readlink("/proc/self/ns/time")
    except OSError:  # Not Linux.
        named = platform.node()
    return zlib.crc32(named.encode())


def events_of(pieces: list[Piece], layout: Layout, rank: int) -> list[Event]:
    """A rank's pieces with what the schedule says of its passes."""
    order = list(passes(layout, layout.coordinates(rank).pp))
    found = {
        "forward": [entry for entry in order if entry.forward],
        "backward": [entry for entry in order if not entry.forward],
    }
    events = []
    for piece in pieces:
        micro_batch, chunk, window = -1, -1, -1
        if piece.activity in found and piece.number >= 0:
            _, chunk, micro_batch = found[piece.activity][piece.number]
        elif piece.activity not in found:
            window = piece.number
        kind = piece.activity
        events.append(Event(rank, kind, micro_batch, chunk, window, piece.start, piece.end))
    return events


def record_timeline(
    clock: StepClock, ahead: float, topology: Topology, run_dir: Path, iteration: int
) -> None:
    """Bring all ranks' pieces of a step together and write them; every rank calls it.

    Args:
        clock: that timed this rank's step.
        ahead: of rank 0's clock, as `align_clocks` found.
        topology: the ranks.
        run_dir: where timelines are kept.
        iteration: the step.
    """
    events = events_of(clock.pieces(), topology.layout, topology.rank)
    began = torch.tensor(clock.began - ahead, dtype=torch.float64, device=topology.device)
    first = began.clone()
    dist.all_reduce(first, op=dist.ReduceOp.MIN)
    later = float(began - first)
    rows = [
        [
            e.rank,
            KINDS.index(e.kind),
            e.micro_batch,
            e.chunk,
            e.window,
            e.start + later,
            e.end + later,
        ]
        for e in events
    ]
    mine = torch.tensor(rows, dtype=torch.float64, device=topology.device)
    mine = mine.reshape(-1, len(Event._fields))
    most = torch.tensor(len(mine), device=topology.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    padded = torch.full((int(most), mine.size(1)), -1.0, dtype=torch.float64, device=mine.device)
    padded[: len(mine)] = mine
    everyone = [torch.empty_like(padded) for _ in range(topology.layout.world_size)]
    dist.all_gather(everyone, padded)
    if topology.rank:
        return
    table = torch.cat(everyone).cpu().numpy()
    table = table[table[:, 0] >= 0]
    columns = {
        name: table[:, number].astype(np.int32 if name in _INTEGERS else np.float64)
        for number, name in enumerate(Event._fields)
    }
    (run_dir / FOLDER).mkdir(exist_ok=True)
    metadata = {"iteration": str(iteration), "layout": topology.layout.describe()}
    write_atomically(timeline_path(run_dir, iteration), save(columns, metadata))
