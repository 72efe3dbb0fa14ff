"""Validation: a mean over target tokens, alike in every batching, that leaves training alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.data.index import open_dataset
from tests.training.driver import with_run
from tests.training_case import recipe

pytestmark = pytest.mark.distributed


def _metrics(run: Any) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []
    run.run(on_step=lambda metrics: seen.append(dict(metrics)))
    return seen


def _train(data: Path, run_dir: Path, *words: str, world_size: int = 1) -> list[dict[str, Any]]:
    second = f"data.validation.second={data / 'train'}"
    config = recipe(data, run_dir, "training.train_iters=2", second, *words)
    return with_run(config, _metrics, world_size)[0]


def _target_tokens(path: Path) -> int:
    return int(open_dataset(path).columns.sample_loss_tokens.sum())


def test_mean_over_target_tokens(nano_data: Path, tmp_path: Path) -> None:
    metrics = _train(nano_data, tmp_path, "training.eval_interval=1")
    counts = [_target_tokens(nano_data / name) for name in ("held_out", "train")]
    assert counts[0] != counts[1]
    for entry in metrics:
        losses = [entry[f"validation_loss_{name}"] for name in ("held_out", "second")]
        assert losses[0] != losses[1]
        weighted = sum(n * loss for n, loss in zip(counts, losses, strict=True)) / sum(counts)
        assert entry["validation_loss"] == pytest.approx(weighted, rel=1e-12)
    assert metrics[0]["validation_loss"] != metrics[1]["validation_loss"]
    written = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    names = [name for name in metrics[0] if name.startswith("validation")]
    for line, entry in zip(written, metrics, strict=True):
        assert {name: line[name] for name in names} == {name: entry[name] for name in names}


def test_alike_in_every_batching(nano_data: Path, tmp_path: Path) -> None:
    """Batches that do not divide the set are filled up; the filling counts for nothing."""
    # The first step's weights do not depend on the batch: compare before any step is taken.
    still = ("optimizer.lr=1e-300", "training.train_iters=1", "optimizer.lr_warmup_iters=0")
    bias = "model.language.moe_router_bias_update_rate=0"
    one = _train(nano_data, tmp_path / "one", *still, bias)[-1]
    for name, world_size, words in (
        ("small", 1, ("training.global_batch_size=5",)),
        ("wide", 1, ("training.global_batch_size=14", "training.micro_batch_size=2")),
        ("ranks", 2, ("training.global_batch_size=6",)),
    ):
        other = _train(nano_data, tmp_path / name, *still, bias, *words, world_size=world_size)[-1]
        for key in ("validation_loss", "validation_loss_held_out", "validation_loss_second"):
            assert other[key] == pytest.approx(one[key], rel=1e-12), (name, key)


def test_part_of_a_set(nano_data: Path, tmp_path: Path) -> None:
    whole = _train(nano_data, tmp_path / "whole")[-1]
    part = _train(nano_data, tmp_path / "part", "training.eval_rows=2")[-1]
    assert part["lm_loss"] == whole["lm_loss"]
    assert part["validation_loss_second"] != whole["validation_loss_second"]


def test_training_does_not_notice(nano_data: Path, tmp_path: Path) -> None:
    """Only the last step of a run validates unasked, and no step trains differently for it."""
    words = ("training.train_iters=3",)
    often = _train(nano_data, tmp_path / "often", *words, "training.eval_interval=1")
    once = _train(nano_data, tmp_path / "once", *words)
    assert ["validation_loss" in entry for entry in often] == [True, True, True]
    assert ["validation_loss" in entry for entry in once] == [False, False, True]
    for name in ("lm_loss", "grad_norm", "load_balancing_loss", "expert_imbalance"):
        assert [entry[name] for entry in often] == [entry[name] for entry in once], name
    assert often[-1]["validation_loss"] == once[-1]["validation_loss"]
