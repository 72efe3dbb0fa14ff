"""`mvlm train`: each error is told, and by one rank of those that share a terminal."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_vlm.checkpoint.folder import list_iterations
from megatron_vlm.cli import train
from megatron_vlm.errors import CheckpointError, DataError, UserError
from megatron_vlm.platform import local_launch
from tests.training_case import RECIPE


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[UserError], argparse.Namespace]:
    """Let `mvlm train` end in an error."""

    def install(error: UserError) -> argparse.Namespace:
        import megatron_vlm.training.loop as loop

        def end(config: object) -> None:
            raise error

        monkeypatch.setattr(loop, "train", end)
        return argparse.Namespace(recipe=str(RECIPE), overrides=[])

    return install


RANK_VARIABLES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
COUNT_VARIABLES = ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@pytest.mark.unit
@pytest.mark.parametrize("variable", RANK_VARIABLES)
def test_a_rank_above_0_names_itself(
    failing: Callable[[UserError], argparse.Namespace],
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
) -> None:
    for name in (*RANK_VARIABLES, *COUNT_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    # As under `mvlm launch`, where each rank has a file of its own.
    monkeypatch.setenv(local_launch.OWN_OUTPUT, "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    args = failing(CheckpointError("damaged"))
    monkeypatch.setenv(variable, "0")
    with pytest.raises(CheckpointError, match="^damaged$"):
        train.run(args)
    monkeypatch.setenv(variable, "3")
    with pytest.raises(CheckpointError, match="^rank 3: damaged$"):
        train.run(args)


# As torchrun would: ranks are children of one process and share its terminal.
SHARED = """
import os, subprocess, sys
words, places = sys.argv[1].split(), sys.argv[2:]
ranks = []
for place in places:
    rank, path = place.split(":")
    environment = {**os.environ, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "4"}
    command = [sys.executable, "-m", "megatron_vlm", "train", path, *words]
    ranks.append(subprocess.Popen(command, env=environment))
assert [rank.wait() for rank in ranks] == [2] * len(ranks)
"""


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (("0:/nowhere.yaml", "1:/nowhere.yaml", "2:/nowhere.yaml"), {"/nowhere.yaml": 1}),
        # What one rank alone meets, whichever it is.
        (("1:/nowhere.yaml",), {"rank 1: recipe file /nowhere.yaml": 1}),
        (("0:/one.yaml", "2:/two.yaml", "3:/two.yaml"), {"/one.yaml": 1, "/two.yaml": 1}),
    ],
)
def test_ranks_on_one_terminal_tell_each_error_once(
    places: tuple[str, ...], expected: dict[str, int]
) -> None:
    environment = {k: v for k, v in os.environ.items() if k != local_launch.OWN_OUTPUT}
    done = subprocess.run(
        [sys.executable, "-c", SHARED, "training.train_iters=1", *places],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = {text: done.stderr.count(text) for text in expected}
    assert told == expected and done.stderr.count("\n") == len(expected), done.stderr


@pytest.mark.unit
def test_a_rank_writes_its_error_into_its_log(
    failing: Callable[[UserError], argparse.Namespace],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv(train._OWN_OUTPUT, "1")
    args = failing(DataError("a truncated shard"))
    logger = logging.getLogger("megatron_vlm")
    monkeypatch.setattr(logger, "handlers", [])
    handler = logging.FileHandler(tmp_path / "rank.log")
    logger.addHandler(handler)
    with pytest.raises(DataError, match="rank 3: a truncated shard"):
        train.run(args)
    handler.close()
    assert "a truncated shard" in (tmp_path / "rank.log").read_text()


@pytest.mark.distributed
def test_ctrl_c_saves(nano_data: Path, tmp_path: Path) -> None:
    """Alone in a terminal too: what was trained so far is kept, and the exit code tells how."""
    words = [
        f"data.train={nano_data / 'train'}",
        f"run_dir={tmp_path / 'run'}",
        "training.train_iters=100000",
        "training.precision=fp32",
    ]
    command = [sys.executable, "-m", "megatron_vlm", "train", str(RECIPE), *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines() == [
        "mvlm: saving and leaving; Ctrl-C again ends at once",
        "mvlm: interrupted",
    ]
    (saved,) = list_iterations(tmp_path / "run" / "checkpoints")
    assert len(metrics.read_text().splitlines()) == saved
