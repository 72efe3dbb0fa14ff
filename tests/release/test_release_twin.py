"""The twin of dots.vlm1, latent attention and prediction included: released at three points."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_vlm.planning.shapes import model_parameters
from tests.release.commands import checked_by_coreutils, metrics, released, state
from tests.release.folders import read_tensors
from tests.release.test_hub_models import run_outside
from tests.training_case import recipe, train_case

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ITERATIONS = (2, 4, 6)


def test_dots_vlm1_at_three_points(nano_data: Path, tmp_path: Path) -> None:
    config = recipe(
        nano_data,
        tmp_path / "run",
        "model=dots-vlm1-twin",
        "training.precision=bf16",
        "training.train_iters=6",
        "checkpoint.save_interval=2",
    )
    assert config.model.language.kv_lora_rank and config.model.language.mtp_num_layers
    train_case(config)
    out = tmp_path / "out"
    words = ("--iterations", ",".join(map(str, ITERATIONS)), "--json")
    code, said, err = released(tmp_path / "run", out, *words)
    assert code == 0, err
    steps = metrics(tmp_path / "run")
    folders = [out / name for name in json.loads(said)["made"]]
    assert len(folders) == len(ITERATIONS)
    for iteration, folder in zip(ITERATIONS, folders, strict=True):
        facts = state(folder)
        assert facts["iteration"] == iteration
        assert facts["consumed"]["tokens"] == steps[iteration]["consumed_tokens"]
        assert facts["export"]["architecture"] == "DotsVLMForCausalLM"
        assert facts["model"]["parameters"]["total"] == model_parameters(config.model).total
        found = facts["verification"]
        assert found["max_relative_difference"] < 2e-5 and found["pictures"] == 1
        assert found["compared"] > 0.5 * found["positions"]
        checked_by_coreutils(folder)
    # All of each is loaded where only transformers is, and nothing else than was released.
    run_outside(out, "resave", *folders)
    weights = [read_tensors(folder) for folder in folders]
    for folder, before in zip(folders, weights, strict=True):
        saved = read_tensors(folder / "saved")
        prediction = f"model.layers.{config.model.language.num_layers}."
        assert saved.keys() == {name for name in before if not name.startswith(prediction)}
        assert all(torch.equal(saved[name], before[name]) for name in saved)
    name = "model.embed_tokens.weight"
    assert not torch.equal(weights[0][name], weights[2][name])
