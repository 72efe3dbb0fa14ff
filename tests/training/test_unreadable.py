"""Samples that cannot be read: blank on every rank alike, counted, and never the end of a run."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch.distributed as dist

from megatron_vlm.data.index import DatasetIndex, open_dataset
from tests.parallel.layouts import LAYOUTS
from tests.ranks import RankFailed
from tests.training.driver import with_run
from tests.training_case import recipe

pytestmark = pytest.mark.distributed

STEPS = ("training.train_iters=2", "data.retry_seconds=0", "data.prefetch_steps=1")
ALONE = ("training.train_iters=2", "data.retry_seconds=0", "data.max_failed_share=1")


def _copy(nano_data: Path, folder: Path) -> DatasetIndex:
    """A copy of the tests' data whose training set may be damaged."""
    shutil.copytree(nano_data / "train", folder / "train")
    shutil.copytree(nano_data / "held_out", folder / "held_out")
    return open_dataset(folder / "train")


def _spoil_text(index: DatasetIndex, sample: int) -> None:
    _overwrite(index, int(index.columns.sample_shard[sample]), sample, picture=None)


def _spoil_picture(index: DatasetIndex, sample: int) -> None:
    picture = index.picture_range(sample)[-1]
    _overwrite(index, int(index.columns.picture_shard[picture]), sample, picture)


def _overwrite(index: DatasetIndex, shard: int, sample: int, picture: int | None) -> None:
    columns = index.columns
    offset = columns.sample_offset[sample] if picture is None else columns.picture_offset[picture]
    with (index.folder / index.shard_names[shard]).open("r+b") as file:
        file.seek(int(offset))
        file.write(b"not what it was " * 4)


def _drawn(run: Any) -> list[int]:
    """Samples of the first step, in the order of its rows."""
    rows = run.data.stream.take(run.data.stream.start(), 4)[0]
    return [int(sample) for row in rows for sample in row.sample]


def _metrics(run: Any) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []
    run.run(on_step=lambda metrics: seen.append(dict(metrics)))
    return seen


def _first_step(run: Any) -> dict[str, Any]:
    """Sum of the first step's loss over its targets, and how many there are."""
    with run._loader() as loader:
        loaded = run._next(loader)
    result = run.step.train(loaded)
    return {
        "sum": result.losses["lm_loss"] * loaded.plan.loss_tokens,
        "targets": loaded.plan.loss_tokens,
        "failed": loaded.plan.failed,
    }


def test_the_loss_is_that_of_what_could_be_read(nano_data: Path, tmp_path: Path) -> None:
    """What fails and what is left add up to the whole: samples see nothing of each other."""
    index = _copy(nano_data, tmp_path / "whole")
    config = recipe(tmp_path / "whole", tmp_path / "a", *ALONE)
    drawn, whole = with_run(config, lambda run: (_drawn(run), _first_step(run)))[0]
    assert whole["failed"] == 0
    with_picture = next(sample for sample in drawn if len(index.picture_range(sample)))
    bad = {drawn[1], drawn[-1], with_picture}
    parts = []
    for name, unreadable in (("some", bad), ("others", set(drawn) - bad)):
        damaged = _copy(nano_data, tmp_path / name)
        for sample in unreadable:
            if len(damaged.picture_range(sample)):
                _spoil_picture(damaged, sample)
            else:
                _spoil_text(damaged, sample)
        config = recipe(tmp_path / name, tmp_path / f"{name}_run", *ALONE)
        parts.append(with_run(config, _first_step)[0])
        assert parts[-1]["failed"] == len(unreadable)
    assert sum(part["targets"] for part in parts) == whole["targets"]
    assert sum(part["sum"] for part in parts) == pytest.approx(whole["sum"], rel=1e-12)


@pytest.mark.parametrize("name", ["tp2_pp2_ep2", "pp3_uneven", "dp2"])
def test_every_layout_leaves_out_the_same(
    nano_data: Path, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The rank that decodes, those that embed and those that compute the loss differ."""
    index = _copy(nano_data, tmp_path / "data")
    one = recipe(tmp_path / "data", tmp_path / "one", *STEPS)
    drawn = with_run(one, _drawn)[0]
    with_picture = next(sample for sample in drawn if len(index.picture_range(sample)))
    _spoil_picture(index, with_picture)
    other = next(sample for sample in drawn if sample != with_picture)
    _spoil_text(index, other)
    alone = with_run(one, _metrics)[0]
    layout = LAYOUTS[name]
    config = recipe(tmp_path / "data", tmp_path / "run", *STEPS, *layout.overrides)
    for found in with_run(config, _metrics, layout.world_size):
        assert [entry["failed_samples"] for entry in found] == [2, 2]
        for entry, same in zip(found, alone, strict=True):
            for key in ("lm_loss", "grad_norm", "load_balancing_loss"):
                assert entry[key] == pytest.approx(same[key], rel=1e-9), key
            for key in ("consumed_documents", "consumed_tokens", "consumed_samples"):
                assert entry[key] == same[key]
    told = "".join(path.read_text() for path in (tmp_path / "run" / "logs").glob("rank_*.log"))
    told += capfd.readouterr().out
    for sample in (with_picture, other):
        assert re.search(rf"sample {sample} \(.*left blank", told)


def test_a_set_that_is_mostly_unreadable_stops_the_run(nano_data: Path, tmp_path: Path) -> None:
    index = _copy(nano_data, tmp_path / "data")
    (shard,) = index.shard_names
    size = (index.folder / shard).stat().st_size
    config = recipe(tmp_path / "data", tmp_path / "run", *STEPS, *LAYOUTS["dp2"].overrides)

    def use(run: Any) -> None:
        (index.folder / shard).write_bytes(bytes(size))
        run.run()

    with pytest.raises(RankFailed, match=r"samples cannot be read.*data\.max_failed_share 0\.5"):
        with_run(config, use, 2)


@pytest.mark.parametrize(
    ("seconds", "everywhere"),
    [(3.0, False), pytest.param(10.0, True, marks=pytest.mark.slow)],
    ids=["for_one_rank", "for_all_and_10_s"],
)
def test_storage_that_comes_back(
    seconds: float, everywhere: bool, nano_data: Path, tmp_path: Path
) -> None:
    """A data set's folder is gone for a while in the middle of a run: it goes on as if nothing
    were, and a rank that can still read waits for the others."""
    words = (
        *("training.train_iters=4", "data.prefetch_steps=0", "data.retry_seconds=60"),
        *LAYOUTS["dp2"].overrides,
    )
    calm = with_run(recipe(nano_data, tmp_path / "calm", *words), _metrics, 2)[0]
    folder, away = _copy(nano_data, tmp_path / "data").folder, tmp_path / "away"

    def use(run: Any) -> list[dict[str, Any]]:
        seen: list[dict[str, Any]] = []
        back = Timer(seconds, lambda: away.rename(folder))

        def unplug(metrics: dict[str, Any]) -> None:
            seen.append(dict(metrics))
            if metrics["iteration"] != 2:
                return
            if run.is_main:
                folder.rename(away)
                back.start()
            dist.barrier()
            if everywhere or not run.is_main:
                # What an open file of a file system that went away gives.
                for reader in run.data.readers:
                    reader._files.clear()

        run.run(on_step=unplug)
        return seen

    ranks = with_run(recipe(tmp_path / "data", tmp_path / "run", *words), use, 2)
    for found in ranks:
        assert [entry["failed_samples"] for entry in found] == [0] * 4
        assert found[2]["data_time_s"] > seconds - 2
        for entry, same in zip(found, calm, strict=True):
            for key in ("lm_loss", "grad_norm", "consumed_tokens", "consumed_documents"):
                assert entry[key] == same[key] and math.isfinite(entry[key]), key
    logs = [(tmp_path / "run" / "logs" / f"rank_{rank:05d}.log").read_text() for rank in range(2)]
    assert ["trying again" in log for log in logs] == [everywhere, True]


def test_a_run_ends_with_its_data(
    nano_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every sample once; a resumed run takes the rest, in another batch size and layout."""
    words = (
        "training.train_iters=1000",
        "data.train.train.max_epochs=1",
        f"data.train.train.path={nano_data / 'train'}",
        "training.eval_rows=2",
    )
    whole = with_run(recipe(nano_data, tmp_path / "whole", *words), _metrics)[0]
    samples = open_dataset(nano_data / "train").num_samples
    assert whole[-1]["consumed_documents"] == samples
    assert "validation_loss" in whole[-1]
    assert "has had its max_epochs" in capfd.readouterr().out

    parts = ("training.train_iters=3", *words[1:])
    first = with_run(recipe(nano_data, tmp_path / "parts", *parts), _metrics)[0]
    resumed = recipe(
        nano_data, tmp_path / "parts", *words, "training.global_batch_size=6",
        "training.micro_batch_size=3", *LAYOUTS["dp2"].overrides,
    )  # fmt: skip
    rest = with_run(resumed, _metrics, 2)[0]
    assert first[-1]["consumed_documents"] < samples
    assert rest[-1]["consumed_documents"] == samples
    assert rest[-1]["consumed_tokens"] == whole[-1]["consumed_tokens"]
    assert rest[-1]["consumed_samples"] == whole[-1]["consumed_samples"]
    # Started once more, there is nothing left to do.
    assert with_run(resumed, _metrics, 2)[0] == []
