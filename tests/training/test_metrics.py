"""metrics.jsonl, TensorBoard and the log line: the same numbers, every step once."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_vlm.data.picture_table import PicturePlan, PictureTable, Shares
from megatron_vlm.data.plan import StepPlan
from megatron_vlm.training.console import StepBar, logger, open_logs
from megatron_vlm.training.metrics import (
    MetricsWriter,
    log_line,
    model_flops,
    vision_imbalance,
)
from tests.engine.plans import bare_layout, random_plan
from tests.topology.words import config

pytestmark = pytest.mark.unit


def _metrics(iteration: int, run: float = 0.0) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "consumed_samples": 8 * iteration,
        "lm_loss": 1 / 3 + iteration + run,
        "load_balancing_loss": 1.0 + 1e-9 * iteration,
        "grad_norm": math.nan if iteration == 3 else 0.1 * iteration,
        "learning_rate": 3e-4,
        "global_batch_size": 8,
        "step_time_s": 0.25,
        "tokens_per_second_per_device": 1234.5,
        "images_per_second_per_device": 6.25,
        "skipped_iterations": 0,
        "nan_iterations": 0,
        **({"validation_loss": 7.5 + run} if iteration % 5 == 0 else {}),
    }


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def _board(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # By default it keeps a sample of the steps.
    board = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    assert not board.Tags()["tensors"], "readers drop repeated steps of scalars alone"
    return {
        tag: [(event.step, event.value) for event in board.Scalars(tag)]
        for tag in board.Tags()["scalars"]
    }


def _same(run_dir: Path) -> None:
    """TensorBoard holds every key of every line, once, to the last bit of a float32."""
    expected: dict[str, list[tuple[int, float]]] = {}
    for line in _lines(run_dir):
        for name, value in line.items():
            single = float(np.float32(value))
            expected.setdefault(name, []).append((line["iteration"], single))
    found = _board(run_dir)
    assert found.keys() == expected.keys()
    for name in expected:
        # repr, since nan is a value here too.
        assert repr(found[name]) == repr(expected[name]), name


def _write(run_dir: Path, opened_at: int, iterations: range, run: float = 0.0) -> None:
    writer = MetricsWriter(run_dir, opened_at)
    for iteration in iterations:
        writer.write(_metrics(iteration, run))
    writer.close()
    assert writer.failed is None


def _next_second() -> None:
    # TensorBoard orders the files of a folder by the second in their names.
    now = int(time.time())
    while int(time.time()) == now:
        time.sleep(0.02)


def test_both_hold_the_same(tmp_path: Path) -> None:
    _write(tmp_path, 0, range(1, 11))
    lines = _lines(tmp_path)
    assert repr(lines) == repr([_metrics(i) for i in range(1, 11)])
    _same(tmp_path)


def test_a_full_disk_keeps_lines_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room, write = [150], os.write

    def full(file: int, content: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = write(file, content[: room[0]])
        room[0] -= done
        return done

    monkeypatch.setattr(os, "write", full)
    writer = MetricsWriter(tmp_path, 0)
    for iteration in (1, 2, 3):
        writer.write(_metrics(iteration))
    assert "No space" in str(writer.failed)
    room[0] = 10**6
    writer.write(_metrics(4))
    assert writer.failed is None
    writer.close()
    assert repr(_lines(tmp_path)) == repr([_metrics(i) for i in range(1, 5)])


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    """Ten steps were written, the checkpoint is of the sixth: 7 to 10 are done again."""
    _write(tmp_path, 0, range(1, 11))
    _next_second()
    _write(tmp_path, 6, range(7, 11), run=100.0)
    lines = _lines(tmp_path)
    assert [line["iteration"] for line in lines] == list(range(1, 11))
    assert repr(lines) == repr([_metrics(i, 100.0 if i > 6 else 0.0) for i in range(1, 11)])
    _same(tmp_path)


def test_a_crash_in_the_middle_of_a_line(tmp_path: Path) -> None:
    _write(tmp_path, 0, range(1, 5))
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"iteration": 5, "lm_lo')
    _next_second()
    _write(tmp_path, 4, range(5, 7))
    assert [line["iteration"] for line in _lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    _same(tmp_path)


def test_a_run_from_the_start_again(tmp_path: Path) -> None:
    """No checkpoint was saved: nothing of the first attempt stays."""
    _write(tmp_path, 0, range(1, 4))
    _next_second()
    _write(tmp_path, 0, range(1, 3), run=5.0)
    assert repr(_lines(tmp_path)) == repr([_metrics(i, 5.0) for i in range(1, 3)])
    _same(tmp_path)


def test_lines_are_on_disk_as_soon_as_written(tmp_path: Path) -> None:
    """Whoever watches a run, or a run that is killed, has all steps so far."""
    writer = MetricsWriter(tmp_path, 0)
    writer.write(_metrics(1))
    assert len(_lines(tmp_path)) == 1 and _board(tmp_path)["lm_loss"]
    writer.close()


def test_log_line() -> None:
    metrics = _metrics(12) | {"skipped_iterations": 2, "nan_iterations": 1, "step_time_s": 0.0625}
    metrics |= {"validation_loss": 9.0, "validation_loss_held_out": 9.0}
    line = log_line(metrics, 500, world_size=4)
    assert line.split(" | ") == [
        "iteration       12/     500",
        "consumed samples:           96",
        "elapsed time per iteration (ms): 62.5",
        "learning rate: 3.000000E-04",
        "global batch size:     8",
        "lm loss: 1.233333E+01",
        "load balancing loss: 1.000000E+00",
        "grad norm: 1.200",
        "tokens/s: 4938",
        "images/s: 25.0",
        "number of skipped iterations:   2",
        "number of nan iterations:   1 |",
    ]


def _plan(pictures: list[tuple[int, int, int]]) -> StepPlan:
    """A step with pictures (grid height, grid width, encoder rank)."""
    plan = random_plan(np.random.default_rng(0), bare_layout(dp=2), 2, 2, 64, 8, 0.0)
    table = PictureTable.of(
        [
            PicturePlan(0, 0, i, 0, height, width, 0, 0, 0, height * width // 4)
            for i, (height, width, _) in enumerate(pictures)
        ]
    )
    ranks = np.array([rank for _, _, rank in pictures], np.int64)
    none = np.zeros(len(ranks), np.int64)
    shares = Shares(np.arange(len(ranks)), ranks, none, table.patches)
    counts = (np.array([n]) for n in (1, 300, 4))
    return StepPlan(0, plan.micro_batches, table, shares, *counts, int(table.patches.sum()))


def test_vision_imbalance() -> None:
    run = config()
    even = [(4, 4, rank) for rank in range(4)]
    assert vision_imbalance(_plan(even), run, 4) == pytest.approx(1.0)
    assert vision_imbalance(_plan([(4, 4, 2)]), run, 4) == pytest.approx(4.0)
    assert vision_imbalance(_plan([(4, 4, 0), (4, 4, 0), (4, 4, 1)]), run, 2) == pytest.approx(
        4 / 3
    )
    assert vision_imbalance(_plan([]), run, 4) == 1.0
    # One picture of 64 patches costs more than four of 16: attention is quadratic.
    several = [(4, 4, 0)] * 4 + [(8, 8, 1)]
    assert 1.0 < vision_imbalance(_plan(several), run, 2) < 2.0
    assert vision_imbalance(_plan(several), config("model.vision=null"), 2) == 1.0


def test_model_flops_counts_real_work_three_times() -> None:
    """Padding and filler cost nothing, pictures cost their encoder, backward twice the forward."""
    run = config("experts=null")
    language = run.model.language
    plan = _plan([])
    lengths = [int(n) for replica in plan.micro_batches for m in replica for n in m.segment_lengths]
    weights = 4 * (4 * 64 * 64 + 3 * 64 * 128) + 64 * 384
    causal = sum(4 * 4 * 16 * n * n / 2 for n in lengths) * language.num_layers
    assert model_flops(plan, run) == pytest.approx(3 * (2 * weights * 300 + causal), rel=1e-12)
    # 16 patches: embedding 3 x 14 x 14 to 32; two blocks; the adapter over four patches at once.
    per_patch = 588 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64)
    adapter = 4 * (128 * 128 + 128 * 64)
    vision = 2 * (16 * per_patch + adapter) + 2 * 4 * 32 * 16 * 16
    with_picture = model_flops(_plan([(4, 4, 0)]), run)
    assert with_picture - model_flops(plan, run) == pytest.approx(3 * vision, rel=1e-12)


def test_logs_of_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every rank has its file; the terminal hears rank 0 alone."""
    try:
        for rank in (1, 0):
            open_logs(tmp_path, rank)
            logger.info("said by rank %d", rank)
        assert "said by rank 1" in (tmp_path / "logs" / "rank_00001.log").read_text()
        written = (tmp_path / "logs" / "rank_00000.log").read_text()
        assert "said by rank 0" in written and "rank 1" not in written
        said = capsys.readouterr().out
        assert "said by rank 0" in said and "rank 1" not in said
    finally:
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()


def test_no_bar_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with StepBar(0, 3, shown=True) as bar:
        bar.advance(0.1)
    assert capsys.readouterr() == ("", "")
