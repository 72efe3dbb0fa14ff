"""What a run makes of its data sets: the stream it resumes, notices, threads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.config import RunConfig
from megatron_vlm.config.schema import MixturePoint, SourceConfig, UntieConfig
from megatron_vlm.data.build import build_dataset
from megatron_vlm.data.tokenizer import byte_tokenizer
from megatron_vlm.errors import ConfigError, DataError
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
                "train": {"train": {"path": str(train)}},
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
    data = open_training_data(config)
    assert left_out(data, open_held_out_data(config, data).values()) == [
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


def mixture(tmp_path: Path, **data: Any) -> RunConfig:
    """Two sets of a hundred answers each, short ones and long ones."""
    short = write(tmp_path, "short", ["a" * (i % 3 + 1) for i in range(100)])
    long = write(tmp_path, "long", ["b" * (i % 9 + 40) for i in range(100)])
    train: dict[str, dict[str, Any]] = {
        "short": {"path": str(short)},
        "long": {"path": str(long)},
    }
    for name, changes in data.pop("sources", {}).items():
        train[name].update(changes)
    config = config_of(short, **data)
    sources = {name: SourceConfig(**given) for name, given in train.items()}
    return config.model_copy(update={"data": config.data.model_copy(update={"train": sources})})


def shares(config: RunConfig, rows: int) -> dict[str, tuple[int, int]]:
    """(samples, tokens) of each source in the first rows of a run."""
    stream = open_training_data(config).stream
    found = {source.name: (0, 0) for source in stream.sources}
    for row in stream.take(stream.start(), rows)[0]:
        for number, length in zip(row.source.tolist(), row.length.tolist(), strict=True):
            name = stream.sources[number].name
            found[name] = (found[name][0] + 1, found[name][1] + length)
    return found


def test_weights_are_shares_of_tokens_or_samples(tmp_path: Path) -> None:
    weights = {"short": {"weight": 3.0}, "long": {"weight": 1.0}}
    found = shares(mixture(tmp_path, sources=weights), 300)
    assert found["short"][1] / found["long"][1] == pytest.approx(3, rel=0.05)
    (tmp_path / "other").mkdir()
    config = mixture(tmp_path / "other", sources=weights, mixture_unit="samples")
    found = shares(config, 300)
    assert found["short"][0] / found["long"][0] == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize("unit", ["tokens", "samples"])
def test_without_weights_epochs_end_together(tmp_path: Path, unit: str) -> None:
    sources = {"short": {"repeat": 2.0, "max_epochs": 4.0}, "long": {"max_epochs": 2.0}}
    config = mixture(tmp_path, sources=sources, mixture_unit=unit)
    stream = open_training_data(config).stream
    rows, cursor = stream.take(stream.start(), 10_000)
    counts = dict.fromkeys(("short", "long"), 0)
    halfway = None
    for row in rows:
        for number in row.source.tolist():
            counts[stream.sources[number].name] += 1
        if halfway is None and sum(counts.values()) >= 300:
            halfway = dict(counts)
    assert counts == {"short": 400, "long": 200}
    assert halfway is not None
    assert halfway["short"] == pytest.approx(200, abs=25)


def test_a_schedule_anneals(tmp_path: Path) -> None:
    point = MixturePoint(tokens=3000, weights={"long": 1.0})
    config = mixture(tmp_path)
    data = config.data.model_copy(update={"schedule": (point,)})
    config = config.model_copy(update={"data": data})
    before, after = shares(config, 100), shares(config, 300)
    assert before["short"] == after["short"]
    assert after["long"][0] > before["long"][0] + 100


def test_sets_of_different_tokenizers_do_not_mix(tmp_path: Path) -> None:
    config = mixture(tmp_path)
    other = write(tmp_path, "knots", ["a"], tokenizer=byte_tokenizer().with_knots())
    sources = {**config.data.train, "knots": SourceConfig(path=str(other))}
    mixed = config.model_copy(update={"data": config.data.model_copy(update={"train": sources})})
    with pytest.raises(DataError, match="another tokenizer"):
        open_training_data(mixed)


def test_a_held_out_set_has_the_tokenizer_of_the_run(tmp_path: Path) -> None:
    train = write(tmp_path, "train", ["a"])
    held = write(tmp_path, "held", ["a"], tokenizer=byte_tokenizer().with_knots())
    config = config_of(train, held)
    with pytest.raises(DataError, match="held: built with another tokenizer than .*train"):
        open_held_out_data(config, open_training_data(config))


def test_a_source_of_which_nothing_would_be_drawn_is_refused(tmp_path: Path) -> None:
    sources = {"short": {"max_epochs": 0.001}}
    with pytest.raises(ConfigError, match=r"data\.train\.short\.max_epochs 0\.001: of 100 samples"):
        open_training_data(mixture(tmp_path, sources=sources))


def test_only_documents_are_untied(tmp_path: Path) -> None:
    sources = {"short": {"untie": UntieConfig(probability=1.0)}}
    with pytest.raises(DataError, match=r"data\.train\.short\.untie: .* learned throughout"):
        open_training_data(mixture(tmp_path, sources=sources))
