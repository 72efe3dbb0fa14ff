"""What a run makes of its data sets: the stream it resumes, notices, threads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.config import RunConfig
from megatron_vlm.data.build import build_dataset
from megatron_vlm.training import datasets
from megatron_vlm.training.datasets import (
    data_stream,
    left_out,
    num_workers,
    open_held_out_data,
    open_training_data,
)
from tests.data.samples import entry

pytestmark = pytest.mark.unit


def write(folder: Path, name: str, answers: list[str], **options: Any) -> Path:
    source = folder / f"{name}.json"
    source.write_text(json.dumps([entry("q", answer) for answer in answers]))
    build_dataset(source, folder / name, **{"workers": 1, **options})
    return folder / name


def config_of(train: Path, held_out: Path | None = None, **data: Any) -> RunConfig:
    language = {
        "num_layers": 1,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "ffn_hidden_size": 64,
        "vocab_size": 384,
    }
    return RunConfig.model_validate(
        {
            "model": {"language": language},
            "training": {"train_iters": 1, "seq_length": 64, "global_batch_size": 1},
            "data": {
                "train": str(train),
                "validation": {} if held_out is None else {"held": str(held_out)},
                **data,
            },
        }
    )


def test_another_set_of_equal_size_is_another_stream(tmp_path: Path) -> None:
    def stream(path: Path) -> dict[str, Any]:
        config = config_of(path)
        return data_stream(config, open_training_data(config))

    first = stream(write(tmp_path, "a", ["one", "two"]))
    assert stream(write(tmp_path, "same", ["one", "two"])) == first
    other = stream(write(tmp_path, "b", ["one", "twO"]))
    assert {key for key in first if first[key] != other[key]} == {
        "content_sha256 of data.train.train"
    }


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    train = write(tmp_path, "train", ["a", "b" * 100, "c" * 200])
    held = write(tmp_path, "held", ["a", "b" * 100])
    config = config_of(train, held, long_samples="skip")
    assert left_out(open_training_data(config), open_held_out_data(config).values()) == [
        f"{train}: data.long_samples leaves out 2 of 3 samples, which are longer than "
        "training.seq_length 64",
        f"{held}: data.long_samples leaves out 1 of 2 samples, which are longer than "
        "training.seq_length 64",
    ]
    short = config_of(write(tmp_path, "short", ["a"]), long_samples="skip")
    assert left_out(open_training_data(short), []) == []


@pytest.mark.parametrize(
    ("cores", "usable", "environment", "expected"),
    [
        (1, 1, {}, 1),
        (4, 4, {}, 3),
        (64, 64, {}, 8),
        (64, 64, {"LOCAL_WORLD_SIZE": "16"}, 3),
        (64, 64, {"LOCAL_WORLD_SIZE": "128"}, 1),
        (64, 4, {"OMPI_COMM_WORLD_LOCAL_SIZE": "16"}, 3),  # bound to its own cores
        (64, 64, {"LOCAL_WORLD_SIZE": "x", "SLURM_NTASKS_PER_NODE": "8"}, 7),
    ],
)
def test_threads_are_a_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    usable: int,
    environment: dict[str, str],
    expected: int,
) -> None:
    for name in datasets._PROCESSES_PER_MACHINE:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setattr(datasets, "usable_cores", lambda: usable)
    assert num_workers(config_of(Path("unused"))) == expected
    assert num_workers(config_of(Path("unused"), num_workers=5)) == 5
