"""Two runs in one folder at once: the second is turned away and leaves no trace."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from megatron_vlm.checkpoint.lock import RunLock
from megatron_vlm.errors import CheckpointError
from tests.ranks import RankFailed
from tests.training_case import recipe, train_case


def _hold(folder: Path) -> int:
    """A process that holds `folder` until it is killed."""
    child = os.fork()
    if child == 0:
        lock = RunLock(folder)
        (folder / "held").touch()
        time.sleep(60)
        lock.release()
        os._exit(0)
    while not (folder / "held").exists():
        time.sleep(0.01)
    return child


@pytest.mark.unit
def test_held_until_its_process_ends(tmp_path: Path) -> None:
    child = _hold(tmp_path)
    try:
        with pytest.raises(CheckpointError, match=rf"in use by process {child} on"):
            RunLock(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    lock = RunLock(tmp_path)
    assert f"process {os.getpid()} on" in (tmp_path / ".in-use").read_text()
    lock.release()


@pytest.mark.distributed
def test_second_run_is_turned_away(nano_data: Path, tmp_path: Path) -> None:
    """On both ranks, with one line; nothing of the first run is touched."""
    child = _hold(tmp_path)
    config = recipe(nano_data, tmp_path, "training.train_iters=2")
    try:
        before = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises(RankFailed, match="is in use by process"):
            train_case(config, 2, timeout=60)
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert len(train_case(config, 2).losses) == 2
