"""The demo's configuration: any number of processes, any folder, and what may not be overridden."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_vlm.config import dump_yaml, load_recipe
from megatron_vlm.demo.settings import demo_config, processes_on_cpu
from megatron_vlm.errors import ConfigError
from megatron_vlm.topology.layout import resolve_layout

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("nproc", "experts", "batch"),
    [(1, 1, 8), (2, 2, 8), (3, 1, 12), (4, 2, 8), (5, 1, 10), (6, 2, 12), (7, 1, 14), (8, 2, 8)],
)
def test_any_number_of_processes_has_a_layout(nproc: int, experts: int, batch: int) -> None:
    config = demo_config(Path("run"), nproc, [])
    layout = resolve_layout(config, nproc)
    assert (layout.ep, layout.dp, config.training.global_batch_size) == (experts, nproc, batch)
    if nproc == 2:
        assert config.training == load_recipe("demo").training


def test_overrides_win_and_the_rest_is_fitted_to_them() -> None:
    stages = "parallel.pipeline_model_parallel_size=3"
    assert demo_config(Path("run"), 3, [stages]).parallel.expert_model_parallel_size == 1
    config = demo_config(Path("run"), 8, ["training.micro_batch_size=4"])
    assert (config.training.micro_batch_size, config.training.global_batch_size) == (4, 32)
    config = demo_config(
        Path("run"), 4, ["parallel.expert_model_parallel_size=4", "training.global_batch_size=16"]
    )
    assert config.parallel.expert_model_parallel_size == 4
    assert (config.training.micro_batch_size, config.training.global_batch_size) == (4, 16)
    dense = "model.language.num_moe_experts="
    assert demo_config(Path("run"), 2, [dense]).parallel.expert_model_parallel_size == 1


@pytest.mark.parametrize(
    ("nproc", "words", "said"),
    [
        (1, ["parallel.expert_model_parallel_size=2"], "expert_model_parallel_size 2"),
        (1, ["parallel.tensor_model_parallel_size=2"], "1 processes cannot hold"),
        (2, ["training.global_batch_size=3"], "global_batch_size 3 is not a multiple"),
        (2, ["run_dir=elsewhere"], "--run-dir"),
        (2, ["run_dir=runs/demo"], "--run-dir"),
        (2, ["data.train=mine"], "data.train: the demo trains on data of its own"),
        (2, ["data.validation.mine=there"], "data of its own"),
        (2, ["data={train: mine}"], "data.train: the demo trains on data of its own"),
        (2, ["training.seq_len=1"], "unknown key training.seq_len"),
    ],
)
def test_what_cannot_run_is_one_line(nproc: int, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        demo_config(Path("run"), nproc, words)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "demo #2",
        "2024",
        "1e5",
        "true",
        "a: b",
        "[x]",
        "${USER}",
        "\\${x}\\",
        "~",
        "é 名",
        "it's \"",
        " ",
    ],
)
def test_any_folder_is_taken_as_it_is_named(name: str, tmp_path: Path) -> None:
    config = demo_config(Path(name), 2, [])
    assert config.run_dir == str(Path(name))
    assert config.data.train["train"].path == str(Path(name) / "data" / "train")
    # As the ranks read it.
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    assert load_recipe(tmp_path / "config.yaml") == config


def test_one_core_gets_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert processes_on_cpu() == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    assert processes_on_cpu() == 2
