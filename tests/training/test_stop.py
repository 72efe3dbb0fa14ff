"""Asked to stop, every rank takes the same step as its last, saves, and leaves."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.checkpoint.folder import find_checkpoint, list_iterations, read_state
from megatron_vlm.checkpoint.verify import verify_files
from megatron_vlm.training.signals import StopRequest
from tests.training.driver import with_run
from tests.training_case import recipe

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.mark.unit
@pytest.mark.parametrize("number", SIGNALS)
def test_request_is_remembered(number: signal.Signals) -> None:
    earlier = [signal.getsignal(each) for each in SIGNALS]
    with StopRequest() as request:
        assert request.received is None
        # Else the signal would end the tests.
        assert callable(signal.getsignal(number))
        os.kill(os.getpid(), number)
        assert request.received == number
    assert [signal.getsignal(each) for each in SIGNALS] == earlier, "handlers are put back"


@pytest.mark.unit
def test_second_interrupt_ends_at_once() -> None:
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def _stopped(number: signal.Signals, rank: int, moment: str) -> Any:
    """A run in which one rank gets a signal in its third step, and another while it saves."""

    def use(run: Any) -> dict[str, Any]:
        seen: list[int] = []
        mine = run.topology.rank == rank
        train, save = run.step.train, run.checkpointer.save

        def step(loaded: Any) -> Any:
            if mine and moment == "inside" and run.progress.iteration == 2:
                os.kill(os.getpid(), number)
            return train(loaded)

        def saving(*arguments: Any) -> None:
            # Schedulers ask more than once; by default the second time would end the process.
            os.kill(os.getpid(), number)
            save(*arguments)

        def observe(metrics: dict[str, Any]) -> None:
            seen.append(metrics["iteration"])
            if mine and moment == "after" and metrics["iteration"] == 3:
                os.kill(os.getpid(), number)

        run.step.train, run.checkpointer.save = step, saving
        progress = run.run(on_step=observe)
        last = Path(run.config.run_dir) / "metrics.jsonl"
        keys = [set(json.loads(line)) for line in last.read_text().splitlines()]
        validated = [number for number, found in enumerate(keys, 1) if "validation_loss" in found]
        return {"seen": seen, "iteration": progress.iteration, "validated": validated}

    return use


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("number", "rank", "moment", "last", "async_save"),
    [
        (signal.SIGTERM, 1, "after", 4, False),
        (signal.SIGUSR1, 0, "after", 4, True),
        (signal.SIGTERM, 1, "inside", 3, True),
        (signal.SIGUSR1, 1, "inside", 3, False),
    ],
)
def test_one_signal_stops_all_ranks(
    nano_data: Path,
    tmp_path: Path,
    number: signal.Signals,
    rank: int,
    moment: str,
    last: int,
    async_save: bool,
) -> None:
    words = (
        "training.precision=fp32",
        "training.eval_interval=1",
        f"checkpoint.async_save={str(async_save).lower()}",
    )
    config = recipe(nano_data, tmp_path, *words)
    for found in with_run(config, _stopped(number, rank, moment), 2):
        steps = list(range(1, last + 1))
        # The last is not validated: who asks may not wait for that.
        assert found == {"seen": steps, "iteration": last, "validated": steps[:-1]}
    assert list_iterations(tmp_path / "checkpoints") == [last]
    path = find_checkpoint(tmp_path)
    verify_files(path)
    progress = read_state(path)["progress"]
    assert progress["iteration"] == progress["optimizer_steps"] == last
    assert progress["consumed_samples"] == 4 * last
    log = (tmp_path / "logs" / "rank_00000.log").read_text()
    assert f"asked to stop: saved iteration {last} and left" in log


@pytest.mark.distributed
def test_a_run_stopped_in_its_last_step_is_finished(nano_data: Path, tmp_path: Path) -> None:
    config = recipe(nano_data, tmp_path, "training.train_iters=3", "training.precision=fp32")
    (found,) = with_run(config, _stopped(signal.SIGTERM, 0, "inside"))
    assert found["iteration"] == 3
    assert "asked to stop" not in (tmp_path / "logs" / "rank_00000.log").read_text()
    assert list_iterations(tmp_path / "checkpoints") == [3]
