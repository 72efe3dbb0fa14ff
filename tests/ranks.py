"""Forked ranks: the parent imports torch and the engine once, a layout then costs seconds.

Each rank is a fork with gloo over the loopback device. A rank that fails, or a run over its time,
ends all of them, and the first real error is raised in the test.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_vlm.platform import World, free_port, install

# Before any fork: a child of a process with running OpenMP threads may hang in its first one.
torch.set_num_threads(1)
install()

TIMEOUT_S = 300.0


class RankFailed(AssertionError):
    """A rank raised; the text is its traceback."""


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = TIMEOUT_S,
    kill_after: Callable[[], bool] | None = None,
) -> list[Any]:
    """Call `function(world, *args)` in `world_size` forked ranks; returns their results in order.

    Args:
        world_size: ranks.
        function: called with its `World`; its result must be loadable by `torch.load`.
        args: passed on.
        timeout: seconds after which all ranks are killed and the test fails.
        kill_after: polled in the parent; once it says so every rank is killed (SIGKILL) and the
            results are empty.
    """
    # Once, before a fork: else every rank imports it anew. Not at the top: it is no part of
    # collecting tests.
    if "megatron_vlm.training.loop" not in sys.modules:
        import megatron_vlm.training.loop  # noqa: F401

        # A collection writes to every object it looks at, so that each rank would get its own
        # copy of all that was imported.
        gc.collect()
        gc.freeze()

    context, port = multiprocessing.get_context("fork"), free_port()
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
        processes = []
        sys.stdout.flush()
        sys.stderr.flush()
        for rank in range(world_size):
            world = World(rank, world_size, rank, "test", "127.0.0.1", port)
            process = context.Process(target=_child, args=(function, world, args, folder))
            process.start()
            processes.append(process)
        try:
            killed = _wait(processes, time.monotonic() + timeout, kill_after, Path(folder))
        finally:
            _end(processes)
        return [] if killed else _results(Path(folder), world_size)


def _child(function: Callable[..., Any], world: World, args: tuple, folder: str) -> None:
    os.setpgid(0, 0)
    stacks = open(Path(folder) / f"{world.rank}.stacks", "w")
    stacks.write(f"--- rank {world.rank}\n")
    stacks.flush()
    faulthandler.register(signal.SIGUSR2, stacks)
    status = 0
    try:
        outcome: dict[str, Any] = {"result": function(world, *args)}
    except BaseException:
        outcome = {"error": traceback.format_exc()}
        status = 1
    temporary = Path(folder) / f"{world.rank}.part"
    torch.save(outcome, temporary)
    os.replace(temporary, Path(folder) / f"{world.rank}.pt")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _wait(
    processes: list, deadline: float, kill_after: Callable[[], bool] | None, folder: Path
) -> bool:
    while any(process.is_alive() for process in processes):
        if kill_after is not None and kill_after():
            return True
        if any(process.exitcode not in (None, 0) for process in processes):
            time.sleep(1.0)  # let the others write what they met
            return False
        if time.monotonic() > deadline:
            raise RankFailed(
                f"ranks did not finish in time; they stood at\n{_stacks(processes, folder)}"
            )
        time.sleep(0.01)
    return False


def _stacks(processes: list, folder: Path) -> str:
    """Where every thread of every rank is."""
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGUSR2)
    time.sleep(1.0)
    return "\n".join(file.read_text() for file in sorted(folder.glob("*.stacks")))


def _end(processes: list) -> None:
    for process in processes:
        # The whole group: checkpoint writers fork helpers of their own.
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            process.kill()
    for process in processes:
        process.join()


def _results(folder: Path, world_size: int) -> list[Any]:
    outcomes = []
    for rank in range(world_size):
        file = folder / f"{rank}.pt"
        # Written a moment ago by our own fork.
        loaded = torch.load(file, weights_only=False) if file.exists() else {"error": "no result"}
        outcomes.append(loaded)
    errors = [outcome["error"] for outcome in outcomes if "error" in outcome]
    if errors:
        peers = ("Connection closed", "Connection reset", "no result", "Broken pipe")
        real = [text for text in errors if not any(peer in text for peer in peers)]
        raise RankFailed((real or errors)[0])
    return [outcome["result"] for outcome in outcomes]
